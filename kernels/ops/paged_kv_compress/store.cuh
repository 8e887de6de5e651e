// Stores the new tokens' rows in the paged state.
#pragma once
#include "paged_kv_compress/state.cuh"

namespace paged_kv_compress {

template <class C>
struct Store {
  using state = State<C>;
  static constexpr int vector = state::vector;
  static constexpr int row_vecs = state::state_dim / vector;

  // So many new rows a thread may have in registers that they cost no occupancy.
  static constexpr int rows_at_once =
      min_of(C::next_n, max_of(1, 128 / int(sizeof(typename state::NewColumns))));

  // One vector of some of a request's new rows.
  struct Item {
    Request request;
    int column;
    int begin, end;  // of its new tokens; nothing to store unless begin < end
  };

  // Stores items, `rows` rows of each at once: all that is read is on its way before the first
  // write. Where the state has them is looked up once an item, and again only past a page's end.
  template <int rows, int items>
  static __device__ __forceinline__ void store(const Params& p, const Item (&item)[items]) {
    const state at{p};
    int most = 0;
#pragma unroll
    for (int k = 0; k < items; ++k) most = max_of(most, item[k].end - item[k].begin);
    if (!most) return;
    wait_for_predecessor();
    for (int past = 0; past < most; past += rows) {
      typename state::NewColumns columns[items][rows];
      Place first[items];
      int first_page[items];
#pragma unroll
      for (int k = 0; k < items; ++k) {
        const Request& request = item[k].request;
        const int token = item[k].begin + past;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          const int phase = int(uint32(request.start + token + i) % C::compress_ratio);
          columns[k][i] = state::load_new(at.find_new(request, token + i, phase, item[k].column),
                                          token + i < item[k].end);
        }
        const bool any = token < item[k].end;
        first_page[k] = any ? at.logical_page(request.start + token) : p.max_pages;
        first[k] = at.find(request, request.start + token, first_page[k]);
      }
#pragma unroll
      for (int k = 0; k < items; ++k) {
        const Request& request = item[k].request;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          const int token = item[k].begin + past + i;
          if (token >= item[k].end) continue;
          const int position = request.start + token;
          const int page = at.logical_page(position);
          Place place = first[k];
          place.slot += i;
          if (page != first_page[k]) place = at.find(request, position, page);
          if (!place.present) continue;
          typename state::Columns kv, score;
          state::round_new(columns[k][i], kv, score);
          ::store(at.kv_at(place, item[k].column), kv);
          ::store(at.score_at(place, item[k].column), score);
        }
      }
    }
  }

  // Items number `first`, `first` + `step`, ... of the whole step's, C::items_at_once of them: an
  // item is a vector of all of a request's new rows or, by token, of just one.
  static __device__ __forceinline__ void store_items(const Params& p, uint32 first, uint32 step) {
    constexpr int items = C::items_at_once;
    Item item[items] = {};
    int index[items];
    Lengths lengths[items];
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const uint32 share = (first + k * step) / row_vecs;
      index[k] = int(p.store_by_token ? share / C::next_n : share);
      lengths[k] = load_lengths(p, min_of(index[k], p.batch - 1));
    }
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const uint32 number = first + k * step;
      Request& request = item[k].request;
      if (index[k] >= p.batch || !read_request<C>(p, index[k], lengths[k], request)) continue;
      item[k].column = int(number % row_vecs) * vector;
      const int token = int(number / row_vecs % C::next_n);
      item[k].begin = p.store_by_token ? token : 0;
      item[k].end = p.store_by_token ? min_of(token + 1, request.new_tokens) : request.new_tokens;
    }
    store<rows_at_once>(p, item);
  }
};

}  // namespace paged_kv_compress
