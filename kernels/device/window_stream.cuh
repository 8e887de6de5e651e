// A stream of windows whose rows are all new: a CTA has one slice of their columns, reduces one window
// while the rows of the next ones are in flight, and stores the rows that are to be stored.
//
// Every thread reads the rows and columns that it or its neighbour has copied to shared memory, so no warp
// waits for another's rows. Where warps share a window they join their results one window later, so that
// they hardly wait there either. The order of the sums is that of device/tree.cuh.
#pragma once
#include "device/cta_barrier.cuh"
#include "device/output.cuh"
#include "device/stream_order.cuh"
#include "device/window_reduce.cuh"

// One window, the same for all threads of the CTA.
struct StreamWindow {
  int first_row;  // row of kv_score of the window's first token
  int request;
  int number;  // among the windows of the request
  int target;  // output row; negative if the window is not reduced
  int stored;  // how many of its first rows are to be stored
  int lead;    // 1: it only brings the rows that the next window overlaps
};

template <class C, class Output>
struct WindowStream {
  using Params = typename C::Params;
  using Shape = WindowShape<C>;
  using New = NewRows<C>;
  using State = StateRows<C>;
  using Columns = typename State::Columns;
  using kv_dtype = typename C::kv_dtype;
  using Raw = Vec<kv_dtype, Shape::vector>;
  using Scores = choose<C::ape_in_state, Columns, Vec<float, Shape::vector>>;
  using Ape = typename New::Ape;

  static constexpr int vector = Shape::vector;
  static constexpr int warps = C::threads / 32;
  static constexpr int parts = C::overlap ? 2 : 1;  // of head_dim columns, in a row of state
  // A thread's own rows of a window. With an overlap it has all rows of its columns.
  static constexpr int rows =
      C::overlap ? C::compress_ratio : min_of(Shape::group_quads * quad_rows, C::compress_ratio);
  static_assert(rows <= 32);
  static_assert(!C::overlap || C::threads == Shape::lanes);
  // Whether every thread has this many rows, and a leaf no others.
  static constexpr bool even = C::overlap ? Shape::quads * quad_rows == Shape::rows
                                          : C::threads / Shape::lanes * rows == C::compress_ratio &&
                                                rows % Shape::held_rows == 0;

  // Windows in flight beside the one that is reduced. An overlapping one needs the one before, too.
  static constexpr int ahead = C::stages - (C::overlap ? 2 : 1);

  // A copy is 16 bytes. Where KV and score of a thread are 8 each, every other thread copies the KV of
  // two, and its neighbour their score.
  static constexpr bool copies_in_pairs = sizeof(Raw) == 8 && Shape::lanes > 1;

  static constexpr int row_bytes = parts * 2 * C::threads * int(sizeof(Raw));
  static constexpr int stage_bytes = rows * row_bytes;
  // Neighbouring threads of a warp that have the same rows look their page up once.
  static constexpr int lanes = min_of(Shape::lanes, 32);
  static constexpr int page_slots = C::threads / lanes;
  static constexpr int page_bytes = page_slots * int(sizeof(int2));
  static constexpr int window_bytes = warps * 2 * int(sizeof(int4));
  static constexpr int partial_row = C::head_slice + 4;  // of a warp; the 4 avoid bank conflicts
  static constexpr int plane = C::reduce_warps * partial_row;
  // Of two windows.
  static constexpr int partial_bytes = C::reduce_warps > 1 ? 2 * 3 * plane * int(sizeof(float)) : 0;
  static constexpr int shared_bytes =
      C::stages * (stage_bytes + window_bytes + page_bytes) + partial_bytes + CtaBarrier::bytes;

  const Params& p;
  Output& output;
  const ThreadPart<C> part;
  const State state;
  char* memory;      // rows and windows by stage, partial results, pages by stage, a barrier
  int copy_column;  // of kv_score: the thread copies from here on
  uint32 copy_at;   // address of shared memory, in stage 0: to here
  uint32 own_rows;   // bit i: the thread has row i of a window
  uint32 before_present;  // which rows of the window before are present
  int joined_target;  // output row of the window whose results are to be joined; negative if there is none
  int parity;         // of the number of windows whose results were put
  Ape ape[rows][parts];

