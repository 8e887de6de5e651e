// The yardstick: one warp per window and 16-byte-wide columns per lane, an online softmax row by
// row. It is how a fallback for several new tokens is commonly written, and what sharing a window
// between warps is compared with. Stores as the variant does. CONFIG is a variant's config.

namespace paged_kv_compress {

template <class C>
__device__ __forceinline__ void reduce_row_by_row(const Window<C>& window, const Request& request,
                                                  int index, float (&result)[Window<C>::vector]) {
  using window_t = Window<C>;
  constexpr int vector = window_t::vector;
  float max[vector], sum[vector], weighted[vector];
  bool any_present = false;
#pragma unroll
  for (int v = 0; v < vector; ++v) {
    max[v] = lowest;
    sum[v] = weighted[v] = 0.0f;
  }
#pragma unroll 1
  for (int row = 0; row < window_t::window_rows; ++row) {
    const int position = (index - int(C::overlap)) * C::compress_ratio + row;
    if (position < 0) continue;
    const int column_start = window.column_of(row);
    const auto place = window.rows.find(request, position, window.rows.logical_page(position));
    if (!place.present) continue;
    any_present = true;
    typename window_t::Columns kv, score;
    if (position < request.start) {
      using state_t = typename C::state_t;
      kv = load<state_t, vector>(window.rows.kv_at(place, column_start), true);
      score = load<state_t, vector>(window.rows.score_at(place, column_start), true);
    } else {
      const auto at = window.rows.find_new(request, position - request.start,
                                           row % C::compress_ratio, column_start);
      window_t::state::round_new(window_t::state::load_new(at, true), kv, score);
    }
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      const float above = fmaxf(max[v], column(score, v));
      const float scale = exp_below(max[v], above);
      const float weight = exp_below(column(score, v), above);
      sum[v] = sum[v] * scale + weight;
      weighted[v] = weighted[v] * scale + weight * column(kv, v);
      max[v] = above;
    }
  }
#pragma unroll
  for (int v = 0; v < vector; ++v) result[v] = any_present ? weighted[v] / sum[v] : 0.0f;
}

}  // namespace paged_kv_compress

extern "C" __global__ void __launch_bounds__(CONFIG::threads)
row_by_row(const __grid_constant__ paged_kv_compress::Params params) {
  using namespace paged_kv_compress;
  static_assert(CONFIG::threads == 32 && CONFIG::reduce_warps == 1 && !CONFIG::persistent);
  extern __shared__ uint4 shared[];
  constexpr int slices = CONFIG::head_dim / CONFIG::head_slice;
  launch_dependents();
  wait_for_predecessor();
  const uint32 storing = gridDim.x - uint32(params.batch) * slices;
  const Job job = job_of(params, storing);
  if (job.stores) {
    Store<CONFIG>::store_items(params, job.number * CONFIG::threads + threadIdx.x,
                               storing * CONFIG::threads);
    return;
  }
  const int cta = int(job.number);
  const Window<CONFIG> window(params, shared, cta % slices);
  Request request;
  if (!load_request<CONFIG>(params, cta / slices, request)) return;
  const int2 reserved = output_rows(params, request.index);
  for (int i = 0; i < request.windows; ++i) {
    float result[Window<CONFIG>::vector];
    reduce_row_by_row(window, request, request.first_window + i, result);
    const int64 row = int64(reserved.x) + i;
    if (row < 0 || row >= reserved.y) continue;
#pragma unroll
    for (int v = 0; v < Window<CONFIG>::vector; ++v)
      window.write_output(row, window.lane_column + v, result[v]);
  }
}
