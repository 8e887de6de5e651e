// The rows of a window that a thread holds at once: KV and score of its columns.
//
// One quad is held in registers. More are held in shared memory: a copy to shared memory needs no
// register while it is in flight, so a CTA has more bytes in flight. So are the rows of a fused kernel,
// which finds their places at run time.
#pragma once
#include "device/window_shape.cuh"

template <class C>
struct HeldRows {
  using Shape = WindowShape<C>;
  using Columns = typename StateRows<C>::Columns;
  enum Which { kv = 0, score = 1 };

  static constexpr bool in_registers = Shape::held_quads == 1 && !C::fused;
  static constexpr int shared_bytes =
      in_registers ? 0 : C::threads * Shape::held_rows * 2 * int(sizeof(Columns));

  Columns registers[in_registers ? Shape::held_rows : 1][2];
  Columns* shared;        // [held_rows][kv, score][threads]: this thread's element of each
  uint32 shared_at;       // the same as an address of shared memory

  __device__ __forceinline__ explicit HeldRows(void* memory) {
    if constexpr (!in_registers) {
      shared = static_cast<Columns*>(memory) + threadIdx.x;
      // The shuffle returns the thread's own value. The compiler does not know that, and so keeps
      // the address in a register; otherwise it works it out again for every copy.
      shared_at = __shfl_sync(all_lanes, shared_address(shared), threadIdx.x % 32);
    }
  }

  // `row` counts from the thread's first row. It must be a constant where rows are in registers.
  __device__ __forceinline__ Columns& at(int row, Which which) {
    if constexpr (in_registers) return registers[row][which];
    else return shared[(row * 2 + which) * C::threads];
  }

  // Starts a load of one row from the state. If it is not present, its values are undefined.
  __device__ __forceinline__ void start_load(int row, Which which,
                                             const typename C::state_dtype* from, bool present) {
    if constexpr (in_registers) {
      registers[row][which] = load<typename C::state_dtype, Shape::vector>(from, present);
    } else if (present) {
      copy_async<16>(shared_at + (row * 2 + which) * C::threads * int(sizeof(Columns)), from);
    }
  }

  __device__ __forceinline__ Columns kv_of(int row) { return at(row, kv); }

  __device__ __forceinline__ void set_absent(int row) {
    at(row, kv) = every_column<typename C::state_dtype, Shape::vector>(0.0f);
    at(row, score) = every_column<typename C::state_dtype, Shape::vector>(minus_infinity());
  }

  // Waits until all loads that the thread started have arrived.
  __device__ __forceinline__ void wait() {
    if constexpr (!in_registers) wait_for_copies();
  }
};
