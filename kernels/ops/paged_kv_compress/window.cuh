// Reduces windows: one CTA, a slice of the columns, one window after the other.
//
// The way of a window: locate -> fetch, every thread its own rows and columns, all in flight at once
// -> accept, the new rows -> reduce_leaf -> the tree, in a thread, in a warp, over the warps.
#pragma once
#include "paged_kv_compress/state.cuh"

namespace paged_kv_compress {

__device__ constexpr int power_of_two_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

__device__ constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

template <class C>
struct Window {
  using state = State<C>;
  using state_t = typename C::state_t;
  using Columns = typename state::Columns;
  using NewColumns = typename state::NewColumns;
  static constexpr int vector = state::vector;

  // Columns: `lanes` threads make a slice.
  static constexpr int lanes = C::head_slice / vector;

  // Rows: threads that have the same columns are in different groups, each with its own quads. A
  // leaf stays within a warp; where there are more warps or groups than rows, the last are idle.
  static constexpr int window_rows = C::compress_ratio * (C::overlap ? 2 : 1);
  static constexpr int quads = power_of_two_at_least((window_rows + quad_rows - 1) / quad_rows);
  static constexpr int leaf_quads = min_of(quads, max_leaf_quads);
  static constexpr int warp_groups = max_of(1, 32 / lanes);
  static constexpr int warp_quads = max_of(leaf_quads, quads / C::reduce_warps);
  static constexpr int group_quads = max_of(1, warp_quads / warp_groups);
  static constexpr int group_leaves = max_of(1, group_quads / leaf_quads);
  static constexpr int held_quads = min_of(group_quads, leaf_quads);  // of one leaf, in a thread
  static constexpr int held_rows = held_quads * quad_rows;
  static constexpr uint32 all_rows = (1u << held_rows) - 1;
  static constexpr int leaf_groups = leaf_quads / held_quads;         // groups that share a leaf

  // More would take registers from CTAs that could run beside this one.
  static constexpr int arriving_at_once = max_of(1, 256 / int(sizeof(NewColumns)));

  // A thread holds a quad in registers; more, or what it fetches ahead, in shared memory, where all
  // CTAs together fit more. There also wait new rows that are fetched ahead.
  static constexpr bool in_registers = held_quads == 1 && !C::persistent;
  static constexpr int held_bytes = in_registers ? 0 : C::threads * held_rows * 2 * 16;
  static constexpr int new_columns = C::persistent ? C::next_n * lanes : 0;
  static constexpr int new_bytes = 2 * new_columns * int(sizeof(NewColumns));

  // The warps' partials lie in the slots, where these are free by then: what shared memory the CTAs
  // leave is L1, and the store is slow without. A persistent CTA has two sets, of which one may be
  // written while the other is read.
  static constexpr bool partials_in_slots = !in_registers && !C::persistent;
  static constexpr int partial_floats =
      C::reduce_warps > 1 && !partials_in_slots ? 3 * C::reduce_warps * C::head_slice : 0;
  static constexpr int partial_sets = C::persistent ? 2 : 1;
  static constexpr int shared_bytes = held_bytes + new_bytes + partial_sets * partial_floats * 4;

  static_assert(C::head_dim % C::head_slice == 0 && C::head_slice % vector == 0);
  static_assert(lanes % 32 == 0 || 32 % lanes == 0);
  static_assert(C::threads == C::reduce_warps * warp_groups * lanes);

  const Params& p;
  const state rows;
  int slice_start;  // the slice's first column
  int lane_column;  // this thread's first column, from slice_start
  int group;        // which threads this one shares its rows with
  int first_row;    // this thread's first row of a window; past the window if the group is idle
  Columns* slots;   // [held_rows][kv, score][threads] in shared memory, this thread's, with their
  uint32 slots_at;  // address; or
  Columns held[in_registers ? held_rows : 1][2];  // the same in registers
  // [2][next_n][lanes] in shared memory, this thread's lane. Which thread of a lane has a token's row
  // differs from window to window, so the next one's arrive in the other set: the barrier in
  // reduce_cta is then between a set's last reader and its next writer.
  NewColumns* arrivals;
  int arrival_set;
  float* partials;       // of three kinds, each as partial_at says, in shared memory

