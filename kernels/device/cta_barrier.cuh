// A barrier of the threads of a CTA with separate arrive and wait: a thread arrives, goes on with other
// work, and waits later. What a thread writes to shared memory before it arrives can be read by those that
// have waited.
#pragma once
#include "device/memory.cuh"

class CtaBarrier {
 public:
  static constexpr int bytes = 8;  // of shared memory, a multiple of 8 from its start

  __device__ __forceinline__ explicit CtaBarrier(void* shared) : at(shared_address(shared)) {}

  // To be called by one thread. A __syncthreads() must follow before anyone arrives.
  __device__ __forceinline__ void init(int threads) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(threads) : "memory");
  }

  // Every thread arrives by itself. One arrival per warp is not faster.
  __device__ __forceinline__ void arrive() const {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
  }

  // Waits until every thread has arrived. `parity` is 0 for the first time, then 1, 0, ...
  __device__ __forceinline__ void wait(int parity) const {
    int done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
          "  selp.b32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(at), "r"(parity)
          : "memory");
    } while (!done);
  }

 private:
  const uint32 at;
};
