// Loads, stores and asynchronous copies of vectors.
#pragma once
#include "device/vector.cuh"

// Loads a vector; if `present` is false, touches neither memory nor `v`. The asm is volatile to keep
// loads in program order, so that a thread issues all its loads before it waits for the first. The
// load is not .nc: a kernel that ended after this one began may have written the data.
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

// Loads a vector that other CTAs of the SM read too, through L1; zeros if `present` is false.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_shared_by_ctas(const T* address, bool present) {
  Vec<T, N> v = {};
#pragma unroll
  for (int i = 0; i < Vec<T, N>::words; i += 4) {
    uint32* w = v.word + i;
    const char* at = reinterpret_cast<const char*>(address) + 4 * i;
    if constexpr (Vec<T, N>::words == 2) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %3, 0;\n"
          "  @p ld.global.v2.b32 {%0, %1}, [%2]; }"
          : "+r"(w[0]), "+r"(w[1])
          : "l"(at), "r"(int(present)));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
          "  @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
          : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
          : "l"(at), "r"(int(present)));
    }
  }
  return v;
}

// Loads a vector; zeros if `present` is false.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* address, bool present) {
  Vec<T, N> v = {};
  load_over(v, address, present);
  return v;
}

// Brings the line of an address into the L2. It reads nothing, so it needs no order.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
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
    const uint32* w = v.word + i;
    char* at = reinterpret_cast<char*>(address) + 4 * i;
    if constexpr (Vec<T, N>::words == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(w[0], w[1]);
    } else {
      *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// Stores a vector that is not read again soon: it is the first to leave the L2.
template <class T, int N>
__device__ __forceinline__ void store_streaming(T* address, const Vec<T, N>& v) {
#pragma unroll
  for (int i = 0; i < Vec<T, N>::words; i += 4) {
    const uint32* w = v.word + i;
    char* at = reinterpret_cast<char*>(address) + 4 * i;
    if constexpr (Vec<T, N>::words == 2) {
      asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
      asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(w[0]), "r"(w[1]),
                   "r"(w[2]), "r"(w[3])
                   : "memory");
    }
  }
}

// The address that instructions on shared memory take. The compiler folds sums of such addresses
// into the instruction, and sums of pointers it does not.
__device__ __forceinline__ uint32 shared_address(const void* shared) {
  return uint32(__cvta_generic_to_shared(shared));
}

// Starts a copy of 4, 8 or 16 bytes to shared memory. The thread goes on; wait_for_copies() waits.
template <int bytes>
__device__ __forceinline__ void copy_async(uint32 shared, const void* global) {
  if constexpr (bytes == 16)  // does not go through L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(bytes)
                 : "memory");
}

// Ends a group of copies. wait_for_groups<n>() waits until all but the last n groups have arrived.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int n>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
