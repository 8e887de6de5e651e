// Where the rows of a request lie: the new ones in kv_score, all of them in the paged state.
#pragma once
#include "common.cuh"

namespace paged_kv_compress {

// Filled by cuda_kernel.py, in this order. Strides are in elements.
struct Params {
  const void* kv_score;
  const float* ape;
  void* paged_kv;
  void* paged_score;
  const int* block_table_kv;
  const int* block_table_score;
  void* output;
  const int* kv_lens;
  const int* cu_seq_lens;
  const int* cu_outputs;
  int64 kv_score_stride, ape_stride;
  int64 paged_kv_page_stride, paged_kv_slot_stride;
  int64 paged_score_page_stride, paged_score_slot_stride;
  int64 block_table_kv_stride, block_table_score_stride;
  int64 output_stride;
  int batch, num_tokens, num_outputs, num_pages, max_pages, page_size;
  uint32 page_multiplier;  // position / page_size == position * page_multiplier >> page_shift
  int page_shift;
  int output_is_bf16;
  int store_by_token;  // a thread stores one new row, not all of a request's
  uint32 storing_share;  // direct: of CTAs that store, until all is stored, times 2^32
  int prefetch_state;  // read all metadata and old rows before the kernel ahead on the stream has ended
};

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

struct Request {
  int index;
  int new_tokens;
  int start;        // the position of its first new token
  int first_token;  // its row of kv_score
  int first_window, windows;  // the windows that close in this step
};

// A request's metadata as it comes: its tokens after the step, and which rows of kv_score are its.
struct Lengths {
  int length, begin, end;
};

__device__ __forceinline__ Lengths load_lengths(const Params& p, int index) {
  return {p.kv_lens[index], p.cu_seq_lens[index], p.cu_seq_lens[index + 1]};
}

// False for metadata that are not a request's: it is skipped like one without new tokens.
template <class C>
__device__ __forceinline__ bool read_request(const Params& p, int index, const Lengths& lengths,
                                             Request& r) {
  const auto [length, begin, end] = lengths;
  // Unsigned, the difference of two that are in order does not overflow.
  const uint32 new_tokens = uint32(end) - uint32(begin);
  if (begin < 0 || end < begin || end > p.num_tokens || new_tokens > C::next_n ||
      int(new_tokens) > length)
    return false;
  r.index = index;
  r.new_tokens = int(new_tokens);
  r.start = length - r.new_tokens;
  r.first_token = begin;
  r.first_window = int(uint32(r.start) / C::compress_ratio);
  r.windows = int(uint32(length) / C::compress_ratio) - r.first_window;
  return true;
}

template <class C>
__device__ __forceinline__ bool load_request(const Params& p, int index, Request& r) {
  return read_request<C>(p, index, load_lengths(p, index), r);
}

// Where one position's row lies in the two pools; absent if either page is out of range.
struct Place {
  int page_kv, page_score, slot;
  bool present;
};

template <class C>
struct State {
  using kv_t = typename C::kv_t;
  using state_t = typename C::state_t;

  // A thread has `vector` columns of a row at once, 16 bytes of state.
  static constexpr int vector = 16 / int(sizeof(state_t));
  static constexpr int state_dim = C::head_dim * (C::overlap ? 2 : 1);

  using Columns = Vec<state_t, vector>;

  const Params& p;

  __device__ __forceinline__ int logical_page(int position) const {
    return int(uint64(uint32(position)) * p.page_multiplier >> p.page_shift);
  }

  __device__ __forceinline__ int slot_of(int position, int page) const {
    return int(uint32(position) - uint32(page) * uint32(p.page_size));
  }

