// paged_kv_compress: stores the new tokens' rows in the paged state and reduces each window that they
// close to one output row.
//
// A CTA either reduces, one slice of one request, or stores. The two need no order between them: a
// window takes its new rows from kv_score.
#pragma once
#include "ops/paged_kv_compress/params.cuh"

#include "device/window_fetch.cuh"
#include "device/window_reduce.cuh"
#include "ops/paged_kv_compress/store.cuh"

namespace paged_kv_compress {

__device__ __forceinline__ void write_output(const Params& p, int64 row, int column, float value) {
  const int64 at = row * p.output_stride + column;
  if (p.output_is_bf16) {
    static_cast<unsigned short*>(p.output)[at] =
        static_cast<unsigned short>(round_pair_to_bf16(value, 0.0f));
  } else {
    static_cast<float*>(p.output)[at] = value;
  }
}

// Reduces one window to this thread's share of the partial result.
template <class C>
__device__ __forceinline__ void reduce_window(const Params& p, const Request& request,
                                              const ThreadPart<C>& part, HeldRows<C>& held,
                                              int window, Partial (&result)[WindowShape<C>::vector]) {
  LeafStack<C> stack;
#pragma unroll 1
  for (int leaf = 0; leaf < WindowShape<C>::group_leaves; ++leaf) {
    LeafFetch<C> fetch(p, request, part, held, window, leaf);
    fetch.run();
    held.wait();
    WindowReduce<C>::reduce_leaf(held, fetch.any_present, result);
    stack.push(leaf, result);
  }
  WindowReduce<C>::reduce_warp(result);
}

// The windows of one request, one slice of their columns. `cta` counts the CTAs that reduce.
template <class C>
__device__ __forceinline__ void reduce_request(const Params& p, uint4* shared, uint32 cta) {
  using Shape = WindowShape<C>;
  const int slice = int(cta % Shape::slices);
  const int index = int(cta / Shape::slices);
  const ThreadPart<C> part(slice);
  HeldRows<C> held(shared);
  Request request;
  if (!read_request<C>(p, index, load_lengths(p, index), request) || !request.windows) return;
  const int2 reserved = output_rows(p, request.index);
  const WarpPartials<C> partials{reinterpret_cast<float*>(shared)};
  for (int i = 0; i < request.windows; ++i) {
    Partial result[Shape::vector];
    reduce_window<C>(p, request, part, held, request.first_window + i, result);
    const int64 row = int64(reserved.x) + i;
    const bool writes = row >= 0 && row < reserved.y;
    if constexpr (C::reduce_warps == 1) {
      if (!writes || part.group != 0) continue;
      wait_for_predecessor();
#pragma unroll
      for (int v = 0; v < Shape::vector; ++v)
        write_output(p, row, part.column + v, finish(result[v]));
    } else {
      partials.put(part, result);
      __syncthreads();
      if (writes) {
        wait_for_predecessor();
        for (int local = threadIdx.x; local < C::head_slice; local += C::threads)
          write_output(p, row, slice * C::head_slice + local, partials.value(local));
      }
      // The next window's rows overwrite the partials.
      if (i + 1 < request.windows) __syncthreads();
    }
  }
}

// What a CTA does, and its number among the CTAs that do it.
struct Job {
  bool stores;
  uint32 number;
};

// CTAs that store are spread among those that reduce. They wait for the predecessor: if they were
// first in the grid, they would hold their places on the SMs meanwhile and nothing would be read; if
// they were last, they would queue behind the many CTAs that find no window to close.
__device__ __forceinline__ Job job_of(const Params& p, uint32 storing) {
  const uint32 before = __umulhi(blockIdx.x, p.storing_share);
  if (before < storing && __umulhi(blockIdx.x + 1, p.storing_share) > before) return {true, before};
  return {false, blockIdx.x - (before < storing ? before : storing)};
}

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  extern __shared__ uint4 shared[];
  static_assert(C::shared_bytes == max_of(HeldRows<C>::shared_bytes, WarpPartials<C>::shared_bytes));
  launch_dependents();
  if (!params.prefetch_state) wait_for_predecessor();
  const uint32 reducing = uint32(params.batch) * WindowShape<C>::slices;
  const uint32 storing = gridDim.x - reducing;
  const Job job = job_of(params, storing);
  if (job.stores)
    Store<C>::run(params, job.number * C::threads + threadIdx.x, storing * C::threads);
  else
    reduce_request<C>(params, shared, job.number);
  // One CTA that waits is enough: the grid does not end before its predecessor.
  if (blockIdx.x == 0) wait_for_predecessor();
}

}  // namespace paged_kv_compress
