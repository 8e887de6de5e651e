// How the threads of a CTA share a slice of a window: constants, and a thread's part.
//
// A slice is head_slice columns. `lanes` neighbouring threads cover it, 16 bytes of state each. The
// threads that have the same columns are in different groups. The quads of the window are dealt out
// over the reduce_warps warps, and within a warp over its groups. A leaf stays within a warp. If there
// are more warps or groups than quads, the last ones have no rows.
//
// device/window_shape.py works out the same constants for the table.
#pragma once
#include "device/new_rows.cuh"
#include "device/tree.cuh"

template <class C>
struct WindowShape {
  static constexpr int vector = StateRows<C>::vector;
  static constexpr int lanes = C::head_slice / vector;
  static constexpr int slices = C::head_dim / C::head_slice;

  static constexpr int rows = C::compress_ratio * (C::overlap ? 2 : 1);
  static constexpr int quads = power_of_two_at_least((rows + quad_rows - 1) / quad_rows);
  static constexpr int leaf_quads = min_of(quads, max_leaf_quads);

  static constexpr int warp_groups = max_of(1, 32 / lanes);
  static constexpr int warp_quads = max_of(leaf_quads, quads / C::reduce_warps);
  static constexpr int group_quads = max_of(1, warp_quads / warp_groups);
  static constexpr int group_leaves = max_of(1, group_quads / leaf_quads);

  // What a thread holds at once: its quads of one leaf.
  static constexpr int held_quads = min_of(group_quads, leaf_quads);
  static constexpr int held_rows = held_quads * quad_rows;
  static constexpr int leaf_groups = leaf_quads / held_quads;  // groups that share a leaf

  static_assert(C::head_dim % C::head_slice == 0 && C::head_slice % vector == 0);
  static_assert(lanes % 32 == 0 || 32 % lanes == 0);
  static_assert(C::threads == C::reduce_warps * warp_groups * lanes);

  // An overlapping window has the rows of the window before it, then its own.
  static __device__ __forceinline__ bool is_own(int row) {
    return !C::overlap || row >= C::compress_ratio;
  }

  // Where the state has the columns of a row: its own rows use the second half of state_dim.
  static __device__ __forceinline__ int state_column(int row, int column) {
    return column + (C::overlap && is_own(row) ? C::head_dim : 0);
  }

  // position % compress_ratio of a row.
  static __device__ __forceinline__ int phase(int row) {
    return C::overlap && is_own(row) ? row - C::compress_ratio : row;
  }
};

// The calling thread's part of a window.
template <class C>
struct ThreadPart {
  using Shape = WindowShape<C>;

  int lane_column;  // its first column in the slice
  int column;       // and in the output row
  int group;        // number of the group among all groups of the CTA
  int first_row;    // its first row of a window; Shape::rows if the group has no rows

  __device__ __forceinline__ explicit ThreadPart(int slice) {
    lane_column = int(threadIdx.x % Shape::lanes * Shape::vector);
    column = slice * C::head_slice + lane_column;
    group = int(threadIdx.x / Shape::lanes);
    const int warp_quad = int(uint32(group) % Shape::warp_groups) * Shape::group_quads;
    first_row = warp_quad < Shape::warp_quads
                    ? (warp() * Shape::warp_quads + warp_quad) * quad_rows
                    : Shape::rows;
  }

  // Number of the warp among those that share the rows.
  __device__ __forceinline__ int warp() const { return int(uint32(group) / Shape::warp_groups); }

  // Whether the thread is in the first group of its warp.
  __device__ __forceinline__ bool leads_warp() const {
    return uint32(group) % Shape::warp_groups == 0;
  }
};
