// Types and constants that every kernel uses. Self-contained: NVRTC needs no CUDA headers.
#pragma once

using int64 = long long;
using uint8 = unsigned char;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct bf16 {
  unsigned short bits;
};

template <bool condition, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};
template <bool condition, class A, class B>
using choose = typename Choose<condition, A, B>::type;

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__device__ constexpr int clamp(int64 x, int low, int high) {
  return x < low ? low : x > high ? high : int(x);
}
__device__ constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }
__device__ constexpr int power_of_two_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

constexpr uint32 all_lanes = 0xffffffffu;

// A condition that is the same for all lanes of a warp. The vote tells the compiler so: behind a branch on
// it, addresses stay in uniform registers, and shuffles need no code for lanes that are missing.
__device__ __forceinline__ bool uniform(bool condition) {
  return __any_sync(all_lanes, condition);
}

constexpr float lowest_float = -3.402823466e+38f;  // finite
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