  __device__ __forceinline__ Window(const Params& params, uint4* shared, int slice)
      : p(params), rows{params} {
    slice_start = slice * C::head_slice;
    lane_column = int(threadIdx.x % lanes * vector);
    group = int(threadIdx.x / lanes);
    const int warp_quad = int(uint32(group) % warp_groups) * group_quads;
    first_row = warp_quad < warp_quads
                    ? (int(uint32(group) / warp_groups) * warp_quads + warp_quad) * quad_rows
                    : window_rows;
    char* bytes = reinterpret_cast<char*>(shared);
    slots = reinterpret_cast<Columns*>(bytes) + threadIdx.x;
    slots_at = shared_address(slots);
    // A lane's own value, which the compiler cannot know; else it works the address out anew for every
    // copy. The persistent schedule has no register for it.
    if constexpr (!in_registers && !C::persistent)
      slots_at = __shfl_sync(0xffffffffu, slots_at, threadIdx.x % 32);
    arrival_set = 0;
    arrivals = reinterpret_cast<NewColumns*>(bytes + held_bytes) + threadIdx.x % lanes;
    partials = reinterpret_cast<float*>(bytes + (partials_in_slots ? 0 : held_bytes + new_bytes));
  }

  // An overlapping window's rows are those of the window before it, then its own.
  static __device__ __forceinline__ bool is_own(int row) {
    return !C::overlap || row >= C::compress_ratio;
  }

  __device__ __forceinline__ int column_of(int row) const {
    return slice_start + lane_column + (C::overlap && is_own(row) ? C::head_dim : 0);
  }

  __device__ __forceinline__ Columns& slot(int row, int which) {
    if constexpr (in_registers) return held[row][which];
    else return slots[(row * 2 + which) * C::threads];
  }

  // This thread's rows of one of its leaves in a window.
  struct Leaf {
    int row;       // the first, in the window
    int position;  // and in the sequence
    bool one_page; // as nearly always, and then
    Place place;   // where the first lies
  };

  __device__ __forceinline__ Leaf locate(const Request& request, int window, int leaf) const {
    Leaf found;
    found.row = first_row + leaf * held_rows;
    found.position = (window - int(C::overlap)) * C::compress_ratio + found.row;
    const int page = rows.logical_page(found.position);
    found.one_page = found.position >= 0 && found.row + held_rows <= window_rows &&
                     page == rows.logical_page(found.position + held_rows - 1);
    if (found.one_page) found.place = rows.find(request, found.position, page);
    return found;
  }

  // What of a leaf is on its way.
  struct Fetched {
    bool any_present;
    uint32 arriving;  // bit i: row i comes from kv_score
    int token;        // row 0's number among the request's new tokens, negative for an older one
    int arrival_set;  // where they arrive
  };

  // Brings a leaf's rows on their way to the slots: old ones from the state, new ones from
  // kv_score; absent ones are (0, -inf).
  __device__ __forceinline__ Fetched fetch(const Request& request, const Leaf& leaf) {
    arrival_set ^= 1;
    Fetched fetched{leaf.one_page && leaf.place.present, 0, leaf.position - request.start,
                    arrival_set};
    if (fetched.any_present) {
      const int old_rows = -fetched.token;
      const state_t* kv = rows.kv_at(leaf.place, slice_start + lane_column);
      const state_t* score = rows.score_at(leaf.place, slice_start + lane_column);
#pragma unroll
      for (int i = 0; i < held_rows; ++i) {
        const int own = C::overlap && is_own(leaf.row + i) ? C::head_dim : 0;
        fetch_old(i, 0, kv + i * p.paged_kv_slot_stride + own, i < old_rows);
        fetch_old(i, 1, score + i * p.paged_score_slot_stride + own, i < old_rows);
      }
      fetched.arriving = all_rows & ~0u << min_of(max_of(old_rows, 0), held_rows);
    } else {
      fetch_scattered(request, leaf, fetched);
    }
    if (fetched.arriving) {
      wait_for_predecessor();
      if constexpr (C::persistent) copy_new(request, leaf, fetched);
      else load_new(request, leaf, fetched);
    }
    return fetched;
  }

