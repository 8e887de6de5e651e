// Stores the new tokens' rows in the paged state.
#pragma once
#include "device/new_rows.cuh"
#include "device/stream_order.cuh"

namespace paged_kv_compress {

// The work is dealt out in items. An item is one vector of columns of all new rows of a request or,
// if there are few requests (store_by_token), of one new row.
template <class C>
struct Store {
  using New = NewRows<C>;
  using State = StateRows<C>;
  static constexpr int vector = State::vector;
  static constexpr int row_vectors = State::state_dim / vector;

  // New rows that a thread has in registers at once without a loss of occupancy.
  static constexpr int rows_at_once =
      min_of(C::next_n, max_of(1, 128 / int(sizeof(typename New::Columns))));

  struct Item {
    Request request;
    int column;
    int begin, end;  // of its new tokens; there is nothing to store unless begin < end
  };

  // Stores items number `first`, `first` + `step`, ...: C::items_at_once of them.
  static __device__ __forceinline__ void run(const Params& p, uint32 first, uint32 step) {
    constexpr int items = C::items_at_once;
    Item item[items] = {};
    int index[items];
    Lengths lengths[items];
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const uint32 share = (first + k * step) / row_vectors;
      index[k] = int(p.store_by_token ? share / C::next_n : share);
      lengths[k] = load_lengths(p, min_of(index[k], p.batch - 1));
    }
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const uint32 number = first + k * step;
      Request& request = item[k].request;
      if (index[k] >= p.batch || !read_request<C>(p, index[k], lengths[k], request)) continue;
      item[k].column = int(number % row_vectors) * vector;
      const int token = int(number / row_vectors % C::next_n);
      item[k].begin = p.store_by_token ? token : 0;
      item[k].end = p.store_by_token ? min_of(token + 1, request.new_tokens) : request.new_tokens;
    }
    store_items(p, item);
  }

  // Rows are stored rows_at_once of each item at a time: all loads are issued before the first write.
  // The page is looked up once per item, and again only past the end of a page.
  template <int items>
  static __device__ __forceinline__ void store_items(const Params& p, const Item (&item)[items]) {
    const State state{p};
    int most = 0;
#pragma unroll
    for (int k = 0; k < items; ++k) most = max_of(most, item[k].end - item[k].begin);
    if (!most) return;
    wait_for_predecessor();
    for (int done = 0; done < most; done += rows_at_once) {
      typename New::Columns columns[items][rows_at_once];
      StateRow first[items];
      int first_page[items];
#pragma unroll
      for (int k = 0; k < items; ++k) {
        const Request& request = item[k].request;
        const int token = item[k].begin + done;
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
          const int phase = int(uint32(request.start + token + i) % C::compress_ratio);
          columns[k][i] = New::load_columns(
              New::find(p, request, token + i, phase, item[k].column), token + i < item[k].end);
        }
        const bool any = token < item[k].end;
        first_page[k] = any ? state.logical_page(request.start + token) : p.max_pages;
        first[k] = state.find(request, request.start + token, first_page[k]);
      }
#pragma unroll
      for (int k = 0; k < items; ++k) {
        const Request& request = item[k].request;
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
          const int token = item[k].begin + done + i;
          if (token >= item[k].end) continue;
          const int position = request.start + token;
          const int page = state.logical_page(position);
          StateRow row = first[k];
          row.slot += i;
          if (page != first_page[k]) row = state.find(request, position, page);
          if (!row.present) continue;
          typename State::Columns kv, score;
          New::round(columns[k][i], kv, score);
          ::store(state.kv_at(row, item[k].column), kv);
          ::store(state.score_at(row, item[k].column), score);
        }
      }
    }
  }
};

}  // namespace paged_kv_compress