  __device__ __forceinline__ WindowStream(const Params& params, Output& row_output, int slice,
                                          void* shared)
      : p(params), output(row_output), part(slice), state{params}, memory(static_cast<char*>(shared)) {
    const int odd = copies_in_pairs ? int(threadIdx.x % 2) : 0;
    copy_column = part.column + odd * (State::state_dim - vector);
    copy_at = shared_address(shared) + (int(threadIdx.x) + odd * (C::threads - 1)) * int(sizeof(Raw));
    const int count = min_of(max_of(C::compress_ratio - own_row(), 0), rows);
    own_rows = even ? all_rows : uint32((1ull << count) - 1);
    before_present = own_rows;
    joined_target = -1;
    parity = 0;
  }

  // Before the first window. All threads of the CTA call it, and what shared memory held may be lost.
  __device__ __forceinline__ void start() const {
    if constexpr (C::reduce_warps > 1) {
      __syncthreads();
      if (threadIdx.x == 0) barrier().init(C::threads);
      __syncthreads();
    }
  }

  static constexpr uint32 all_rows = uint32((1ull << rows) - 1);

  // The phases of a thread's rows are the same in all windows.
  __device__ __forceinline__ void load_ape() {
    wait_for_predecessor();
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int half = 0; half < parts; ++half) ape[i][half] = load_ape_of(i, half);
  }

  __device__ __forceinline__ Ape load_ape_of(int i, int half) const {
    return load_shared_by_ctas<float, vector>(
        p.ape + (own_row() + i) * p.ape_stride + part.column + half * C::head_dim, has_row(i));
  }

  // The thread's first own row of a window.
  __device__ __forceinline__ int own_row() const { return C::overlap ? 0 : part.first_row; }
  __device__ __forceinline__ bool has_row(int i) const { return even || (own_rows >> i & 1); }

  static __device__ constexpr int offset(int row, int half, int which) {
    return row * row_bytes + (half * 2 + which) * C::threads * int(sizeof(Raw));
  }
  __device__ __forceinline__ Raw raw(int stage, int row, int half, int which) const {
    return *reinterpret_cast<const Raw*>(memory + stage * stage_bytes + offset(row, half, which) +
                                         threadIdx.x * sizeof(Raw));
  }
  // Every warp has its own.
  __device__ __forceinline__ int4* window_in(int stage) const {
    return reinterpret_cast<int4*>(memory + C::stages * stage_bytes) +
           (stage * warps + int(threadIdx.x / 32)) * 2;
  }
  __device__ __forceinline__ float* partials(int buffer) const {
    return reinterpret_cast<float*>(memory + C::stages * (stage_bytes + window_bytes)) +
           buffer * 3 * plane;
  }
  // Pages of KV and score of the thread's rows.
  __device__ __forceinline__ int2* pages(int stage) const {
    return reinterpret_cast<int2*>(memory + C::stages * (stage_bytes + window_bytes) + partial_bytes +
                                   stage * page_bytes) +
           threadIdx.x / lanes;
  }
  __device__ __forceinline__ CtaBarrier barrier() const {
    return CtaBarrier(memory + shared_bytes - CtaBarrier::bytes);
  }

  // ---- Fetching ---------------------------------------------------------------------------------

  // Starts the copies of a window's rows, and of the pages of those that are to be stored.
  __device__ __forceinline__ void fetch(int stage, const StreamWindow& window) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      window_in(stage)[0] = make_int4(window.first_row, window.request, window.number, window.target);
      window_in(stage)[1] = make_int4(window.stored, window.lead, 0, 0);
    }
    __syncwarp();
    const kv_dtype* from = static_cast<const kv_dtype*>(p.kv_score) +
                           int64(window.first_row + own_row()) * p.kv_score_stride + copy_column;
    const uint32 to = copy_at + stage * stage_bytes;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (has_row(i)) {
        copy_part(to + offset(i, 0, 0), from);
        if (parts > 1 && !window.lead) copy_part(to + offset(i, parts - 1, 0), from + C::head_dim);
      }
      from += p.kv_score_stride;
    }
    if (own_row() < window.stored && threadIdx.x % lanes == 0) fetch_pages(stage, window);
  }

  // KV and score of one row, in head_dim columns.
  static __device__ __forceinline__ void copy_part(uint32 to, const kv_dtype* from) {
    if constexpr (copies_in_pairs) {
      copy_async<16>(to, from);
    } else {
      constexpr int bytes = min_of(16, int(sizeof(Raw)));
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int i = 0; i < int(sizeof(Raw)); i += bytes)
          copy_async<bytes>(to + which * C::threads * int(sizeof(Raw)) + i,
                            reinterpret_cast<const char*>(from + which * State::state_dim) + i);
    }
  }

  __device__ __forceinline__ void fetch_pages(int stage, const StreamWindow& window) const {
    const int position = window.number * C::compress_ratio + own_row();
    if (!on_one_page(position)) return;
    const int logical = state.logical_page(position);
    int2* to = pages(stage);
    if (logical >= p.max_pages) *to = make_int2(-1, -1);
    if (logical >= p.max_pages) return;
    copy_async<4>(shared_address(&to->x),
                  p.block_table_kv + window.request * p.block_table_kv_stride + logical);
    copy_async<4>(shared_address(&to->y),
                  p.block_table_score + window.request * p.block_table_score_stride + logical);
  }

  __device__ __forceinline__ bool on_one_page(int position) const {
    return state.logical_page(position) == state.logical_page(position + rows - 1);
  }

  // ---- Storing ----------------------------------------------------------------------------------

  // Takes the window in a stage; `before` is the stage of the window before it.
  __device__ __forceinline__ void take(int stage, int before) {
    __syncwarp();  // rows and pages that another thread has copied
    const int4 a = window_in(stage)[0], b = window_in(stage)[1];
    const StreamWindow window = {a.x, a.y, a.z, a.w, b.x, b.y};
    uint32 present = own_rows;
    if (window.stored > 0) present &= store(window, stage);
    if (window.target >= 0) {
      const bool all = even && (C::overlap ? present & before_present : present) == all_rows;
      Partial result[vector];
      if (__all_sync(all_lanes, all)) reduce<true>(stage, before, present, result);
      else reduce<false>(stage, before, present, result);
      write(window.target, result);
    }
    before_present = present;
  }

  // Stores the thread's rows that are to be stored. Returns which rows are present: those that have a
  // page, and those that are not to be stored.
  __device__ __forceinline__ uint32 store(const StreamWindow& window, int stage) const {
    const int count = min_of(window.stored - own_row(), rows);
    if (count <= 0) return all_rows;
    const int position = window.number * C::compress_ratio + own_row();
    const bool stores = p.stores && !window.lead;
    if (!on_one_page(position)) return store_scattered(window, position, count, stores, stage);
    const int2 page = *pages(stage);
    const StateRow first =
        state.on_pages(page.x, page.y, position - state.logical_page(position) * p.page_size);
    if (!first.present) return all_rows << 1 << (count - 1);
    auto* kv = state.kv_at(first, part.column);
    auto* score = state.score_at(first, part.column);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (stores && i < count) {
#pragma unroll
        for (int half = 0; half < parts; ++half)
          store_part(kv + half * C::head_dim, score + half * C::head_dim, stage, i, half,
                     ape[i][half]);
      }
      kv += p.paged_kv_slot_stride;
      score += p.paged_score_slot_stride;
    }
    return all_rows;
  }

  // The rows are on several pages.
  __device__ __forceinline__ uint32 store_scattered(const StreamWindow& window, int position,
                                                    int count, bool stores, int stage) const {
    Request request = {};
    request.index = window.request;
    uint32 present = all_rows;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const StateRow row = state.find(request, position + i, state.logical_page(position + i));
      if (!row.present) present &= ~(1u << i);
      if (!row.present || !stores) continue;
#pragma unroll
      for (int half = 0; half < parts; ++half) {
        const int column = part.column + half * C::head_dim;
        store_part(state.kv_at(row, column), state.score_at(row, column), stage, i, half,
                   load_ape_of(i, half));
      }
    }
    return present;
  }

  __device__ __forceinline__ void store_part(typename C::state_dtype* kv,
                                             typename C::state_dtype* score, int stage, int row,
                                             int half, const Ape& row_ape) const {
    store_streaming(kv, kv_of(stage, row, half));
    Columns rounded;
    New::round_score(raw(stage, row, half, 1), row_ape, rounded);
    store_streaming(score, rounded);
  }

  __device__ __forceinline__ Columns kv_of(int stage, int row, int half) const {
    return New::round_kv(raw(stage, row, half, 0));
  }

  // ---- Reducing ---------------------------------------------------------------------------------

  // The rows of one leaf that the thread has: with an overlap, those of the window before come first.
  template <bool all_present>
  struct LeafRows {
    const WindowStream& stream;
    int stage, before;
    uint32 present;  // of the leaf's rows

    int first;       // of the leaf's rows, among the thread's rows of both windows

    __device__ __forceinline__ bool is_before(int i) const {
      return C::overlap && first + i < C::compress_ratio;
    }
    __device__ __forceinline__ int own(int i) const {
      return first + i - (C::overlap && !is_before(i) ? C::compress_ratio : 0);
    }
    __device__ __forceinline__ int stage_of(int i) const { return is_before(i) ? before : stage; }
    __device__ __forceinline__ int half_of(int i) const { return C::overlap && !is_before(i); }
    __device__ __forceinline__ bool exists(int i) const {
      return all_present || (own(i) < rows && (present >> i & 1));
    }

    __device__ __forceinline__ Columns kv_of(int i) const {
      if (!exists(i)) return every_column<typename C::state_dtype, vector>(0.0f);
      return stream.kv_of(stage_of(i), own(i), half_of(i));
    }

    __device__ __forceinline__ Scores score_of(int i) const {
      using score_dtype = choose<C::ape_in_state, typename C::state_dtype, float>;
      if (!exists(i)) return every_column<score_dtype, vector>(minus_infinity());
      const Ape& ape = stream.ape[own(i)][half_of(i)];
      Columns stored;
      New::round_score(stream.raw(stage_of(i), own(i), half_of(i), 1), ape, stored);
      if constexpr (C::ape_in_state) return stored;
      else return New::add_ape(stored, ape);
    }
  };

  template <bool all_present>
  __device__ __forceinline__ void reduce(int stage, int before, uint32 present,
                                         Partial (&result)[vector]) {
    const uint64 both =
        C::overlap ? before_present | uint64(present) << C::compress_ratio : uint64(present);
    LeafStack<C> stack;
#pragma unroll
    for (int leaf = 0; leaf < Shape::group_leaves; ++leaf) {
      constexpr uint32 leaf_mask = uint32((1ull << Shape::held_rows) - 1);
      const int first = leaf * Shape::held_rows;
      LeafRows<all_present> leaf_rows{*this, stage, before, uint32(both >> first) & leaf_mask, first};
      Scores score[Shape::held_rows];
#pragma unroll
      for (int i = 0; i < Shape::held_rows; ++i) score[i] = leaf_rows.score_of(i);
      WindowReduce<C>::reduce_leaf(score, leaf_rows, all_present || leaf_rows.present, result);
      stack.push(leaf, result);
    }
    WindowReduce<C>::reduce_warp(result);
  }

  __device__ __forceinline__ void write(int target, const Partial (&result)[vector]) {
    if constexpr (C::reduce_warps == 1) {
      output.expect(target);
      output.begin_row();
      if (part.group == 0) output.write_columns(target, part.column, result);
      output.end_row(target);
    } else {
      join_pending();
      if (part.leads_warp()) {
        float* mine = partials(parity) + part.warp() * partial_row + part.lane_column;
#pragma unroll
        for (int v = 0; v < vector; ++v) {
          mine[v] = result[v].max;
          mine[v + plane] = result[v].sum;
          mine[v + 2 * plane] = result[v].weighted;
        }
      }
      barrier().arrive();
      joined_target = target;
      parity ^= 1;
    }
  }

  // Joins the results of the last window that was reduced, if that has not been done.
  __device__ __forceinline__ void join_pending() {
    if (C::reduce_warps == 1 || joined_target < 0) return;
    output.expect(joined_target);
    barrier().wait(parity ^ 1);
    output.begin_row();
    join_warps(joined_target, partials(parity ^ 1));
    output.end_row(joined_target);
    joined_target = -1;
  }

  // Neighbouring threads share the partials of a column.
  __device__ __forceinline__ void join_warps(int target, const float* buffer) const {
    constexpr int threads = min_of(C::reduce_warps, max_of(1, C::threads / C::head_slice));
    constexpr int share = C::reduce_warps / threads;
    constexpr int columns = C::threads / threads;  // at once
#pragma unroll
    for (int first = 0; first < C::head_slice; first += columns) {
      const int local = first + int(threadIdx.x) / threads;
      const bool exists = C::head_slice % columns == 0 || local < C::head_slice;
      Partial parts_of[share];
#pragma unroll
      for (int i = 0; i < share; ++i) {
        const int warp = int(threadIdx.x) % threads * share + i;
        const float* from = buffer + warp * partial_row + (exists ? local : 0);
        parts_of[i] = {from[0], from[plane], from[2 * plane]};
      }
      Partial result = combine_all<share>(parts_of);
#pragma unroll
      for (int distance = 1; distance < threads; distance *= 2) {
        Partial other;
        other.max = __shfl_xor_sync(all_lanes, result.max, distance);
        other.sum = __shfl_xor_sync(all_lanes, result.sum, distance);
        other.weighted = __shfl_xor_sync(all_lanes, result.weighted, distance);
        result = combine(result, other);
      }
      if (exists && threadIdx.x % threads == 0)
        output.write_column(target, part.column - part.lane_column + local, finish(result));
    }
  }
};