  // The same for rows on several pages or on none.
  __device__ __forceinline__ void fetch_scattered(const Request& request, const Leaf& leaf,
                                                  Fetched& fetched) {
#pragma unroll 1
    for (int quad = 0; quad < held_rows; quad += quad_rows) {
      const auto at = rows.template find_rows<quad_rows>(
          request, leaf.position + quad, window_rows - leaf.row - quad,
          [&](int i) { return column_of(leaf.row + quad + i); });
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) {
        const bool is_new = fetched.token + quad + i >= 0;
        const int row = in_registers ? i : quad + i;  // registers need an index known here
        fetch_old(row, 0, at.kv[i], at.present[i] && !is_new);
        fetch_old(row, 1, at.score[i], at.present[i] && !is_new);
        fetched.any_present |= at.present[i];
        if (at.present[i] && is_new) fetched.arriving |= 1u << (quad + i);
        if (!at.present[i]) {
          slot(row, 0) = every_column<state_t, vector>(0.0f);
          slot(row, 1) = every_column<state_t, vector>(minus_infinity());
        }
      }
    }
  }

  __device__ __forceinline__ void fetch_old(int row, int which, const state_t* from, bool exists) {
    if constexpr (in_registers) held[row][which] = load<state_t, vector>(from, exists);
    else if (exists) copy_async<16>(slots_at + (row * 2 + which) * C::threads * 16, from);
  }

  __device__ __forceinline__ NewColumns& arrival(const Fetched& fetched, int i) {
    return arrivals[fetched.arrival_set * new_columns + (fetched.token + i) * lanes];
  }

  // Where row i of a leaf lies in kv_score and ape; of all rows as if they were new.
  __device__ __forceinline__ auto find_new(const Request& request, const Leaf& leaf, int i) const {
    const int row = leaf.row + i;
    const int phase = C::overlap && is_own(row) ? row - C::compress_ratio : row;
    return rows.find_new(request, leaf.position + i - request.start, phase, column_of(row));
  }

  // What arrives: arriving_at_once rows are on their way before the first is waited for. At next_n 4
  // that is all of them, but of fp32 rows for bf16 state.
  __device__ __forceinline__ void load_new(const Request& request, const Leaf& leaf,
                                           const Fetched& fetched) {
    if constexpr (!in_registers) load_to_shared(request, leaf, fetched);
    else if constexpr (state::same_type) load_in_place(request, leaf, fetched);
    else load_and_round(request, leaf, fetched);
  }

