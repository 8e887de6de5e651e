// Codes and scales of cache formats. kvfold.formats has the same in torch, and docs/formats.md says what
// becomes of zeros, infinities and NaN. A kernel is compiled for a format: its fields are constants of C.
#pragma once
#include "device/vector.cuh"

constexpr uint32 magnitude_bits = 0x7fffffffu, infinity_bits = 0x7f800000u, nan_bits = 0x7fffffffu;
constexpr uint32 largest_finite_bits = 0x7f7fffffu;

// Values of C::scale_code, in the order of SCALE_CODES in ops/row_spec.py.
constexpr int scale_none = 0, scale_tensor = 1, scale_fp32 = 2, scale_e8m0 = 3, scale_e4m3 = 4;

// ---- Codes --------------------------------------------------------------------------------------

// fp8 e4m3: to nearest, saturating; NaN is 0x7f. ties_down: ties go toward zero, and zeros are positive;
// otherwise ties go to even codes, and a zero keeps its sign.
template <bool ties_down>
__device__ __forceinline__ uint32 encode_e4m3(float value) {
  const uint32 bits = __float_as_uint(value), magnitude = bits & magnitude_bits;
  const uint32 field = magnitude >> 23;
  const uint32 mantissa = (magnitude & 0x7fffffu) | (field ? 0x800000u : 0u);
  // Counted from the smallest normal of the code. Below it, one more mantissa bit is lost per step.
  const int above = max_of(int(field), 1) - 121;
  const int lost = min_of(20 - min_of(above, 0), 25);
  const uint32 kept = mantissa >> lost, twice = 2 * (mantissa - (kept << lost)), unit = 1u << lost;
  const bool up = twice > unit || (!ties_down && twice == unit && (kept & 1));
  uint32 code = kept + uint32(up) + (uint32(max_of(above, 0)) << 3);
  code = code > 0x7e ? 0x7e : code;
  if (bits >> 31 && (!ties_down || code)) code |= 0x80;
  return magnitude > infinity_bits ? 0x7fu : code;
}

// Two columns, the first in the low byte; with the instruction where there is one.
template <bool ties_down>
__device__ __forceinline__ uint32 encode_pair_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  if constexpr (!ties_down) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
  }
#endif
  return encode_e4m3<ties_down>(low) | encode_e4m3<ties_down>(high) << 8;
}

__device__ __forceinline__ float decode_e4m3(uint32 code) {
  const uint32 exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return __uint_as_float(nan_bits);
  return exponent ? __uint_as_float((exponent + 120) << 23 | mantissa << 20)
                  : float(mantissa) * 0.001953125f;
}

// fp4 e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign bit; NaN is 6. ties_down: as for fp8.
template <bool ties_down>
__device__ __forceinline__ uint32 encode_e2m1(float value) {
  const float a = fabsf(value);
  constexpr bool even = !ties_down;
  uint32 code = uint32(a > 0.25f) + uint32(even ? a >= 0.75f : a > 0.75f) + uint32(a > 1.25f) +
                uint32(even ? a >= 1.75f : a > 1.75f) + uint32(a > 2.5f) +
                uint32(even ? a >= 3.5f : a > 3.5f) + uint32(a > 5.0f);
  if (__float_as_uint(value) >> 31 && (even || code)) code |= 8;
  return a == a ? code : 7u;
}

// Two columns, the first in the low half; with the instruction where there is one.
template <bool ties_down>
__device__ __forceinline__ uint32 encode_pair_e2m1(float low, float high) {
#ifdef __CUDA_ARCH_FAMILY_SPECIFIC__
  if constexpr (!ties_down) {
    unsigned short pair;
    asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2; cvt.u16.u8 %0, pair; }"
        : "=h"(pair)
        : "f"(high), "f"(low));
    return pair;
  }
#endif
  return encode_e2m1<ties_down>(low) | encode_e2m1<ties_down>(high) << 4;
}

// ---- Scales -------------------------------------------------------------------------------------

