// Stores the new tokens' rows of a decode step in the paged state.
#pragma once
#include "device/new_rows.cuh"
#include "device/stream_order.cuh"
#include "device/held_rows.cuh"

// The work is dealt out in items. An item is one vector of columns of all new rows of a request or,
// if there are few requests (store_by_token), of one new row.
template <class C>
struct Store {
  using Params = typename C::Params;
  using New = NewRows<C>;
  using State = StateRows<C>;
  static constexpr int vector = State::vector;
  static constexpr int row_vectors = State::state_dim / vector;

  // New rows that a thread has in registers at once without a loss of occupancy.
  static constexpr int rows_at_once =
      min_of(C::next_n,
             max_of(1, 128 / int(sizeof(typename New::Columns) + sizeof(typename New::Ape))));

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
      typename New::Ape ape[items][rows_at_once];
      StateRow first[items];
      int first_page[items];
#pragma unroll
      for (int k = 0; k < items; ++k) {
        const Request& request = item[k].request;
        const int token = item[k].begin + done;
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
          const int phase = int(uint32(request.start + token + i) % C::compress_ratio);
          const auto from = New::find(p, request, token + i, phase, item[k].column);
          columns[k][i] = New::load_columns(from, token + i < item[k].end);
          ape[k][i] = New::load_ape(from, token + i < item[k].end);
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
          New::round(columns[k][i], ape[k][i], kv, score);
          store_streaming(state.kv_at(row, item[k].column), kv);
          store_streaming(state.score_at(row, item[k].column), score);
        }
      }
    }
  }
};

// The store of a CTA that also reduces: one slice of the new rows of one request. A thread has all rows
// of its columns. It also puts the rows of the first window that closes where the reduction takes them.
template <class C>
struct StoreSlice {
  using Params = typename C::Params;
  using New = NewRows<C>;
  using State = StateRows<C>;
  using Held = HeldRows<C>;
  using Shape = WindowShape<C>;
  static_assert(C::threads == Shape::lanes && !Held::in_registers);
  static constexpr int parts = C::overlap ? 2 : 1;  // of head_dim columns, in a row of state
  static constexpr int rows_at_once =
      min_of(C::next_n, max_of(1, 128 / int(sizeof(typename New::Columns)) / parts));

  const Params& p;
  const Request& request;
  const ThreadPart<C>& part;
  Held& held;
  StateRow first;  // of the first new token
  int first_page;
  typename New::Columns columns[rows_at_once][parts];

  __device__ __forceinline__ StoreSlice(const Params& params, const Request& r,
                                        const ThreadPart<C>& thread_part, Held& held_rows)
      : p(params), request(r), part(thread_part), held(held_rows) {
    const State state{p};
    first_page = state.logical_page(request.start);
    first = state.find(request, request.start, first_page);
  }

  __device__ __forceinline__ typename New::Source find_new(int token, int half) const {
    const int phase = int(uint32(request.start + token) % C::compress_ratio);
    return New::find(p, request, token, phase, part.column + half * C::head_dim);
  }

  // Issues the loads of tokens `from`, `from` + 1, ...: rows_at_once of them.
  __device__ __forceinline__ void load(int from) {
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
#pragma unroll
      for (int half = 0; half < parts; ++half)
        columns[i][half] =
            New::load_columns(find_new(from + i, half), from + i < request.new_tokens);
    }
  }

  // Stores one half of the tokens that load() fetched. Adds the window's new rows to `present`.
  template <int half>
  __device__ __forceinline__ void write(int from, uint32& present) {
    const State state{p};
    const int column = part.column + half * C::head_dim;
    typename New::Ape ape[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i)
      ape[i] = New::load_ape(find_new(from + i, half), from + i < request.new_tokens);
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int token = from + i;
      if (token >= request.new_tokens) continue;
      const int position = request.start + token;
      const int page = state.logical_page(position);
      StateRow row = first;
      row.slot += token;
      if (page != first_page) row = state.find(request, position, page);
      if (!row.present) continue;
      typename State::Columns kv, score;
      New::round(columns[i][half], ape[i], kv, score);
      if (p.stores) {
        store_streaming(state.kv_at(row, column), kv);
        store_streaming(state.score_at(row, column), score);
      }
      // The row's place in the first window that closes: its own rows are the last.
      const int at = position - request.first_window * C::compress_ratio +
                     (C::overlap ? C::compress_ratio : 0);
      if (half == parts - 1 && request.windows && at < Shape::rows) {
        held.at(at, Held::kv) = kv;
        held.at(at, Held::score) = score;
        present |= 1u << at;
      }
    }
  }

  __device__ __forceinline__ void run(uint32& present) {
    wait_for_predecessor();
#pragma unroll 1
    for (int from = 0; from < request.new_tokens; from += rows_at_once) {
      load(from);
      write<parts - 1>(from, present);  // the half that the window waits for
      if constexpr (parts > 1) write<0>(from, present);
    }
  }
};