  // Finds the rows as they are; registers need an index known to the compiler.
  __device__ __forceinline__ void load_to_shared(const Request& request, const Leaf& leaf,
                                                 const Fetched& fetched) {
    constexpr int at_once = min_of(C::next_n, arriving_at_once);
#pragma unroll 1
    for (uint32 left = fetched.arriving; left;) {
      const int first = __ffs(left) - 1;
      NewColumns columns[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        columns[i] = state::load_new(find_new(request, leaf, first + i), left >> (first + i) & 1);
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (left >> (first + i) & 1)
          state::round_new(columns[i], slot(first + i, 0), slot(first + i, 1));
      left &= ~0u << first << at_once;
    }
  }

  // As they come, in the registers where they are to be, so that only ape takes others.
  __device__ __forceinline__ void load_in_place(const Request& request, const Leaf& leaf,
                                                const Fetched& fetched) {
    Vec<float, vector> ape[held_rows];
#pragma unroll
    for (int i = 0; i < held_rows; ++i) {
      const bool arrives = fetched.arriving >> i & 1;
      const auto from = find_new(request, leaf, i);
      load_over(slot(i, 0), from.kv, arrives);
      load_over(slot(i, 1), from.score, arrives);
      ape[i] = load<float, vector>(from.ape, arrives);
    }
#pragma unroll
    for (int i = 0; i < held_rows; ++i)
      if (fetched.arriving >> i & 1) state::add_ape(slot(i, 1), ape[i], slot(i, 1));
  }

  __device__ __forceinline__ void load_and_round(const Request& request, const Leaf& leaf,
                                                 const Fetched& fetched) {
    constexpr int at_once = min_of(held_rows, arriving_at_once);
#pragma unroll
    for (int first = 0; first < held_rows; first += at_once) {
      if (at_once < held_rows && !(fetched.arriving >> first & ((1u << at_once) - 1))) continue;
      NewColumns columns[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        columns[i] = state::load_new(find_new(request, leaf, first + i),
                                     fetched.arriving >> (first + i) & 1);
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (fetched.arriving >> (first + i) & 1)
          state::round_new(columns[i], slot(first + i, 0), slot(first + i, 1));
    }
  }

  __device__ __forceinline__ void copy_new(const Request& request, const Leaf& leaf,
                                           const Fetched& fetched) {
#pragma unroll
    for (int i = 0; i < held_rows; ++i) {
      if (!(fetched.arriving >> i & 1)) continue;
      const auto from = find_new(request, leaf, i);
      NewColumns& to = arrival(fetched, i);
      copy_async<sizeof(to.kv)>(shared_address(&to.kv), from.kv);
      copy_async<sizeof(to.score)>(shared_address(&to.score), from.score);
      copy_async<sizeof(to.ape)>(shared_address(&to.ape), from.ape);
    }
  }

  // Ends the wait for what was fetched, and puts what the state holds of new rows in their slots.
  __device__ __forceinline__ void accept(const Fetched& fetched) {
    if constexpr (!in_registers) wait_for_copies();
    if constexpr (C::persistent) {
      if (!fetched.arriving) return;
#pragma unroll
      for (int i = 0; i < held_rows; ++i)
        if (fetched.arriving >> i & 1)
          state::round_new(arrival(fetched, i), slot(i, 0), slot(i, 1));
    }
  }

  // The leaf in the slots, with what the groups that share it have of it.
  __device__ __forceinline__ void reduce_leaf(bool any_present, Partial (&result)[vector]) {
    Columns score[held_rows];
#pragma unroll
    for (int i = 0; i < held_rows; ++i) score[i] = slot(i, 1);
    Columns highest = score[0];
#pragma unroll
    for (int i = 1; i < held_rows; ++i) highest = max_columns(highest, score[i]);
#pragma unroll
    for (int distance = lanes; distance < lanes * leaf_groups; distance *= 2) {
      any_present |= bool(__shfl_xor_sync(0xffffffffu, int(any_present), distance));
      Columns other;
#pragma unroll
      for (int i = 0; i < Columns::words; ++i)
        other.word[i] = __shfl_xor_sync(0xffffffffu, highest.word[i], distance);
      highest = max_columns(highest, other);
    }
    float max[vector];
#pragma unroll
    for (int v = 0; v < vector; ++v) max[v] = fmaxf(column(highest, v), lowest);

    Partial quad[held_quads][vector];
#pragma unroll
    for (int q = 0; q < held_quads; ++q) {
      Columns kv[quad_rows];
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) kv[i] = slot(q * quad_rows + i, 0);
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
      if constexpr (held_quads == 1) result[v] = quad[0][v];
      if constexpr (held_quads == 2) result[v] = add(quad[0][v], quad[1][v]);
      if constexpr (held_quads == 4)
        result[v] = add(add(quad[0][v], quad[1][v]), add(quad[2][v], quad[3][v]));
    }
#pragma unroll
    for (int distance = lanes; distance < lanes * leaf_groups; distance *= 2) {
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        Partial other = result[v];
        other.sum = __shfl_xor_sync(0xffffffffu, other.sum, distance);
        other.weighted = __shfl_xor_sync(0xffffffffu, other.weighted, distance);
        result[v] = add(result[v], other);
      }
    }
#pragma unroll
    for (int v = 0; v < vector; ++v)
      if (!any_present) result[v].max = minus_infinity();
  }

