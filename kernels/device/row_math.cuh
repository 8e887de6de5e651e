// What is done to a compressed row before it is quantised: RMSNorm, RoPE, Hadamard rotation.
//
// Every product and every sum is rounded on its own, and sums have a fixed tree, so that all backends give
// the same bits, and so does any number of warps.
#pragma once
#include "device/vector.cuh"

template <int columns>
__device__ __forceinline__ void round_columns_to_bf16(float (&x)[columns]) {
#pragma unroll
  for (int i = 0; i < columns; i += 2) {
    const uint32 pair = round_pair_to_bf16(x[i], x[i + 1]);
    x[i] = __uint_as_float(pair << 16);
    x[i + 1] = __uint_as_float(pair & 0xffff0000u);
  }
}

// The sum of the squares of the columns of `parts` times 32 lanes, by a balanced tree that begins with
// neighbours. A warp has all of them: a lane has `columns` neighbouring columns of each part.
template <int parts, int columns>
__device__ __forceinline__ float sum_of_squares(const float (&x)[parts][columns]) {
  float sum[parts];
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    float square[columns];
#pragma unroll
    for (int i = 0; i < columns; ++i) square[i] = __fmul_rn(x[part][i], x[part][i]);
#pragma unroll
    for (int distance = 1; distance < columns; distance *= 2)
#pragma unroll
      for (int i = 0; i + distance < columns; i += 2 * distance)
        square[i] = __fadd_rn(square[i], square[i + distance]);
    sum[part] = square[0];
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
    for (int part = 0; part < parts; ++part)
      sum[part] = __fadd_rn(sum[part], __shfl_xor_sync(all_lanes, sum[part], distance));
#pragma unroll
  for (int distance = 1; distance < parts; distance *= 2)
#pragma unroll
    for (int part = 0; part + distance < parts; part += 2 * distance)
      sum[part] = __fadd_rn(sum[part], sum[part + distance]);
  return sum[0];
}

// 1 / sqrt(mean(x^2) + eps) of a row.
template <int head_dim>
__device__ __forceinline__ float rstd_of(float squares, float eps) {
  const float mean = __fmul_rn(squares, 1.0f / head_dim);  // exact: head_dim is a power of two
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// A lane's columns of a row that `warps` neighbouring warps of a CTA share: `columns` neighbouring ones.
template <int head_dim, int warps>
struct RowPart {
  static constexpr int columns = head_dim / (32 * warps);
  static_assert(columns * 32 * warps == head_dim && (columns & (columns - 1)) == 0 && columns >= 4);

  float x[columns];

  // Number of the lane among those that share the row.
  static __device__ __forceinline__ int lane() { return int(threadIdx.x % (32 * warps)); }
  static __device__ __forceinline__ int first_column() { return lane() * columns; }

  __device__ __forceinline__ void round_to_bf16() { round_columns_to_bf16(x); }

  template <class T>
  __device__ __forceinline__ void norm(const Vec<T, columns>& weight, float rstd) {
#pragma unroll
    for (int i = 0; i < columns; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], rstd), column(weight, i));
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
    static_assert(warps == 1);
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
      const float sign = lane() & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < columns; ++i)  // x * sign is exact
        x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(all_lanes, x[i], distance));
    }
    constexpr float factor = head_dim == 128   ? 0.08838834764831845f
                             : head_dim == 256 ? 0.0625f
                                               : 0.04419417382415922f;
    static_assert(head_dim == 128 || head_dim == 256 || head_dim == 512);
#pragma unroll
    for (int i = 0; i < columns; ++i) x[i] = __fmul_rn(x[i], factor);
  }
};
