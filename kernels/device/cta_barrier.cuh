// A barrier of the warps of a CTA with separate arrive and wait: a warp arrives, goes on with
// other work, and waits later. What a warp writes to shared memory before it arrives can be read by those
// that have waited.
#pragma once
#include "device/memory.cuh"

class CtaBarrier {
 public:
  static constexpr int bytes = 8;  // of shared memory, a multiple of 8 from its start

  __device__ __forceinline__ explicit CtaBarrier(void* shared) : at(shared_address(shared)) {}

  // To be called by one thread. A __syncthreads() must follow before anyone arrives.
  __device__ __forceinline__ void init(int warps) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(warps) : "memory");
  }

  // The calling warp arrives.
  __device__ __forceinline__ void arrive() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
  }

  // Waits until every warp has arrived. `parity` is 0 for the first time, then 1, 0, ...
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
