// The reduction tree: a softmax-weighted sum over the rows of a window, one column at a time.
//
// The order of a floating-point sum decides its last bits, so the window alone fixes the order:
// - a quad is four consecutive rows, summed one row after the other;
// - a leaf is four quads (two or one in a window of at most 8 or 4 rows); it has one maximum, and its
//   quads are added pairwise;
// - leaves meet pairwise in `combine`, in a balanced binary tree.
// Every kernel that reduces windows uses these functions, however it shares the rows among threads.
// The intrinsics keep the compiler from fusing a product into a sum in one kernel and not in another.
#pragma once
#include "device/types.cuh"

constexpr int quad_rows = 4;
constexpr int max_leaf_quads = 4;
constexpr float log2_e = 1.4426950408889634f;

// The partial result of some rows in one column: their largest score, the sum of exp(score - max),
// and the sum of exp(score - max) * kv. max is -inf only if no row is present.
struct Partial {
  float max, sum, weighted;
};

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x - max). The difference is taken before the scaling, so that no finite score overflows.
__device__ __forceinline__ float exp_below(float x, float max) {
  return exp2_approx(__fmul_rn(__fsub_rn(x, max), log2_e));
}

// The sums of one quad under the maximum of its leaf. An absent row has score -inf and kv 0.
__device__ __forceinline__ Partial reduce_quad(const float (&score)[quad_rows],
                                               const float (&kv)[quad_rows], float max) {
  Partial quad;
  quad.max = max;
#pragma unroll
  for (int i = 0; i < quad_rows; ++i) {
    const float weight = exp_below(score[i], max);
    quad.sum = i ? __fadd_rn(quad.sum, weight) : weight;
    quad.weighted = i ? __fmaf_rn(weight, kv[i], quad.weighted) : __fmul_rn(weight, kv[i]);
  }
  return quad;
}

// Adds two parts of one leaf, which have the same maximum.
__device__ __forceinline__ Partial add(const Partial& a, const Partial& b) {
  return {a.max, __fadd_rn(a.sum, b.sum), __fadd_rn(a.weighted, b.weighted)};
}

// Joins two subtrees. Commutative to the bit: only the part with the lower maximum is scaled.
__device__ __forceinline__ Partial combine(const Partial& a, const Partial& b) {
  const bool a_is_high = a.max >= b.max;
  // Chosen value by value: choosing between the two structs would put both in local memory.
  const float high = a_is_high ? a.max : b.max;
  const float low = a_is_high ? b.max : a.max;
  // An absent part's -inf is replaced by the lowest float; fabsf covers two absent parts.
  const float distance = fabsf(__fsub_rn(high, fmaxf(low, lowest_float)));
  const float scale = exp2_approx(__fmul_rn(-distance, log2_e));
  return {high, __fmaf_rn(a_is_high ? b.sum : a.sum, scale, a_is_high ? a.sum : b.sum),
          __fmaf_rn(a_is_high ? b.weighted : a.weighted, scale,
                    a_is_high ? a.weighted : b.weighted)};
}

template <int count>
__device__ __forceinline__ Partial combine_all(const Partial* parts) {
  if constexpr (count == 1) {
    return parts[0];
  } else {
    return combine(combine_all<count / 2>(parts), combine_all<count / 2>(parts + count / 2));
  }
}

// The window's value; 0 if no row is present. Adding zero turns -0 into 0, so that any number of
// absent leaves gives the same bits.
__device__ __forceinline__ float finish(const Partial& window) {
  if (window.max == minus_infinity()) return 0.0f;
  return __fadd_rn(__fdiv_rn(window.weighted, window.sum), 0.0f);
}
