// Clusters: CTAs that run at the same time and can write to each other's shared memory. They need sm_90.
#pragma once
#include "device/memory.cuh"

// Number of the CTA in its cluster.
__device__ __forceinline__ uint32 cluster_rank() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of a cluster, in two steps: a thread arrives, and waits later. What a thread
// writes before it arrives can be read by those that have waited. Every thread arrives, waits, arrives, ...
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes a word to the shared memory of CTA `rank`, where it has the address `at` in this CTA.
__device__ __forceinline__ void store_to_cta(uint32 at, uint32 rank, float value) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "  st.shared::cluster.b32 [remote], %2; }" ::"r"(at),
      "r"(rank), "r"(__float_as_uint(value))
      : "memory");
}
