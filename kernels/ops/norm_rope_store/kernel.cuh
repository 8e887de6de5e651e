// norm_rope_store: takes compressed rows to the cache. C::row_warps warps share a row.
#pragma once
#include "ops/norm_rope_store/params.cuh"

#include "device/row_store.cuh"
#include "device/stream_order.cuh"

namespace norm_rope_store {

// A row in memory.
template <class C>
struct RowSource {
  const typename C::rows_dtype* row;

  template <int N>
  __device__ __forceinline__ void load(int first, float (&x)[N]) const {
    const auto v = load_shared_by_ctas<typename C::rows_dtype, N>(row + first, true);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = column(v, i);
  }
};

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  // A format may allow fewer warps to share a row. Then the others have nothing to do.
  constexpr int warps = min_of(C::row_warps, most_row_warps<C>());
  constexpr int row_threads = 32 * C::row_warps, rows_at_once = C::threads / row_threads;
  launch_dependents();
  if (params.prefetch == prefetch_none) wait_for_predecessor();
  if (uniform(threadIdx.x % row_threads < 32 * warps)) {
    const int step = int(gridDim.x) * rows_at_once;
    int index = int(blockIdx.x) * rows_at_once + int(threadIdx.x / row_threads);
    RowMetadata next = load_metadata(params, min_of(index, params.num_rows - 1));
    RowFactors<C, warps, true> factors;
    bool has_weight = false;
    for (; uniform(index < params.num_rows); index += step) {
      const RowPlace place = place_of(params, next);
      if (index + step < params.num_rows) next = load_metadata(params, index + step);
      if (!uniform(place.exists)) continue;
      factors.load_angles(params, place.position);
      if (!has_weight) factors.load_weight(params);
      has_weight = true;
      wait_for_predecessor();
      const auto* rows = static_cast<const typename C::rows_dtype*>(params.rows);
      RowStore<C, warps>{params, place}.run(
          index, RowSource<C>{rows + index * params.rows_stride}, factors);
    }
  }
  // One CTA that waits is enough: the grid does not end before its predecessor.
  if (blockIdx.x == 0) wait_for_predecessor();
}

}  // namespace norm_rope_store
