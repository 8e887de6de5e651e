// Reduces the held rows of a window: a leaf in a thread and its neighbours, then the tree over a
// thread's leaves, over a warp, and over the warps of the CTA.
#pragma once
#include "device/held_rows.cuh"

template <class C>
struct WindowReduce {
  using Shape = WindowShape<C>;
  static constexpr int vector = Shape::vector;
  using Result = Partial[vector];  // of a thread's columns

  // Reduces the leaf that the thread and the groups beside it hold. Every group gets the result.
  // Scores: vectors of columns, in the state's dtype or fp32. Rows: has kv_of(i), the KV of row i.
  template <class Scores, class Rows>
  static __device__ __forceinline__ void reduce_leaf(const Scores (&score)[Shape::held_rows],
                                                     Rows& rows, bool any_present,
                                                     Result& result) {
    float max[vector];
    find_max(score, any_present, max);

    Partial quad[Shape::held_quads][vector];
#pragma unroll
    for (int q = 0; q < Shape::held_quads; ++q) {
      typename StateRows<C>::Columns kv[quad_rows];
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) kv[i] = rows.kv_of(q * quad_rows + i);
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        float column_score[quad_rows], column_kv[quad_rows];
#pragma unroll
        for (int i = 0; i < quad_rows; ++i) {
          column_score[i] = column(score[q * quad_rows + i], v);
          column_kv[i] = column(kv[i], v);
        }
        quad[q][v] = reduce_quad(column_score, column_kv, max[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      if constexpr (Shape::held_quads == 1) result[v] = quad[0][v];
      if constexpr (Shape::held_quads == 2) result[v] = add(quad[0][v], quad[1][v]);
      if constexpr (Shape::held_quads == 4)
        result[v] = add(add(quad[0][v], quad[1][v]), add(quad[2][v], quad[3][v]));
    }
    add_groups(result);
#pragma unroll
    for (int v = 0; v < vector; ++v)
      if (!any_present) result[v].max = minus_infinity();
  }

  // The leaf's maximum, and whether any row of it is present, over all groups that share it.
  template <class Scores>
  static __device__ __forceinline__ void find_max(const Scores (&score)[Shape::held_rows],
                                                  bool& any_present, float (&max)[vector]) {
    Scores largest = score[0];
#pragma unroll
    for (int i = 1; i < Shape::held_rows; ++i) largest = max_columns(largest, score[i]);
#pragma unroll
    for (int distance = Shape::lanes; distance < Shape::lanes * Shape::leaf_groups;
         distance *= 2) {
      any_present |= bool(__shfl_xor_sync(all_lanes, int(any_present), distance));
      Scores other;
#pragma unroll
      for (int i = 0; i < Scores::words; ++i)
        other.word[i] = __shfl_xor_sync(all_lanes, largest.word[i], distance);
      largest = max_columns(largest, other);
    }
#pragma unroll
    for (int v = 0; v < vector; ++v) max[v] = fmaxf(column(largest, v), lowest_float);
  }

  // Adds the quads of the other groups that share the leaf.
  static __device__ __forceinline__ void add_groups(Result& result) {
#pragma unroll
    for (int distance = Shape::lanes; distance < Shape::lanes * Shape::leaf_groups;
         distance *= 2) {
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        Partial other = result[v];
        other.sum = __shfl_xor_sync(all_lanes, other.sum, distance);
        other.weighted = __shfl_xor_sync(all_lanes, other.weighted, distance);
        result[v] = add(result[v], other);
      }
    }
  }

  // The subtree over the groups of a warp. Every group gets the result.
  static __device__ __forceinline__ void reduce_warp(Result& result) {
#pragma unroll
    for (int distance = Shape::lanes * Shape::leaf_groups; distance < 32; distance *= 2) {
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        Partial other;
        other.max = __shfl_xor_sync(all_lanes, result[v].max, distance);
        other.sum = __shfl_xor_sync(all_lanes, result[v].sum, distance);
        other.weighted = __shfl_xor_sync(all_lanes, result[v].weighted, distance);
        result[v] = combine(result[v], other);
      }
    }
  }
};

// The tree over a thread's leaves, which come one after the other. They are joined as a binary counter
// counts: open[k] holds a finished left subtree of 2^k leaves that waits for its right sibling.
template <class C>
struct LeafStack {
  using Shape = WindowShape<C>;
  static constexpr int levels = log2_of(Shape::group_leaves);
  Partial open[levels ? levels : 1][Shape::vector];

  // Takes leaf number `leaf`. After the last one `result` is the whole subtree.
  __device__ __forceinline__ void push(int leaf, Partial (&result)[Shape::vector]) {
    bool carries = true;
#pragma unroll
    for (int level = 0; level < levels; ++level) {
      if (carries && (leaf >> level & 1)) {
#pragma unroll
        for (int v = 0; v < Shape::vector; ++v) result[v] = combine(result[v], open[level][v]);
      } else if (carries) {
        carries = false;
#pragma unroll
        for (int v = 0; v < Shape::vector; ++v) open[level][v] = result[v];
      }
    }
  }
};

// The top of the tree: the results of the warps that share a window meet in shared memory.
template <class C>
struct WarpPartials {
  using Shape = WindowShape<C>;
  static constexpr int vector = Shape::vector;

  // Where rows are held in shared memory, each thread writes its partial over its own rows, which it
  // has read by then. Shared memory that a CTA does not take is L1, which the store of new rows needs.
  static constexpr bool over_rows = !HeldRows<C>::in_registers;
  static constexpr int plane = over_rows ? C::threads * vector : C::reduce_warps * C::head_slice;
  static constexpr int shared_bytes =
      C::reduce_warps > 1 && !over_rows ? 3 * plane * int(sizeof(float)) : 0;

  float* memory;  // [max, sum, weighted][plane]

  // Index in a plane of one warp's partial of one column.
  static __device__ __forceinline__ int index(int warp, int local_column) {
    if constexpr (over_rows) {
      const int thread = warp * Shape::warp_groups * Shape::lanes + local_column / vector;
      return (local_column % vector / 4 * C::threads + thread) * 4 + local_column % 4;
    } else {
      return warp * C::head_slice + local_column;
    }
  }

  __device__ __forceinline__ void put(const ThreadPart<C>& part,
                                      const Partial (&result)[vector]) const {
    if (!part.leads_warp()) return;
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      float* mine = memory + index(part.warp(), part.lane_column + v);
      mine[0] = result[v].max;
      mine[plane] = result[v].sum;
      mine[2 * plane] = result[v].weighted;
    }
  }

  // The window's value in one column, after a barrier.
  __device__ __forceinline__ float value(int local_column) const {
    Partial parts[C::reduce_warps];
#pragma unroll
    for (int w = 0; w < C::reduce_warps; ++w) {
      const float* from = memory + index(w, local_column);
      parts[w] = {from[0], from[plane], from[2 * plane]};
    }
    return finish(combine_all<C::reduce_warps>(parts));
  }
};
