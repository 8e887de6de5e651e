// Where rows are in the paged state.
#pragma once
#include "device/memory.cuh"
#include "device/request.cuh"

// The row of one position in the two pools. It is absent if either page is out of range.
struct StateRow {
  int page_kv, page_score, slot;
  bool present;
};

// Finds rows of the state. C is a config struct; its Params has the pools' members.
template <class C>
struct StateRows {
  using Params = typename C::Params;
  using state_dtype = typename C::state_dtype;

  static constexpr int vector = 16 / int(sizeof(state_dtype));  // columns in 16 bytes of state
  static constexpr int state_dim = C::head_dim * (C::overlap ? 2 : 1);
  using Columns = Vec<state_dtype, vector>;

  const Params& p;

  // position / page_size for 0 <= position < 2^31: a multiplication costs less than a division.
  __device__ __forceinline__ int logical_page(int position) const {
    return int(uint64(uint32(position)) * p.page_multiplier >> p.page_shift);
  }

  // Looks the page up in both block tables.
  __device__ __forceinline__ StateRow find(const Request& request, int position,
                                           int logical) const {
    const bool in_table = logical < p.max_pages;
    const int page_kv = load_int(
        p.block_table_kv + request.index * p.block_table_kv_stride + logical, in_table, -1);
    const int page_score = load_int(
        p.block_table_score + request.index * p.block_table_score_stride + logical, in_table, -1);
    return on_pages(page_kv, page_score,
                    int(uint32(position) - uint32(logical) * uint32(p.page_size)));
  }

  // The row in a slot of two physical pages.
  __device__ __forceinline__ StateRow on_pages(int page_kv, int page_score, int slot) const {
    const bool present =
        uint32(page_kv) < uint32(p.num_pages) && uint32(page_score) < uint32(p.num_pages);
    return {page_kv, page_score, slot, present};
  }

  // Looks up N consecutive positions from `first` on. Those from `count` on, and those before the
  // sequence, are absent. One lookup serves all rows if they are on one page.
  template <int N>
  __device__ __forceinline__ void find_rows(const Request& request, int first, int count,
                                            StateRow (&rows)[N]) const {
    const int last = first + min_of(count, N) - 1;
    const int logical = logical_page(first);
    const bool on_one_page = first >= 0 && last >= first && logical == logical_page(last);
    if (on_one_page) {
      const StateRow found = find(request, first, logical);
#pragma unroll
      for (int i = 0; i < N; ++i)
        rows[i] = {found.page_kv, found.page_score, found.slot + i, found.present && i < count};
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool exists = i < count && first + i >= 0;
        rows[i] = find(request, first + i, exists ? logical_page(first + i) : p.max_pages);
      }
    }
  }

  __device__ __forceinline__ state_dtype* kv_at(const StateRow& row, int column) const {
    return static_cast<state_dtype*>(p.paged_kv) + row.page_kv * p.paged_kv_page_stride +
           row.slot * p.paged_kv_slot_stride + column;
  }

  __device__ __forceinline__ state_dtype* score_at(const StateRow& row, int column) const {
    return static_cast<state_dtype*>(p.paged_score) + row.page_score * p.paged_score_page_stride +
           row.slot * p.paged_score_slot_stride + column;
  }
};
