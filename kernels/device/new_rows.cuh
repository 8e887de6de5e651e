// New rows: as kv_score holds them, and as the state holds them.
#pragma once
#include "device/state_rows.cuh"

template <class C>
struct NewRows {
  using kv_dtype = typename C::kv_dtype;
  using state_dtype = typename C::state_dtype;
  static constexpr int vector = StateRows<C>::vector;
  using StateColumns = typename StateRows<C>::Columns;

  // Whether the state holds a new row's KV with the bits that kv_score has.
  static constexpr bool same_dtype = is_same<kv_dtype, state_dtype>;

  // One vector of a new row.
  struct Columns {
    Vec<kv_dtype, vector> kv, score;
    Vec<float, vector> ape;
  };

  // Addresses of one vector.
  struct Source {
    const kv_dtype* kv;
    const kv_dtype* score;
    const float* ape;
  };

  // token: number among the request's new tokens; phase: position % compress_ratio.
  static __device__ __forceinline__ Source find(const typename C::Params& p,
                                                const Request& request, int token, int phase,
                                                int column) {
    const kv_dtype* row = static_cast<const kv_dtype*>(p.kv_score) +
                          int64(request.first_token + token) * p.kv_score_stride + column;
    return {row, row + StateRows<C>::state_dim, p.ape + phase * p.ape_stride + column};
  }

  static __device__ __forceinline__ Columns load_columns(const Source& from, bool present) {
    return {load<kv_dtype, vector>(from.kv, present), load<kv_dtype, vector>(from.score, present),
            load<float, vector>(from.ape, present)};
  }

  // Rounds a vector to what the state holds.
  static __device__ __forceinline__ void round(const Columns& columns, StateColumns& kv,
                                               StateColumns& score) {
    if constexpr (same_dtype) {
      kv = columns.kv;
    } else {
      float exact[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) exact[i] = column(columns.kv, i);
      round_columns(exact, kv);
    }
    add_ape(columns.score, columns.ape, score);
  }

  static __device__ __forceinline__ void add_ape(const Vec<kv_dtype, vector>& new_score,
                                                 const Vec<float, vector>& ape,
                                                 StateColumns& score) {
    float exact[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) exact[i] = __fadd_rn(column(new_score, i), column(ape, i));
    round_columns(exact, score);
  }
};
