// paged_kv_compress: stores the new tokens' rows in the paged state and reduces each window that
// they close to one output row.
//
// Some CTAs reduce, one per request and `head_slice` columns, gone at once where no window closes.
// The others store, all new rows flattened over them. Neither waits for the other: a reducing CTA
// takes the new rows from kv_score.
//
// The way of a reduction: load_request -> fetch_leaf, every thread its own rows and columns, all in
// flight at once -> reduce_leaf -> the tree, in a thread, in a warp, over the warps -> write_output
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
  int few_requests;  // see Compressor::store_new_rows and run
};

__device__ constexpr int power_of_two_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

__device__ constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

struct Request {
  int index;
  int new_tokens;
  int start;        // the position of its first new token
  int first_token;  // its row of kv_score
  int first_window, windows;  // the windows that close in this step
};

// False for a request whose metadata is not a request's: it is skipped like one without new tokens.
template <class C>
__device__ __forceinline__ bool load_request(const Params& p, int index, Request& r) {
  const int length = p.kv_lens[index];
  const int begin = p.cu_seq_lens[index];
  const int end = p.cu_seq_lens[index + 1];
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

// Where one position's row lies in the two pools; absent if either page is out of range.
struct Place {
  int page_kv, page_score, slot;
  bool present;
};

template <class C>
struct Compressor {
  using kv_t = typename C::kv_t;
  using state_t = typename C::state_t;

  // Columns: each thread has `vector` of them, 16 bytes of state; `lanes` threads make a slice.
  static constexpr int vector = 16 / int(sizeof(state_t));
  static constexpr int lanes = C::head_slice / vector;
  static constexpr int state_dim = C::head_dim * (C::overlap ? 2 : 1);
  static constexpr int slices = C::head_dim / C::head_slice;

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
  static constexpr int leaf_groups = leaf_quads / held_quads;         // groups that share a leaf

  // A thread holds one quad in registers, more in shared memory, where all CTAs together fit more.
  static constexpr bool in_registers = held_quads == 1;
  static constexpr int held_bytes = in_registers ? 0 : C::threads * held_rows * 2 * 16;

  // New rows that a thread has in flight: not so many that they cost occupancy.
  static constexpr int new_at_once = 16 / vector;
  static constexpr int store_rows = min_of(C::next_n, new_at_once);
  static constexpr int row_vecs = state_dim / vector;

  static constexpr int partial_bytes =
      C::reduce_warps > 1 ? C::reduce_warps * C::head_slice * int(sizeof(Partial)) : 0;

  static_assert(C::head_dim % C::head_slice == 0 && C::head_slice % vector == 0);
  static_assert(lanes % 32 == 0 || 32 % lanes == 0);
  static_assert(C::threads == C::reduce_warps * warp_groups * lanes);
  static_assert(C::shared_bytes == held_bytes + partial_bytes);

  using Columns = Vec<state_t, vector>;

  const Params& p;
  Request request;
  int slice_start;  // the slice's first column
  int lane_column;  // this thread's first column, from slice_start
  int group;        // which threads this one shares its rows with
  int first_row;    // this thread's first row of a window; past the window if the group is idle
  Columns* slots;   // [held_rows][kv, score][threads] in shared memory, this thread's; or
  Columns held[in_registers ? held_rows : 1][2];  // the same in registers
  float* partials;  // [3][reduce_warps][head_slice], in shared memory

  __device__ __forceinline__ Compressor(const Params& params, uint4* shared) : p(params) {
    lane_column = int(threadIdx.x % lanes * vector);
    group = int(threadIdx.x / lanes);
    const int warp_quad = int(uint32(group) % warp_groups) * group_quads;
    first_row = warp_quad < warp_quads
                    ? (int(uint32(group) / warp_groups) * warp_quads + warp_quad) * quad_rows
                    : window_rows;
    slots = reinterpret_cast<Columns*>(shared) + threadIdx.x;
    partials = reinterpret_cast<float*>(shared) + held_bytes / 4;
  }

  __device__ __forceinline__ int logical_page(int position) const {
    return int(uint64(uint32(position)) * p.page_multiplier >> p.page_shift);
  }

  __device__ __forceinline__ int slot_of(int position, int page) const {
    return int(uint32(position) - uint32(page) * uint32(p.page_size));
  }

  __device__ __forceinline__ Place find(int position, int page) const {
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
  __device__ __forceinline__ Rows<N> find_rows(int first, int count, ColumnOf column_of) const {
    Rows<N> rows;
    const int last = first + (count < N ? count : N) - 1;
    const int page = logical_page(first);
    if (first >= 0 && last >= first && page == logical_page(last)) {  // as nearly always
      const Place place = find(first, page);
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
        const Place place = find(position, exists ? logical_page(position) : p.max_pages);
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

  __device__ __forceinline__ NewColumns load_new(int token, int state_column, bool exists) const {
    const kv_t* row = static_cast<const kv_t*>(p.kv_score) +
                      int64(request.first_token + token) * p.kv_score_stride + state_column;
    const int phase = int(uint32(request.start + token) % C::compress_ratio);
    return {load<kv_t, vector>(row, exists), load<kv_t, vector>(row + state_dim, exists),
            load<float, vector>(p.ape + phase * p.ape_stride + state_column, exists)};
  }

  // The same as the state holds it.
  static __device__ __forceinline__ void round_new(const NewColumns& columns, Columns& kv,
                                                   Columns& score) {
    float exact_kv[vector], exact_score[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      exact_kv[i] = column(columns.kv, i);
      exact_score[i] = __fadd_rn(column(columns.score, i), column(columns.ape, i));
    }
    round_columns(exact_kv, kv);
    round_columns(exact_score, score);
  }

  // Thread `item` of all the storing CTAs: one vector of each of a request's new rows or, where
  // few requests leave the GPU idle anyway, of just one of them.
  __device__ __forceinline__ void store_new_rows(uint32 item) {
    const int state_column = int(item % row_vecs) * vector;
    const uint32 share = item / row_vecs;
    const uint32 index = p.few_requests ? share / C::next_n : share;
    if (index >= uint32(p.batch)) return;
    if (!load_request<C>(p, int(index), request)) return;
    const int begin = p.few_requests ? int(share % C::next_n) : 0;
    const int end = p.few_requests ? min_of(begin + 1, request.new_tokens) : request.new_tokens;
    for (int first = begin; first < end; first += store_rows) {
      const int count = end - first;
      NewColumns columns[store_rows];
#pragma unroll
      for (int i = 0; i < store_rows; ++i)
        columns[i] = load_new(first + i, state_column, i < count);
      const auto rows = find_rows<store_rows>(request.start + first, count,
                                              [&](int) { return state_column; });
#pragma unroll
      for (int i = 0; i < store_rows; ++i) {
        if (!rows.present[i]) continue;
        Columns kv, score;
        round_new(columns[i], kv, score);
        store(rows.kv[i], kv);
        store(rows.score[i], score);
      }
    }
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

  __device__ __forceinline__ void fetch_old(Columns& to, const state_t* from, bool exists) {
    if constexpr (in_registers) to = load<state_t, vector>(from, exists);
    else if (exists) copy_async(&to, from);
  }

  // Brings this thread's rows of one of its leaves into its slots: old ones from the state, new
  // ones from kv_score, absent ones as (0, -inf). Returns whether any row is present.
  __device__ __forceinline__ bool fetch_leaf(int window, int leaf) {
    const int leaf_row = first_row + leaf * held_rows;
    const int leaf_position = (window - int(C::overlap)) * C::compress_ratio + leaf_row;
    const int page = logical_page(leaf_position);
    const bool one_page = leaf_position >= 0 && leaf_row + held_rows <= window_rows &&
                          page == logical_page(leaf_position + held_rows - 1);
    Place place;
    if (one_page) place = find(leaf_position, page);  // as nearly always
    bool any_present = false;
#pragma unroll
    for (int quad = 0; quad < held_rows; quad += quad_rows) {
      const int row = leaf_row + quad;
      const int position = leaf_position + quad;
      const auto column_at = [&](int i) { return column_of(row + i); };
      Rows<quad_rows> rows;
      if (one_page) {
#pragma unroll
        for (int i = 0; i < quad_rows; ++i) {
          rows.kv[i] = kv_at(place, column_at(i)) + (quad + i) * p.paged_kv_slot_stride;
          rows.score[i] = score_at(place, column_at(i)) + (quad + i) * p.paged_score_slot_stride;
          rows.present[i] = place.present;
        }
      } else {
        rows = find_rows<quad_rows>(position, window_rows - row, column_at);
      }
      bool has_new = false;
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) {
        const bool is_new = position + i >= request.start;
        fetch_old(slot(quad + i, 0), rows.kv[i], rows.present[i] && !is_new);
        fetch_old(slot(quad + i, 1), rows.score[i], rows.present[i] && !is_new);
        any_present |= rows.present[i];
        has_new |= rows.present[i] && is_new;
        if (!rows.present[i]) {
          slot(quad + i, 0) = every_column<state_t, vector>(0.0f);
          slot(quad + i, 1) = every_column<state_t, vector>(minus_infinity());
        }
      }
      if (has_new) {
#pragma unroll
        for (int first = 0; first < quad_rows; first += new_at_once) {
          NewColumns columns[new_at_once];
          bool is_new[new_at_once];
#pragma unroll
          for (int i = 0; i < new_at_once; ++i) {
            const int token = position + first + i - request.start;
            is_new[i] = rows.present[first + i] && token >= 0;
            columns[i] = load_new(token, column_at(first + i), is_new[i]);
          }
#pragma unroll
          for (int i = 0; i < new_at_once; ++i) {
            const int at = quad + first + i;
            if (is_new[i]) round_new(columns[i], slot(at, 0), slot(at, 1));
          }
        }
      }
    }
    if constexpr (!in_registers) wait_for_copies();
    return any_present;
  }

  // The leaf in the slots, with what the groups that share it have of it.
  __device__ __forceinline__ void reduce_leaf(bool any_present, Partial (&result)[vector]) {
    Columns score[held_rows];
#pragma unroll
    for (int i = 0; i < held_rows; ++i) score[i] = slot(i, 1);
    float max[vector];
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      max[v] = lowest;
#pragma unroll
      for (int i = 0; i < held_rows; ++i) max[v] = fmaxf(max[v], column(score[i], v));
    }
#pragma unroll
    for (int distance = lanes; distance < lanes * leaf_groups; distance *= 2) {
      any_present |= bool(__shfl_xor_sync(0xffffffffu, int(any_present), distance));
#pragma unroll
      for (int v = 0; v < vector; ++v)
        max[v] = fmaxf(max[v], __shfl_xor_sync(0xffffffffu, max[v], distance));
    }

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

  // The subtree over this thread's leaves. The loop adds leaves the way a binary counter adds ones:
  // open[k] holds a finished left subtree of 2^k leaves, waiting for its right sibling.
  __device__ __forceinline__ void reduce_group(int window, Partial (&result)[vector]) {
    constexpr int levels = log2_of(group_leaves);
    Partial open[levels ? levels : 1][vector];
#pragma unroll 1
    for (int leaf = 0; leaf < group_leaves; ++leaf) {
      reduce_leaf(fetch_leaf(window, leaf), result);
      bool carries = true;
#pragma unroll
      for (int level = 0; level < levels; ++level) {
        if (carries && (leaf >> level & 1)) {
          combine_columns(result, open[level]);
        } else if (carries) {
          carries = false;
#pragma unroll
          for (int v = 0; v < vector; ++v) open[level][v] = result[v];
        }
      }
    }
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

  // The top of the tree, over the warps that share the window, and the output row.
  __device__ __forceinline__ void reduce_cta(const Partial (&result)[vector], int64 output_row,
                                             bool writes) {
    if constexpr (C::reduce_warps == 1) {
      if (writes && group == 0) {
#pragma unroll
        for (int v = 0; v < vector; ++v)
          write_output(output_row, lane_column + v, finish(result[v]));
      }
    } else {
      constexpr int plane = C::reduce_warps * C::head_slice;
      if (uint32(group) % warp_groups == 0) {
        float* mine = partials + uint32(group) / warp_groups * C::head_slice + lane_column;
#pragma unroll
        for (int v = 0; v < vector; ++v) {
          mine[v] = result[v].max;
          mine[plane + v] = result[v].sum;
          mine[2 * plane + v] = result[v].weighted;
        }
      }
      __syncthreads();
      if (!writes) return;
      for (int local = threadIdx.x; local < C::head_slice; local += C::threads) {
        Partial part[C::reduce_warps];
#pragma unroll
        for (int w = 0; w < C::reduce_warps; ++w) {
          const float* its = partials + w * C::head_slice + local;
          part[w] = {its[0], its[plane], its[2 * plane]};
        }
        write_output(output_row, local, finish(combine_all<C::reduce_warps>(part)));
      }
    }
  }

  // The output rows reserved for the request, of those that there are: [x, y).
  __device__ __forceinline__ int2 output_rows() const {
    const int* rows = p.cu_outputs + request.index;
    return make_int2(rows[0], min_of(rows[1], p.num_outputs));
  }

  // CTA `cta` of all the reducing ones.
  __device__ __forceinline__ void reduce_windows(uint32 cta) {
    slice_start = int(cta % slices) * C::head_slice;
    if (!load_request<C>(p, int(cta / slices), request) || !request.windows) return;
    const int2 reserved = output_rows();
    for (int i = 0; i < request.windows; ++i) {
      Partial result[vector];
      reduce_group(request.first_window + i, result);
      reduce_warp(result);
      const int64 row = int64(reserved.x) + i;
      reduce_cta(result, row, row >= 0 && row < reserved.y);
      if (i + 1 < request.windows) __syncthreads();  // `partials` is read, and written again
    }
  }
};

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  extern __shared__ uint4 shared[];
  Compressor<C> compressor(params, shared);
  // Where not all CTAs fit on the GPU at once, those that store go first: they have the least to
  // wait for behind the many that may find no window. Otherwise reducing takes longest.
  const uint32 reducing = uint32(params.batch) * Compressor<C>::slices;
  const uint32 storing = gridDim.x - reducing;
  const uint32 first_reducing = params.few_requests ? 0 : storing;
  const uint32 first_storing = params.few_requests ? reducing : 0;
  if (blockIdx.x - first_reducing < reducing) {
    compressor.reduce_windows(blockIdx.x - first_reducing);
  } else {
    compressor.store_new_rows((blockIdx.x - first_storing) * C::threads + threadIdx.x);
  }
}

}  // namespace paged_kv_compress
