// locate_rows: finds the position and the cache slot of every output row that a window fills.
//
// A thread takes one output row. It finds the row's request in cu_outputs, and the window by the
// request's metadata. The threads of a warp search nearly the same entries, so most of their loads
// hit in L1.
#pragma once
#include "ops/locate_rows/params.cuh"

#include "device/request.cuh"
#include "device/stream_order.cuh"

namespace locate_rows {

struct Place {
  int position;
  int64 slot;
};

// The request b with cu_outputs[b] <= row < cu_outputs[b + 1]; -1 or p.batch if there is none.
// Where the search ends, both relations hold even if cu_outputs is not monotone.
__device__ __forceinline__ int owner_of(const Params& p, int row) {
  int low = 0, high = p.batch + 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (p.cu_outputs[middle] <= row) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

__device__ __forceinline__ int64 slot_by_page(const Params& p, int request, uint32 window) {
  const uint32 rows = uint32(p.rows_per_page), logical = window / rows;
  if (logical >= uint32(p.max_pages)) return -1;
  const int page = p.block_table_cache[request * p.block_table_cache_stride + logical];
  return page < 0 ? -1 : int64(page) * rows + window % rows;
}

__device__ __forceinline__ int64 slot_by_token(const Params& p, int token) {
  return token < p.num_token_slots ? p.token_slots[token] : -1;
}

// The place of a row that a window fills; {-1, -1} for any other row.
__device__ __forceinline__ Place locate(const Params& p, int row) {
  constexpr Place nowhere = {-1, -1};
  const int request = owner_of(p, row);
  if (request < 0 || request == p.batch) return nowhere;
  // As read_request of device/request.cuh, with bounds that are no constants.
  const auto [length, begin, end] = load_lengths(p, request);
  const uint32 new_tokens = uint32(end) - uint32(begin);
  if (begin < 0 || end < begin || end > p.most_tokens ||
      int(new_tokens) > min_of(p.most_new, length))
    return nowhere;
  const int start = length - int(new_tokens);
  const uint32 ratio = uint32(p.compress_ratio);
  const int64 number = int64(row) - p.cu_outputs[request];
  const int64 window = uint32(start) / ratio + number;
  if (window >= uint32(length) / ratio) return nowhere;
  // The window ends at or before `length`, so that ints hold its positions.
  const int position = int(window * ratio);
  // The tensor that is absent has no elements.
  const int64 slot = p.max_pages > 0
                         ? slot_by_page(p, request, uint32(window))
                         : slot_by_token(p, begin + (position - start + p.compress_ratio - 1));
  return {position, slot};
}

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  launch_dependents();
  wait_for_predecessor();
  const uint32 row = blockIdx.x * C::threads + threadIdx.x;
  if (row >= uint32(params.num_outputs) || int(row) < params.cu_outputs[0]) return;
  const Place place = locate(params, int(row));
  params.positions[row] = place.position;
  params.slots[row] = place.slot;
}

}  // namespace locate_rows
