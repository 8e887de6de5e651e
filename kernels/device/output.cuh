// Writes compressed rows. Params has the members output, output_stride and output_is_bf16.
#pragma once
#include "device/memory.cuh"
#include "device/tree.cuh"

// One column.
template <class Params>
__device__ __forceinline__ void write_output(const Params& p, int64 row, int column, float value) {
  const int64 at = row * p.output_stride + column;
  if (p.output_is_bf16) {
    static_cast<unsigned short*>(p.output)[at] =
        static_cast<unsigned short>(round_pair_to_bf16(value, 0.0f));
  } else {
    static_cast<float*>(p.output)[at] = value;
  }
}

// The columns of one thread, N neighbours from `column` on, which is a multiple of N.
template <class Params, int N>
__device__ __forceinline__ void write_columns(const Params& p, int64 row, int column,
                                              const Partial (&result)[N]) {
  float value[N];
#pragma unroll
  for (int v = 0; v < N; ++v) value[v] = finish(result[v]);
  const int64 at = row * p.output_stride + column;
  if (p.output_is_bf16) {
    Vec<bf16, N> rounded;
    round_columns(value, rounded);
    store(static_cast<bf16*>(p.output) + at, rounded);
  } else {
    Vec<float, N> exact;
    round_columns(value, exact);
    store(static_cast<float*>(p.output) + at, exact);
  }
}
