// norm_rope_store: takes compressed rows to the cache. A warp per row.
#pragma once
#include "ops/norm_rope_store/params.cuh"

#include "device/row_store.cuh"
#include "device/stream_order.cuh"

namespace norm_rope_store {

template <class C>
__device__ __forceinline__ void load_row(const Params& p, int index, WarpRow<C::head_dim>& row) {
  using Row = WarpRow<C::head_dim>;
  const auto* from = static_cast<const typename C::rows_dtype*>(p.rows) + index * p.rows_stride;
  const auto v = load<typename C::rows_dtype, Row::columns>(from + Row::first_column(), true);
#pragma unroll
  for (int i = 0; i < Row::columns; ++i) row.x[i] = column(v, i);
}

template <class C>
__device__ __forceinline__ void run_row(const Params& p, int index) {
  const RowPlace place = place_of(p, load_metadata(p, index));
  if (!place.exists) return;
  wait_for_predecessor();
  WarpRow<C::head_dim> row;
  load_row<C>(p, index, row);
  const RowStore<C> store(p, place);
  store.run(index, row);
}

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  launch_dependents();
  if (params.prefetch == prefetch_none) wait_for_predecessor();
  const int index = int(blockIdx.x) * (C::threads / 32) + int(threadIdx.x / 32);
  if (index < params.num_rows) run_row<C>(params, index);
  // One CTA that waits is enough: the grid does not end before its predecessor.
  if (blockIdx.x == 0) wait_for_predecessor();
}

}  // namespace norm_rope_store
