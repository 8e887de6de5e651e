// Fetches the rows of a window: old rows from the state, new rows from kv_score.
//
// New rows are taken from kv_score, so a window never waits for the store of its own new rows. Old
// rows, at positions before the request's first new token, are written by no thread of this launch.
#pragma once
#include "device/held_rows.cuh"
#include "device/store_rule.cuh"
#include "device/stream_order.cuh"

template <class C>
struct LeafFetch {
  using Params = typename C::Params;
  using Shape = WindowShape<C>;
  using Held = HeldRows<C>;
  using New = NewRows<C>;
  using State = StateRows<C>;
  using state_dtype = typename C::state_dtype;

  // New rows whose loads, of ape too, are issued before the first is waited for. More would take
  // registers that other CTAs of the SM could have.
  static constexpr int new_rows_at_once =
      max_of(1, (Held::in_registers ? 128 : 256) /
                    int(sizeof(typename New::Columns) + sizeof(typename New::Ape)));
  static constexpr uint32 all_rows = (1u << Shape::held_rows) - 1;

  const Params& p;
  const State state;
  const Request& request;
  const ThreadPart<C>& part;
  Held& held;

  int row;       // of the window, the leaf's first row that this thread holds
  int position;  // of that row in the sequence
  int token;     // its number among the request's new tokens; negative for an old row
  uint32 present = 0;   // bit i: row i is present
  uint32 new_rows = 0;  // bit i: row i is present and comes from kv_score

  __device__ __forceinline__ LeafFetch(const Params& params, const Request& r,
                                       const ThreadPart<C>& thread_part, Held& held_rows,
                                       int window, int leaf)
      : p(params), state{params}, request(r), part(thread_part), held(held_rows) {
    row = part.first_row + leaf * Shape::held_rows;
    position = (window - int(C::overlap)) * C::compress_ratio + row;
    token = position - request.start;
  }

  // Issues the loads of old rows. They have arrived after held.wait(). Calls `meanwhile` once pages have
  // been looked up, before rows are loaded.
  template <class Meanwhile>
  __device__ __forceinline__ void start_old(const Meanwhile& meanwhile) {
    const int logical = state.logical_page(position);
    const bool on_one_page = position >= 0 && row + Shape::held_rows <= Shape::rows &&
                             logical == state.logical_page(position + Shape::held_rows - 1);
    StateRow first;
    if (on_one_page) first = state.find(request, position, logical);
    meanwhile();
    if (on_one_page && first.present) load_page(first);
    else load_scattered();
  }

  // Loads new rows.
  __device__ __forceinline__ void load_new() {
    if (!new_rows) return;
    wait_for_predecessor();
    if constexpr (!Held::in_registers) load_new_to_shared();
    else if constexpr (New::same_dtype) load_new_in_place();
    else load_new_and_round();
  }

  // All rows are on one page, as nearly always: one lookup, then plain pointers.
  __device__ __forceinline__ void load_page(const StateRow& first) {
    if (p.prefetch < prefetch_state) wait_for_predecessor();
    present = all_rows;
    const int old_rows = -token;
    const state_dtype* kv = state.kv_at(first, part.column);
    const state_dtype* score = state.score_at(first, part.column);
#pragma unroll
    for (int i = 0; i < Shape::held_rows; ++i) {
      const int own = Shape::state_column(row + i, 0);
      held.start_load(i, Held::kv, kv + i * p.paged_kv_slot_stride + own, i < old_rows);
      held.start_load(i, Held::score, score + i * p.paged_score_slot_stride + own, i < old_rows);
    }
    new_rows = all_rows & ~0u << min_of(max_of(old_rows, 0), Shape::held_rows);
  }

