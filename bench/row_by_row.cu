// The yardstick: one warp per window and 16-byte-wide columns per lane, an online softmax row by
// row. It is how a fallback for several new tokens is commonly written, and what sharing a window
// between warps is compared with. Stores as the variant does. CONFIG is a variant's config.

template <class C>
struct RowByRow : paged_kv_compress::Compressor<C> {
  using Base = paged_kv_compress::Compressor<C>;
  using Base::Base;
  using typename Base::Columns;

  __device__ __forceinline__ void reduce_window(int window, float (&result)[Base::vector]) {
    const auto& request = this->request;
    float max[Base::vector], sum[Base::vector], weighted[Base::vector];
    bool any_present = false;
#pragma unroll
    for (int v = 0; v < Base::vector; ++v) {
      max[v] = lowest;
      sum[v] = weighted[v] = 0.0f;
    }
#pragma unroll 1
    for (int row = 0; row < Base::window_rows; ++row) {
      const int position = (window - int(C::overlap)) * C::compress_ratio + row;
      if (position < 0) continue;
      const int column_start = this->column_of(row);
      const auto place = this->find(position, this->logical_page(position));
      if (!place.present) continue;
      any_present = true;
      Columns kv, score;
      if (position < request.start) {
        kv = load<typename C::state_t, Base::vector>(this->kv_at(place, column_start), true);
        score = load<typename C::state_t, Base::vector>(this->score_at(place, column_start), true);
      } else {
        Base::round_new(this->load_new(position - request.start, column_start, true), kv, score);
      }
#pragma unroll
      for (int v = 0; v < Base::vector; ++v) {
        const float above = fmaxf(max[v], column(score, v));
        const float scale = exp_below(max[v], above);
        const float weight = exp_below(column(score, v), above);
        sum[v] = sum[v] * scale + weight;
        weighted[v] = weighted[v] * scale + weight * column(kv, v);
        max[v] = above;
      }
    }
#pragma unroll
    for (int v = 0; v < Base::vector; ++v) result[v] = any_present ? weighted[v] / sum[v] : 0.0f;
  }

  __device__ __forceinline__ void reduce_windows(int cta) {
    auto& request = this->request;
    this->slice_start = cta % Base::slices * C::head_slice;
    if (!paged_kv_compress::load_request<C>(this->p, cta / Base::slices, request)) return;
    const int2 reserved = this->output_rows();
    for (int i = 0; i < request.windows; ++i) {
      float result[Base::vector];
      reduce_window(request.first_window + i, result);
      const int64 row = int64(reserved.x) + i;
      if (row < 0 || row >= reserved.y) continue;
#pragma unroll
      for (int v = 0; v < Base::vector; ++v)
        this->write_output(row, this->lane_column + v, result[v]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(CONFIG::threads)
row_by_row(const __grid_constant__ paged_kv_compress::Params params) {
  static_assert(CONFIG::threads == 32 && CONFIG::reduce_warps == 1);
  extern __shared__ uint4 shared[];
  RowByRow<CONFIG> kernel(params, shared);
  const int storing = int(gridDim.x) - params.batch * RowByRow<CONFIG>::slices;
  const int cta = int(blockIdx.x) - storing;
  if (cta >= 0) {
    kernel.reduce_windows(cta);
  } else {
    kernel.store_new_rows(blockIdx.x * CONFIG::threads + threadIdx.x);
  }
}
