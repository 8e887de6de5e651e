// Reduces the windows of one request that have rows in the state.
#pragma once
#include "device/output.cuh"
#include "device/window_fetch.cuh"
#include "device/window_reduce.cuh"

// One slice of the windows that close for one request: old rows from the state, new ones from kv_score.
template <class C, class Output>
struct RequestWindows {
  using Params = typename C::Params;
  using Shape = WindowShape<C>;
  using Result = Partial[Shape::vector];

  const Params& p;
  const Request& request;
  const ThreadPart<C>& part;
  HeldRows<C>& held;
  uint4* shared;
  Output& output;
  const int2 early_rows;  // output_rows(), loaded with the request's lengths

  // An Output that needs the row's number before the window's rows has it early. For others that would
  // cost registers.
  __device__ __forceinline__ int2 reserved() const {
    if constexpr (Output::early) return early_rows;
    else return output_rows(p, request.index);
  }

  // The output row of window number `i` of those that close; negative if none is reserved for it.
  __device__ __forceinline__ int64 target_of(int i) const {
    const int2 rows = reserved();
    const int64 row = int64(rows.x) + i;
    return row < rows.y ? row : -1;
  }

  // Before the rows of window number `i` are fetched.
  __device__ __forceinline__ void begin(int i) const {
    if constexpr (Output::early) {
      const int64 row = target_of(i);
      if (row >= 0) output.expect(row);
    }
  }

  __device__ __forceinline__ LeafFetch<C> fetch(int window, int leaf) const {
    return LeafFetch<C>(p, request, part, held, window, leaf);
  }

  __device__ __forceinline__ void reduce_leaf(LeafFetch<C>& fetch, Result& result) const {
    held.wait();
    typename LeafFetch<C>::Scores score[Shape::held_rows];
    fetch.scores(score);
    WindowReduce<C>::reduce_leaf(score, held, fetch.present, result);
  }

  // This thread's share of one window.
  __device__ __forceinline__ void window(int index, Result& result) const {
    LeafStack<C> stack;
#pragma unroll 1
    for (int leaf = 0; leaf < Shape::group_leaves; ++leaf) {
      LeafFetch<C> rows = fetch(index, leaf);
      rows.start_old([&] {
        if (leaf == 0) output.load_factors();
      });
      rows.load_new();
      reduce_leaf(rows, result);
      stack.push(leaf, result);
    }
    WindowReduce<C>::reduce_warp(result);
  }

  // Writes window number `i` of those that close. All threads of the CTA take part.
  __device__ __forceinline__ void write(int i, const Result& result) const {
    const int64 row = target_of(i);
    if constexpr (C::reduce_warps == 1) {
      if (row < 0) return;
      output.begin_row();
      if (part.group == 0) output.write_columns(row, part.column, result);
    } else {
      const WarpPartials<C> partials{reinterpret_cast<float*>(shared)};
      partials.put(part, result);
      __syncthreads();
      if (row < 0) return;
      output.begin_row();
      const int first_column = part.column - part.lane_column;
      for (int local = threadIdx.x; local < C::head_slice; local += C::threads)
        output.write_column(row, first_column + local, partials.value(local));
    }
    output.end_row(row);
  }

  // Reduces windows number `from` and later of those that close.
  __device__ __forceinline__ void reduce(int from) const {
    for (int i = from; i < request.windows; ++i) {
      // The rows of this window overwrite the partials of the one before.
      if (C::reduce_warps > 1 && i > 0) __syncthreads();
      begin(i);
      Result result;
      window(request.first_window + i, result);
      write(i, result);
    }
  }
};
