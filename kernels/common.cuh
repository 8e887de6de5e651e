// What every kernel is made of: bf16, vector access, and the nodes of the reduction tree.
// Self-contained, so that NVRTC compiles it without CUDA's headers.
#pragma once

using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct bf16 {
  unsigned short bits;
};

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

constexpr float lowest = -3.402823466e+38f;  // finite
constexpr float log2_e = 1.4426950408889634f;
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// ---- Vectors of columns -------------------------------------------------------------------------

// N neighbouring columns of one row as they lie in memory.
template <class T, int N>
struct Vec {
  static constexpr int words = N * int(sizeof(T)) / 4;
  static_assert(words == 2 || words % 4 == 0, "a vector is 8 bytes or a multiple of 16");
  alignas(words == 2 ? 8 : 16) uint32 word[words];
};

template <int N>
__device__ __forceinline__ float column(const Vec<float, N>& v, int i) {
  return __uint_as_float(v.word[i]);
}

template <int N>
__device__ __forceinline__ float column(const Vec<bf16, N>& v, int i) {
  return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
}

// The larger of each column; the other one of a NaN.
template <int N>
__device__ __forceinline__ Vec<float, N> max_columns(const Vec<float, N>& a,
                                                     const Vec<float, N>& b) {
  Vec<float, N> most;
#pragma unroll
  for (int i = 0; i < N; ++i) most.word[i] = __float_as_uint(fmaxf(column(a, i), column(b, i)));
  return most;
}

template <int N>
__device__ __forceinline__ Vec<bf16, N> max_columns(const Vec<bf16, N>& a, const Vec<bf16, N>& b) {
  Vec<bf16, N> most;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most.word[i]) : "r"(a.word[i]), "r"(b.word[i]));
  return most;
}

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

// ---- Global memory ------------------------------------------------------------------------------

// Streams a vector in; touches neither memory nor `v` if `present` is false. The asm is volatile to
// keep loads in program order: all of a leaf's loads are issued before the first wait. No .nc: what
// is read may have been written by a kernel that ended after this one began.
template <class T, int N>
__device__ __forceinline__ void load_over(Vec<T, N>& v, const T* address, bool present) {
#pragma unroll
  for (int i = 0; i < Vec<T, N>::words; i += 4) {
    uint32* w = v.word + i;
    const char* at = reinterpret_cast<const char*>(address) + 4 * i;
    if constexpr (Vec<T, N>::words == 2) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %3, 0;\n"
          "  @p ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2]; }"
          : "+r"(w[0]), "+r"(w[1])
          : "l"(at), "r"(int(present)));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
          "  @p ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4]; }"
          : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
          : "l"(at), "r"(int(present)));
    }
  }
}

// The same, or zeros.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* address, bool present) {
  Vec<T, N> v = {};
  load_over(v, address, present);
  return v;
}

__device__ __forceinline__ int load_int(const int* address, bool present, int otherwise) {
  int x;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, %3;\n"
      "  @p ld.global.b32 %0, [%1]; }"
      : "=&r"(x)
      : "l"(address), "r"(int(present)), "r"(otherwise));
  return x;
}

template <class T, int N>
__device__ __forceinline__ void store(T* address, const Vec<T, N>& v) {
#pragma unroll
  for (int i = 0; i < Vec<T, N>::words; i += 4) {
    char* at = reinterpret_cast<char*>(address) + 4 * i;
    if constexpr (Vec<T, N>::words == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(v.word[0], v.word[1]);
    } else {
      *reinterpret_cast<uint4*>(at) =
          make_uint4(v.word[i], v.word[i + 1], v.word[i + 2], v.word[i + 3]);
    }
  }
}

// What an instruction on shared memory takes for an address. Sums of these are folded into it, sums
// of pointers are not.
__device__ __forceinline__ uint32 shared_address(const void* shared) {
  return uint32(__cvta_generic_to_shared(shared));
}

// Copies 8, 16 or 32 bytes to shared memory while the thread goes on; wait_for_copies() ends the
// wait.
template <int bytes>
__device__ __forceinline__ void copy_async(uint32 shared, const void* global) {
  if constexpr (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < bytes; i += 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared + i),
                   "l"(static_cast<const char*>(global) + i)
                   : "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- The kernels before and after on the stream -------------------------------------------------
//
// With programmatic dependent launch a kernel may begin while the one before it still runs: what
// that one writes may be read, and what it reads be written, only after wait_for_predecessor().

// Lets the next kernel begin, if it was launched so, once all CTAs of this one have come here.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- The reduction tree -------------------------------------------------------------------------
//
// The order of a floating-point sum decides its last bits, so the order is fixed by the window
// alone, whoever holds which rows. A window is cut into leaves of 16 rows (8 or 4 if it has no
// more). A leaf has one maximum and sums its rows in quads: four rows one after the other, then
// the quads pairwise. Leaves meet pairwise in `combine`, in a balanced binary tree. The intrinsics
// keep the compiler from fusing a product into a sum in one kernel and not in another.

constexpr int quad_rows = 4;
constexpr int max_leaf_quads = 4;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x - max), the difference taken first: exact where it matters, no overflow for huge scores.
__device__ __forceinline__ float exp_below(float x, float max) {
  return exp2_approx(__fmul_rn(__fsub_rn(x, max), log2_e));
}

// A softmax-weighted sum over some rows, in one column: their maximal score, the sum of
// exp(score - max), and that of exp(score - max) * kv. max is -inf only where no row is present.
struct Partial {
  float max, sum, weighted;
};

// Adds a quad's sums to a partial: the rows `score`, `kv` of one column, an absent row being
// (-inf, 0), under the maximum of its leaf.
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

// Two parts of one leaf.
__device__ __forceinline__ Partial add(const Partial& a, const Partial& b) {
  return {a.max, __fadd_rn(a.sum, b.sum), __fadd_rn(a.weighted, b.weighted)};
}

// Two subtrees. Commutative to the bit: the part with the lower maximum is scaled, the other never.
__device__ __forceinline__ Partial combine(const Partial& a, const Partial& b) {
  const bool a_is_high = a.max >= b.max;
  // Chosen value by value: choosing between the two structs would put both in local memory.
  const float high = a_is_high ? a.max : b.max;
  const float low = a_is_high ? b.max : a.max;
  // `lowest` stands in for an absent part's -inf, the absolute value covers two absent parts.
  const float distance = fabsf(__fsub_rn(high, fmaxf(low, lowest)));
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

// The window's value. Adding zero makes -0 into 0: absent leaves may be met in any number.
__device__ __forceinline__ float finish(const Partial& window) {
  if (window.max == minus_infinity()) return 0.0f;
  return __fadd_rn(__fdiv_rn(window.weighted, window.sum), 0.0f);
}