  // The rows are on several pages, partly outside the sequence, or absent.
  __device__ __forceinline__ void load_scattered() {
#pragma unroll 1
    for (int quad = 0; quad < Shape::held_rows; quad += quad_rows) {
      StateRow found[quad_rows];
      state.find_rows(request, position + quad, Shape::rows - row - quad, found);
      if (p.prefetch < prefetch_state) wait_for_predecessor();
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) {
        const bool is_new = token + quad + i >= 0;
        // A new row that is not to be stored needs no page.
        const bool exists = found[i].present || (is_new && !needs_page(quad + i));
        const int column = Shape::state_column(row + quad + i, part.column);
        const int slot = Held::in_registers ? i : quad + i;  // registers need a constant index
        const bool is_old = found[i].present && !is_new;
        held.start_load(slot, Held::kv, state.kv_at(found[i], column), is_old);
        held.start_load(slot, Held::score, state.score_at(found[i], column), is_old);
        if (exists) present |= 1u << (quad + i);
        if (exists && is_new) new_rows |= 1u << (quad + i);
        if (!exists) held.set_absent(slot);
      }
    }
  }

  // Whether new row i is one that is stored.
  __device__ __forceinline__ bool needs_page(int i) const {
    if (StoreRule<C>::every_row || row + i >= Shape::rows) return true;
    const int window = int(uint32(position + i) / C::compress_ratio);
    return position + i - window * C::compress_ratio <
           StoreRule<C>(p, request).stored_rows(window);
  }

  __device__ __forceinline__ bool is_new(int i) const { return new_rows >> i & 1; }

  __device__ __forceinline__ typename New::Source find_new(int i) const {
    return New::find(p, request, token + i, Shape::phase(row + i),
                     Shape::state_column(row + i, part.column));
  }

  // Only the rows that are new, from the first one on.
  __device__ __forceinline__ void load_new_to_shared() {
    constexpr int at_once = min_of(C::next_n, new_rows_at_once);
#pragma unroll 1
    for (uint32 left = new_rows; left;) {
      const int first = __ffs(left) - 1;
      typename New::Columns columns[at_once];
      typename New::Ape ape[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const auto from = find_new(first + i);
        columns[i] = New::load_columns(from, left >> (first + i) & 1);
        ape[i] = New::load_ape(from, left >> (first + i) & 1);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (left >> (first + i) & 1)
          New::round(columns[i], ape[i], held.at(first + i, Held::kv),
                     held.at(first + i, Held::score));
      left &= ~0u << first << at_once;
    }
  }

  // The dtypes are equal: rows are loaded into the registers that hold them, only ape takes others. Ape
  // of more than two rows at once would take registers that other CTAs of the SM could have.
  __device__ __forceinline__ void load_new_in_place() {
    constexpr int at_once = min_of(Shape::held_rows, 2);
#pragma unroll
    for (int i = 0; i < Shape::held_rows; ++i) {
      const auto from = find_new(i);
      load_over(held.at(i, Held::kv), from.kv, is_new(i));
      load_over(held.at(i, Held::score), from.score, is_new(i));
    }
    if constexpr (C::ape_in_state) {
#pragma unroll
      for (int first = 0; first < Shape::held_rows; first += at_once) {
        typename New::Ape ape[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i)
          ape[i] = New::load_ape(find_new(first + i), is_new(first + i));
#pragma unroll
        for (int i = first; i < first + at_once; ++i)
          if (is_new(i))
            New::round_score(held.at(i, Held::score), ape[i - first], held.at(i, Held::score));
      }
    }
  }

  // The register that is to hold a score holds ape first, if it is as wide.
  __device__ __forceinline__ void load_new_and_round() {
    constexpr int at_once = min_of(Shape::held_rows, new_rows_at_once);
    constexpr bool ape_in_place = is_same<typename New::Ape, typename State::Columns>;
#pragma unroll
    for (int first = 0; first < Shape::held_rows; first += at_once) {
      if (at_once < Shape::held_rows && !(new_rows >> first & ((1u << at_once) - 1))) continue;
      typename New::Columns columns[at_once];
      typename New::Ape ape[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const auto from = find_new(first + i);
        columns[i] = New::load_columns(from, is_new(first + i));
        if constexpr (ape_in_place)
          load_over(held.at(first + i, Held::score), from.ape, is_new(first + i) && C::ape_in_state);
        else
          ape[i] = New::load_ape(from, is_new(first + i));
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if constexpr (ape_in_place) ape[i] = held.at(first + i, Held::score);
        if (is_new(first + i))
          New::round(columns[i], ape[i], held.at(first + i, Held::kv),
                     held.at(first + i, Held::score));
      }
    }
  }

  // The scores of the held rows, with ape, once they have arrived.
  using Scores = choose<C::ape_in_state, typename State::Columns, Vec<float, Shape::vector>>;
  __device__ __forceinline__ void scores(Scores (&score)[Shape::held_rows]) {
    if constexpr (C::ape_in_state) {
#pragma unroll
      for (int i = 0; i < Shape::held_rows; ++i) score[i] = held.at(i, Held::score);
    } else {
      wait_for_predecessor();
#pragma unroll
      for (int i = 0; i < Shape::held_rows; ++i)
        score[i] = load_shared_by_ctas<float, Shape::vector>(find_new(i).ape, present >> i & 1);
#pragma unroll
      for (int i = 0; i < Shape::held_rows; ++i)
        score[i] = present >> i & 1 ? New::add_ape(held.at(i, Held::score), score[i])
                                    : every_column<float, Shape::vector>(minus_infinity());
    }
  }
};
