// Where the compressed rows of a state op go: to the tensor `output`.
//
// An Output has these members; device/cache_output.cuh has them too. Threads of the CTA call them
// together but for the two that write.
//   early                                whether expect() and load_factors() do anything
//   expect(row)                          some time before the row is written
//   load_factors()                       after that, when expect()'s loads have arrived or soon will
//   begin_row()                          before the columns of a row are written
//   write_columns(row, column, result)   N neighbouring columns of one thread
//   write_column(row, column, value)     one column
//   end_row(row)                         after all threads have written their columns
//   end()                                after the last row
#pragma once
#include "device/memory.cuh"
#include "device/stream_order.cuh"
#include "device/tree.cuh"

// Params has the members output, output_stride and output_is_bf16.
template <class C>
struct RowOutput {
  static constexpr int shared_bytes = 0;
  static constexpr bool early = false;

  const typename C::Params& p;

  __device__ __forceinline__ RowOutput(const typename C::Params& params, void*) : p(params) {}

  __device__ __forceinline__ void expect(int64) {}
  __device__ __forceinline__ void load_factors() {}
  __device__ __forceinline__ void begin_row() { wait_for_predecessor(); }

  __device__ __forceinline__ void write_column(int64 row, int column, float value) {
    const int64 at = row * p.output_stride + column;
    if (p.output_is_bf16) {
      static_cast<unsigned short*>(p.output)[at] =
          static_cast<unsigned short>(round_pair_to_bf16(value, 0.0f));
    } else {
      static_cast<float*>(p.output)[at] = value;
    }
  }

  // `column` is a multiple of N.
  template <int N>
  __device__ __forceinline__ void write_columns(int64 row, int column, const Partial (&result)[N]) {
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

  __device__ __forceinline__ void end_row(int64) {}
  __device__ __forceinline__ void end() {}
};