// The scale of a block: its code in the page, its value, and 1 / value if that is exact.
struct BlockScale {
  uint32 code;
  float value;
  float reciprocal;
};

// The scale of a block before it is coded; amax: bits of its largest magnitude.
template <class C>
__device__ __forceinline__ uint32 exact_scale(const typename C::Params& p, uint32 amax) {
  uint32 scale = __float_as_uint(__fdiv_rn(__uint_as_float(amax), p.largest));
  if ((scale & magnitude_bits) > infinity_bits) scale = nan_bits;
  return C::floor_on_scale && scale < p.floor_bits ? p.floor_bits : scale;
}

// Exponent field of the next power of two of a scale that is not negative; 255: NaN or no such number.
__device__ __forceinline__ uint32 exponent_above(uint32 scale) {
  const uint32 exponent = (scale >> 23) + uint32((scale & 0x7fffffu) != 0);
  return exponent > 255 ? 255 : exponent;
}

// The same of exact_scale(). Where the quotient is a normal number, two comparisons say which side of a
// power of two it is on: rounding never moves it to the power or across.
template <class C>
__device__ __forceinline__ uint32 scale_exponent(const typename C::Params& p, uint32 amax) {
  const uint32 largest = __float_as_uint(p.largest);
  const int exponent = int(amax >> 23) - int(largest >> 23) + 127;
  if (amax >> 23 == 0 || amax >= infinity_bits || exponent < 1)
    return exponent_above(exact_scale<C>(p, amax));
  const uint32 above = min_of(exponent + int((amax & 0x7fffffu) > (largest & 0x7fffffu)), 255);
  return C::floor_on_scale ? max_of(above, exponent_above(p.floor_bits)) : above;
}

// `amax`: bits of the largest magnitude of the block.
template <class C>
__device__ __forceinline__ BlockScale scale_of_block(const typename C::Params& p, uint32 amax) {
  if (amax == infinity_bits) amax = largest_finite_bits;
  if (!C::floor_on_scale && amax < p.floor_bits) amax = p.floor_bits;
  if constexpr (C::pow2) {
    const uint32 exponent = scale_exponent<C>(p, amax);
    const uint32 value = exponent == 255 ? nan_bits : exponent << 23;
    // 2^127 has a reciprocal that is no normal.
    const uint32 reciprocal = exponent >= 254 ? 0x400000u : (254 - exponent) << 23;
    return {C::scale_code == scale_e8m0 ? exponent : value, __uint_as_float(value),
            __uint_as_float(exponent == 255 ? nan_bits : reciprocal)};
  }
  const uint32 scale = exact_scale<C>(p, amax);
  if constexpr (C::scale_code == scale_e4m3) {
    const uint32 code = encode_e4m3<false>(__uint_as_float(scale));
    return {code, decode_e4m3(code), 0.0f};
  } else {
    return {scale, __uint_as_float(scale), 0.0f};
  }
}

// Divides columns by a scale; by 0 to 0.
template <int N>
__device__ __forceinline__ void divide_columns(float (&x)[N], float scale) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = scale == 0.0f ? 0.0f : __fdiv_rn(x[i], scale);
}

// The same where no column is larger than a few hundred times the scale. Where nothing can overflow, one
// reciprocal serves all columns: two steps after the product the quotient is rounded correctly, but for
// quotients that are far below the smallest code.
template <int N>
__device__ __forceinline__ void divide_block(float (&x)[N], float scale) {
  constexpr float far = 1.2089258196146292e24f;  // 2^80
  if (!(scale >= 1 / far && scale <= far)) return divide_columns(x, scale);
  const float reciprocal = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float near_quotient = __fmul_rn(x[i], reciprocal);
    const float rest = __fmaf_rn(-near_quotient, scale, x[i]);
    const float quotient = __fmaf_rn(rest, reciprocal, near_quotient);
    x[i] = copysignf(quotient, x[i]);  // the quotient of -0 has become 0
  }
}
