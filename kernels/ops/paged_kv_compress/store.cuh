// Stores the new tokens' rows in the paged state.
#pragma once
#include "paged_kv_compress/state.cuh"

namespace paged_kv_compress {

template <class C>
struct Store {
  using state = State<C>;
  static constexpr int vector = state::vector;
  static constexpr int row_vecs = state::state_dim / vector;
  static constexpr int rows_at_once = min_of(C::next_n, state::new_at_once);

  // Item `item` of all: one vector of each of a request's new rows or, by token, of just one.
  static __device__ __forceinline__ void store(const Params& p, uint32 item) {
    const state rows{p};
    const int column = int(item % row_vecs) * vector;
    const uint32 share = item / row_vecs;
    const uint32 index = p.store_by_token ? share / C::next_n : share;
    Request request;
    if (index >= uint32(p.batch) || !load_request<C>(p, int(index), request)) return;
    const int begin = p.store_by_token ? int(share % C::next_n) : 0;
    const int end = p.store_by_token ? min_of(begin + 1, request.new_tokens) : request.new_tokens;
    if (begin >= end) return;
    wait_for_predecessor();
    for (int first = begin; first < end; first += rows_at_once) {
      const int count = end - first;
      typename state::NewColumns columns[rows_at_once];
#pragma unroll
      for (int i = 0; i < rows_at_once; ++i) {
        const int phase = int(uint32(request.start + first + i) % C::compress_ratio);
        columns[i] = state::load_new(rows.find_new(request, first + i, phase, column), i < count);
      }
      const auto at = rows.template find_rows<rows_at_once>(request, request.start + first, count,
                                                            [&](int) { return column; });
#pragma unroll
      for (int i = 0; i < rows_at_once; ++i) {
        if (!at.present[i]) continue;
        typename state::Columns kv, score;
        state::round_new(columns[i], kv, score);
        ::store(at.kv[i], kv);
        ::store(at.score[i], score);
      }
    }
  }
};

}  // namespace paged_kv_compress
