// The yardstick: one warp per window and 16 bytes of columns per lane, an online softmax row by row.
// A fallback for several new tokens is commonly written like this. It stores as the variant does.
// CONFIG is a variant's config struct.

namespace paged_kv_compress {

template <class C>
__device__ __forceinline__ void reduce_row_by_row(const Params& p, const Request& request,
                                                  const ThreadPart<C>& part, int window,
                                                  float (&result)[WindowShape<C>::vector]) {
  using Shape = WindowShape<C>;
  using New = NewRows<C>;
  constexpr int vector = Shape::vector;
  const StateRows<C> state{p};
  float max[vector], sum[vector], weighted[vector];
  bool any_present = false;
#pragma unroll
  for (int v = 0; v < vector; ++v) {
    max[v] = lowest_float;
    sum[v] = weighted[v] = 0.0f;
  }
#pragma unroll 1
  for (int row = 0; row < Shape::rows; ++row) {
    const int position = (window - int(C::overlap)) * C::compress_ratio + row;
    if (position < 0) continue;
    const int at = Shape::state_column(row, part.column);
    const StateRow found = state.find(request, position, state.logical_page(position));
    if (!found.present) continue;
    any_present = true;
    typename StateRows<C>::Columns kv, score;
    if (position < request.start) {
      using state_dtype = typename C::state_dtype;
      kv = load<state_dtype, vector>(state.kv_at(found, at), true);
      score = load<state_dtype, vector>(state.score_at(found, at), true);
    } else {
      const auto from = New::find(p, request, position - request.start, Shape::phase(row), at);
      New::round(New::load_columns(from, true), New::load_ape(from, true), kv, score);
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
  using Shape = WindowShape<CONFIG>;
  static_assert(CONFIG::threads == 32 && CONFIG::reduce_warps == 1);
  launch_dependents();
  wait_for_predecessor();
  const uint32 storing = gridDim.x - uint32(params.batch) * Shape::slices;
  const Job job = job_of<CONFIG>(params, storing);
  if (job.stores) {
    Store<CONFIG>::run(params, job.number * CONFIG::threads + threadIdx.x,
                       storing * CONFIG::threads);
    return;
  }
  const int index = int(job.number / Shape::slices);
  const ThreadPart<CONFIG> part(int(job.number % Shape::slices));
  Request request;
  if (!read_request<CONFIG>(params, index, load_lengths(params, index), request)) return;
  const int2 reserved = output_rows(params, request.index);
  RowOutput<CONFIG> output(params, nullptr);
  for (int i = 0; i < request.windows; ++i) {
    float result[Shape::vector];
    reduce_row_by_row<CONFIG>(params, request, part, request.first_window + i, result);
    const int64 row = int64(reserved.x) + i;
    if (row < 0 || row >= reserved.y) continue;
#pragma unroll
    for (int v = 0; v < Shape::vector; ++v)
      output.write_column(row, part.column + v, result[v]);
  }
}
