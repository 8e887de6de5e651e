// Programmatic dependent launch: a kernel may begin while the kernel before it on the stream, its
// predecessor, still runs. Data that the predecessor writes may be read only after
// wait_for_predecessor(), and data that it reads may be written only after it.
#pragma once

// What a call lets the kernel read before wait_for_predecessor(), as the op's `prefetch` says.
constexpr int prefetch_none = 0;      // nothing
constexpr int prefetch_metadata = 1;  // the integer metadata
constexpr int prefetch_state = 2;     // the metadata, and old rows of the state

// Lets the next kernel on the stream begin once every CTA of this one has called this.
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