  static __device__ __forceinline__ void combine_columns(Partial (&left)[vector],
                                                         const Partial (&right)[vector]) {
#pragma unroll
    for (int v = 0; v < vector; ++v) left[v] = combine(left[v], right[v]);
  }

  // The subtree over one warp's groups; every lane gets it.
  __device__ __forceinline__ void reduce_warp(Partial (&result)[vector]) {
#pragma unroll
    for (int distance = lanes * leaf_groups; distance < 32; distance *= 2) {
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        Partial other;
        other.max = __shfl_xor_sync(0xffffffffu, result[v].max, distance);
        other.sum = __shfl_xor_sync(0xffffffffu, result[v].sum, distance);
        other.weighted = __shfl_xor_sync(0xffffffffu, result[v].weighted, distance);
        result[v] = combine(result[v], other);
      }
    }
  }

  __device__ __forceinline__ void write_output(int64 row, int local_column, float value) const {
    const int64 at = row * p.output_stride + slice_start + local_column;
    if (p.output_is_bf16) {
      static_cast<unsigned short*>(p.output)[at] =
          static_cast<unsigned short>(round_pair_to_bf16(value, 0.0f));
    } else {
      static_cast<float*>(p.output)[at] = value;
    }
  }

  // Where a warp's partial of a column is among those of one kind. In the slots every thread writes
  // only where its own rows were, four columns to 16 bytes.
  static __device__ __forceinline__ int partial_at(int warp, int local_column) {
    if constexpr (partials_in_slots) {
      const int thread = warp * warp_groups * lanes + local_column / vector;
      return (local_column % vector / 4 * C::threads + thread) * 4 + local_column % 4;
    } else {
      return warp * C::head_slice + local_column;
    }
  }

  // The top of the tree, over the warps that share the window, and the output row.
  __device__ __forceinline__ void reduce_cta(const Partial (&result)[vector], int64 output_row,
                                             bool writes) {
    if constexpr (C::reduce_warps == 1) {
      if (writes && group == 0) {
        wait_for_predecessor();
#pragma unroll
        for (int v = 0; v < vector; ++v)
          write_output(output_row, lane_column + v, finish(result[v]));
      }
    } else {
      constexpr int plane = partials_in_slots ? C::threads * vector : C::reduce_warps * C::head_slice;
      if (uint32(group) % warp_groups == 0) {
#pragma unroll
        for (int v = 0; v < vector; ++v) {
          float* mine = partials + partial_at(uint32(group) / warp_groups, lane_column + v);
          mine[0] = result[v].max;
          mine[plane] = result[v].sum;
          mine[2 * plane] = result[v].weighted;
        }
      }
      __syncthreads();
      if (!writes) return;
      wait_for_predecessor();
      for (int local = threadIdx.x; local < C::head_slice; local += C::threads) {
        Partial part[C::reduce_warps];
#pragma unroll
        for (int w = 0; w < C::reduce_warps; ++w) {
          const float* its = partials + partial_at(w, local);
          part[w] = {its[0], its[plane], its[2 * plane]};
        }
        write_output(output_row, local, finish(combine_all<C::reduce_warps>(part)));
      }
    }
  }
};

}  // namespace paged_kv_compress
