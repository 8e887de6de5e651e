// Stores new rows that belong to no window of the stream: those before and after the new windows of a
// request. All CTAs share them, row by row.
#pragma once
#include "device/window_shape.cuh"
#include "device/new_windows.cuh"
#include "device/store_rule.cuh"

template <class C>
struct RestRows {
  using Params = typename C::Params;
  using New = NewRows<C>;
  using State = StateRows<C>;
  using Shape = WindowShape<C>;
  static constexpr int warps = C::threads / 32;
  static constexpr int per_thread = requests_per_thread<C>;
  static constexpr int parts = C::overlap ? 2 : 1;
  // That a thread loads before it stores the first.
  static constexpr int rows_at_once = max_of(
      1, min_of(2, 256 / (parts * int(sizeof(typename New::Columns) + sizeof(typename New::Ape)))));

  // Rows [row_a, row_a + count_a) and [row_b, row_b + count_b) of kv_score, of one request.
  struct Entry {
    int row_a, count_a, row_b, count_b;
  };
  // In shared memory, for the requests of a chunk.
  struct Memory {
    Entry entries[per_thread][C::threads];
    int position_of_row_0[per_thread][C::threads];
    int first[C::threads];  // rows of the threads before
    int warp_rows[warps];
  };

  const Params& p;
  const ThreadPart<C>& part;
  Memory& memory;
  const int index;  // of the CTA among those that share the rows
  int seen = 0;     // rows of the chunks before

  // Notes the rows of the thread's request number k. Returns how many there are.
  __device__ __forceinline__ int put(int k, bool valid, const Request& r,
                                     const NewWindows<C>& windows) {
    Entry entry = {r.first_token, 0, windows.high, 0};
    if (valid && p.stores) {
      const StoreRule<C> rule(p, r);
      // Of a window, the first rows are stored.
      const int before = windows.first - 1;
      if (windows.low > r.first_token)
        entry.count_a = max_of(0, min_of(windows.low - r.first_token,
                                         NewWindows<C>::offset(r, before) + rule.stored_rows(before)));
      if (windows.end_token > windows.high)
        entry.count_b = min_of(windows.end_token - windows.high, rule.stored_rows(windows.end));
    }
    memory.entries[k][threadIdx.x] = entry;
    memory.position_of_row_0[k][threadIdx.x] = int(uint32(r.start) - uint32(r.first_token));
    return entry.count_a + entry.count_b;
  }

  // Stores this CTA's share. `count`: the rows of the thread's requests. All threads take part.
  __device__ __forceinline__ void store(int chunk, int count) {
    const int total = number(count);
    const int ranges = p.ranges;
    const int mine = int(uint32(index + ranges - seen % ranges) % ranges);
    seen += total;
    wait_for_predecessor();
    constexpr int groups = C::threads / Shape::lanes;
#pragma unroll 1
    for (int rank = mine + ranges * part.group; rank < total; rank += ranges * groups * rows_at_once)
      store_rows(chunk, rank, ranges * groups, total);
    __syncthreads();  // the memory has been read
  }

  // Numbers the rows of the chunk. Returns their count.
  __device__ __forceinline__ int number(int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int through = count;  // of this thread and the lanes before
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(all_lanes, through, distance);
      if (lane >= distance) through += other;
    }
    if (lane == 31) memory.warp_rows[warp] = through;
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      if (w == warp) before = total;
      total += memory.warp_rows[w];
    }
    memory.first[threadIdx.x] = before + through - count;
    __syncthreads();
    return total;
  }

  // A row, and the request that it belongs to.
  struct Row {
    int request, row, position;
  };

  __device__ __forceinline__ Row find(int chunk, int rank) const {
    int thread = 0;
    for (int size = C::threads; size > 1;) {
      const int half = size / 2;
      if (memory.first[thread + half] <= rank) {
        thread += half;
        size -= half;
      } else {
        size = half;
      }
    }
    int left = rank - memory.first[thread];
    int k = 0;
    Entry entry = memory.entries[0][thread];
    for (; k + 1 < per_thread && left >= entry.count_a + entry.count_b; ++k) {
      left -= entry.count_a + entry.count_b;
      entry = memory.entries[k + 1][thread];
    }
    const int row = left < entry.count_a ? entry.row_a + left : entry.row_b + (left - entry.count_a);
    return {(chunk * per_thread + k) * C::threads + thread, row,
            row + memory.position_of_row_0[k][thread]};
  }

  // Stores rows number rank, rank + step, ...
  __device__ __forceinline__ void store_rows(int chunk, int rank, int step, int total) const {
    const State state{p};
    typename New::Columns columns[rows_at_once][parts];
    typename New::Ape ape[rows_at_once][parts];
    StateRow target[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const bool exists = rank + i * step < total;
      const Row row = exists ? find(chunk, rank + i * step) : Row{};
      Request of = {};
      of.index = row.request;
      of.first_token = row.row;
      const int phase = int(uint32(row.position) % C::compress_ratio);
#pragma unroll
      for (int half = 0; half < parts; ++half) {
        const auto from = New::find(p, of, 0, phase, part.column + half * C::head_dim);
        columns[i][half] = New::load_columns(from, exists);
        ape[i][half] = New::load_ape(from, exists);
      }
      target[i] =
          state.find(of, row.position, exists ? state.logical_page(row.position) : p.max_pages);
    }
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      if (!target[i].present) continue;
#pragma unroll
      for (int half = 0; half < parts; ++half) {
        typename State::Columns kv, score;
        New::round(columns[i][half], ape[i][half], kv, score);
        const int column = part.column + half * C::head_dim;
        store_streaming(state.kv_at(target[i], column), kv);
        store_streaming(state.score_at(target[i], column), score);
      }
    }
  }
};
