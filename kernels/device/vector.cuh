// Vectors of neighbouring columns of one row, as they are in memory.
#pragma once
#include "device/types.cuh"

template <class T, int N>
struct Vec {
  static constexpr int words = N * int(sizeof(T)) / 4;
  static_assert(words == 2 || words % 4 == 0, "a vector is 8 bytes or a multiple of 16");
  alignas(words == 2 ? 8 : 16) uint32 word[words];
};

// Column i as a float.
template <int N>
__device__ __forceinline__ float column(const Vec<float, N>& v, int i) {
  return __uint_as_float(v.word[i]);
}

template <int N>
__device__ __forceinline__ float column(const Vec<bf16, N>& v, int i) {
  return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
}

// The larger value of each column. A NaN loses to a number.
template <int N>
__device__ __forceinline__ Vec<float, N> max_columns(const Vec<float, N>& a,
                                                     const Vec<float, N>& b) {
  Vec<float, N> larger;
#pragma unroll
  for (int i = 0; i < N; ++i) larger.word[i] = __float_as_uint(fmaxf(column(a, i), column(b, i)));
  return larger;
}

template <int N>
__device__ __forceinline__ Vec<bf16, N> max_columns(const Vec<bf16, N>& a, const Vec<bf16, N>& b) {
  Vec<bf16, N> larger;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger.word[i]) : "r"(a.word[i]), "r"(b.word[i]));
  return larger;
}

// The larger of two magnitudes; NaN if either is.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float larger;
  asm("{ .reg .f32 a, b; abs.f32 a, %1; abs.f32 b, %2; max.NaN.f32 %0, a, b; }"
      : "=f"(larger)
      : "f"(a), "f"(b));
  return larger;
}

// Two floats, rounded to nearest even, in one word.
__device__ __forceinline__ uint32 round_pair_to_bf16(float low, float high) {
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <int N>
__device__ __forceinline__ void round_columns(const float (&x)[N], Vec<float, N>& v) {
#pragma unroll
  for (int i = 0; i < N; ++i) v.word[i] = __float_as_uint(x[i]);
}

template <int N>
__device__ __forceinline__ void round_columns(const float (&x)[N], Vec<bf16, N>& v) {
#pragma unroll
  for (int i = 0; i < N; i += 2) v.word[i / 2] = round_pair_to_bf16(x[i], x[i + 1]);
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> every_column(float x) {
  float columns[N];
#pragma unroll
  for (int i = 0; i < N; ++i) columns[i] = x;
  Vec<T, N> v;
  round_columns(columns, v);
  return v;
}
