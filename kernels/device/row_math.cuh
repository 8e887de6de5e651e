// What is done to a compressed row before it is quantised: RMSNorm, RoPE, Hadamard rotation.
//
// A warp has the row: a lane has `columns` neighbouring columns, from lane * columns on. Every product and
// every sum is rounded on its own, and sums have a fixed tree, so that all backends give the same bits.
#pragma once
#include "device/vector.cuh"

template <int head_dim>
struct WarpRow {
  static constexpr int columns = head_dim / 32;
  static_assert(head_dim % 32 == 0 && (columns & (columns - 1)) == 0 && columns >= 4);

  float x[columns];

  static __device__ __forceinline__ int lane() { return int(threadIdx.x % 32); }
  static __device__ __forceinline__ int first_column() { return lane() * columns; }

  __device__ __forceinline__ void round_to_bf16() {
#pragma unroll
    for (int i = 0; i < columns; i += 2) {
      const uint32 pair = round_pair_to_bf16(x[i], x[i + 1]);
      x[i] = __uint_as_float(pair << 16);
      x[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  }

  // The sum of the squares of all columns, by a balanced tree that begins with neighbours.
  __device__ __forceinline__ float sum_of_squares() const {
    float sum[columns];
#pragma unroll
    for (int i = 0; i < columns; ++i) sum[i] = __fmul_rn(x[i], x[i]);
#pragma unroll
    for (int distance = 1; distance < columns; distance *= 2)
#pragma unroll
      for (int i = 0; i + distance < columns; i += 2 * distance)
        sum[i] = __fadd_rn(sum[i], sum[i + distance]);
    float result = sum[0];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
      result = __fadd_rn(result, __shfl_xor_sync(all_lanes, result, distance));
    return result;
  }

  // x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps).
  __device__ __forceinline__ void norm(const float (&weight)[columns], float eps) {
    const float mean = __fmul_rn(sum_of_squares(), 1.0f / head_dim);  // exact: a power of two
    const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
    for (int i = 0; i < columns; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], rstd), weight[i]);
  }

  // Whether the lane's columns from `i` on are rotated. Where all lanes begin with a rotated column or
  // have none, it is the same for every i.
  template <int first_rotated>
  static __device__ __forceinline__ bool is_rotated(int i) {
    return first_column() + (first_rotated % columns ? i : 0) >= first_rotated;
  }

  // Rotates the pairs of neighbouring columns from `first_rotated` on, which is even.
  template <int first_rotated>
  __device__ __forceinline__ void rope(const float (&cosine)[columns / 2],
                                       const float (&sine)[columns / 2]) {
#pragma unroll
    for (int i = 0; i < columns; i += 2) {
      const float a = x[i], b = x[i + 1], c = cosine[i / 2], s = sine[i / 2];
      const bool rotated = is_rotated<first_rotated>(i);
      x[i] = rotated ? __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)) : a;
      x[i + 1] = rotated ? __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c)) : b;
    }
  }

  // Multiplies by the Sylvester Hadamard matrix in natural order, and by head_dim^-0.5.
  __device__ __forceinline__ void hadamard() {
#pragma unroll
    for (int distance = 1; distance < columns; distance *= 2)
#pragma unroll
      for (int i = 0; i < columns; ++i) {
        if (i & distance) continue;
        const float a = x[i], b = x[i + distance];
        x[i] = __fadd_rn(a, b);
        x[i + distance] = __fsub_rn(a, b);
      }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const bool upper = lane() & distance;
#pragma unroll
      for (int i = 0; i < columns; ++i) {
        const float other = __shfl_xor_sync(all_lanes, x[i], distance);
        x[i] = upper ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
      }
    }
    constexpr float factor = head_dim == 128   ? 0.08838834764831845f
                             : head_dim == 256 ? 0.0625f
                                               : 0.04419417382415922f;
    static_assert(head_dim == 128 || head_dim == 256 || head_dim == 512);
#pragma unroll
    for (int i = 0; i < columns; ++i) x[i] = __fmul_rn(x[i], factor);
  }
};
