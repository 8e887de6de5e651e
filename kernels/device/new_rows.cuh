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

  // One vector of a new row, and of the ape that the state's score includes.
  using Ape = Vec<float, vector>;
  struct Columns {
    Vec<kv_dtype, vector> kv, score;
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
    return {load<kv_dtype, vector>(from.kv, present), load<kv_dtype, vector>(from.score, present)};
  }

  // Needed only if the state holds score + ape; otherwise zeros, which no one reads.
  static __device__ __forceinline__ Ape load_ape(const Source& from, bool present) {
    return load_shared_by_ctas<float, vector>(from.ape, present && C::ape_in_state);
  }

  // Rounds a vector to what the state holds.
  static __device__ __forceinline__ void round(const Columns& columns, const Ape& ape,
                                               StateColumns& kv, StateColumns& score) {
    kv = round_kv(columns.kv);
    round_score(columns.score, ape, score);
  }

  static __device__ __forceinline__ StateColumns round_kv(const Vec<kv_dtype, vector>& new_kv) {
    if constexpr (same_dtype) {
      return new_kv;
    } else {
      float exact[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) exact[i] = column(new_kv, i);
      StateColumns kv;
      round_columns(exact, kv);
      return kv;
    }
  }

  static __device__ __forceinline__ void round_score(const Vec<kv_dtype, vector>& new_score,
                                                     const Ape& ape, StateColumns& score) {
    float exact[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i)
      exact[i] = C::ape_in_state ? __fadd_rn(column(new_score, i), column(ape, i))
                                 : column(new_score, i);
    round_columns(exact, score);
  }

  // For a state of raw scores: the score with ape.
  static __device__ __forceinline__ Vec<float, vector> add_ape(const StateColumns& raw,
                                                               const Ape& ape) {
    float sum[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) sum[i] = __fadd_rn(column(raw, i), column(ape, i));
    Vec<float, vector> score;
    round_columns(sum, score);
    return score;
  }
};