  __device__ __forceinline__ Place find(const Request& request, int position, int page) const {
    const bool listed = page < p.max_pages;
    Place place;
    place.page_kv = load_int(
        p.block_table_kv + request.index * p.block_table_kv_stride + page, listed, -1);
    place.page_score = load_int(
        p.block_table_score + request.index * p.block_table_score_stride + page, listed, -1);
    place.slot = slot_of(position, page);
    place.present = uint32(place.page_kv) < uint32(p.num_pages) &&
                    uint32(place.page_score) < uint32(p.num_pages);
    return place;
  }

  __device__ __forceinline__ state_t* kv_at(const Place& at, int column) const {
    return static_cast<state_t*>(p.paged_kv) + at.page_kv * p.paged_kv_page_stride +
           at.slot * p.paged_kv_slot_stride + column;
  }

  __device__ __forceinline__ state_t* score_at(const Place& at, int column) const {
    return static_cast<state_t*>(p.paged_score) + at.page_score * p.paged_score_page_stride +
           at.slot * p.paged_score_slot_stride + column;
  }

  // Where the state holds some columns of N consecutive positions.
  template <int N>
  struct Rows {
    state_t* kv[N];
    state_t* score[N];
    bool present[N];
  };

  // The rows at `first`, `first` + 1, ..., of which `count` exist, and those not at negative
  // positions. column_of(i) is the first column wanted of row i.
  template <int N, class ColumnOf>
  __device__ __forceinline__ Rows<N> find_rows(const Request& request, int first, int count,
                                                ColumnOf column_of) const {
    Rows<N> rows;
    const int last = first + (count < N ? count : N) - 1;
    const int page = logical_page(first);
    if (first >= 0 && last >= first && page == logical_page(last)) {  // as nearly always
      const Place place = find(request, first, page);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        rows.kv[i] = kv_at(place, column_of(i)) + i * p.paged_kv_slot_stride;
        rows.score[i] = score_at(place, column_of(i)) + i * p.paged_score_slot_stride;
        rows.present[i] = place.present && i < count;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int position = first + i;
        const bool exists = i < count && position >= 0;
        const Place place = find(request, position, exists ? logical_page(position) : p.max_pages);
        rows.kv[i] = kv_at(place, column_of(i));
        rows.score[i] = score_at(place, column_of(i));
        rows.present[i] = place.present;
      }
    }
    return rows;
  }

  // One vector of a new row, as kv_score and ape have it.
  struct NewColumns {
    Vec<kv_t, vector> kv, score;
    Vec<float, vector> ape;
  };

  // Whether a new row's KV is in the state as it comes.
  static constexpr bool same_type = is_same<kv_t, state_t>;

  // Where it lies; phase: of its position in the window.
  struct NewPlace {
    const kv_t* kv;
    const kv_t* score;
    const float* ape;
  };

  __device__ __forceinline__ NewPlace find_new(const Request& request, int token, int phase,
                                               int column) const {
    const kv_t* row = static_cast<const kv_t*>(p.kv_score) +
                      int64(request.first_token + token) * p.kv_score_stride + column;
    return {row, row + state_dim, p.ape + phase * p.ape_stride + column};
  }

  static __device__ __forceinline__ NewColumns load_new(const NewPlace& at, bool exists) {
    return {load<kv_t, vector>(at.kv, exists), load<kv_t, vector>(at.score, exists),
            load<float, vector>(at.ape, exists)};
  }

  // The same as the state holds it.
  static __device__ __forceinline__ void round_new(const NewColumns& columns, Columns& kv,
                                                   Columns& score) {
    if constexpr (same_type) {
      kv = columns.kv;
    } else {
      float exact[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) exact[i] = column(columns.kv, i);
      round_columns(exact, kv);
    }
    add_ape(columns.score, columns.ape, score);
  }

  static __device__ __forceinline__ void add_ape(const Vec<kv_t, vector>& new_score,
                                                 const Vec<float, vector>& ape, Columns& score) {
    float exact[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) exact[i] = __fadd_rn(column(new_score, i), column(ape, i));
    round_columns(exact, score);
  }
};

}  // namespace paged_kv_compress
