// paged_kv_compress: stores the new tokens' rows in the paged state and, where they close a window,
// reduces it to one output row. One CTA serves one request and `head_slice` columns.
//
// The data's way: load_request -> (load_leaf -> reduce_leaf)* -> the tree: in a thread, in a warp,
// over the warps -> write_output. The new rows go through shared memory (stage_new_rows), so the
// reduction never waits for their store.
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
  int num_tokens, num_outputs, num_pages, max_pages, page_size;
  uint32 page_multiplier;  // position / page_size == position * page_multiplier >> page_shift
  int page_shift;
  int output_is_bf16;
};

struct Request {
  int index;
  int new_tokens;
  int start;  // the position of its first new token
  int64 first_token, first_output, end_output;
  int first_window, windows;  // the windows that close in this step
};

// False for a request whose metadata is not a request's: it is skipped like one without new tokens.
template <class C>
__device__ __forceinline__ bool load_request(const Params& p, int index, Request& r) {
  const int length = p.kv_lens[index];
  const int64 begin = p.cu_seq_lens[index];
  const int64 end = p.cu_seq_lens[index + 1];
  r.first_output = p.cu_outputs[index];
  r.end_output = p.cu_outputs[index + 1];
  if (r.end_output > p.num_outputs) r.end_output = p.num_outputs;
  const int64 new_tokens = end - begin;
  if (begin < 0 || end > p.num_tokens || new_tokens < 0 || new_tokens > C::next_n ||
      new_tokens > length)
    return false;
  r.index = index;
  r.new_tokens = int(new_tokens);
  r.start = length - r.new_tokens;
  r.first_token = begin;
  r.first_window = r.start / C::compress_ratio;
  r.windows = length / C::compress_ratio - r.first_window;
  return true;
}

// Where one position's row lies in the two pools; absent if either page is out of range.
struct Place {
  int page_kv, page_score, slot;
  bool present;
};

__device__ constexpr int power_of_two_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

__device__ constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

// Leaves whose loads may be in flight together in one thread; more cost registers and code.
constexpr int unrolled_leaves = 2;

template <class C>
struct Compressor {
  using kv_t = typename C::kv_t;
  using state_t = typename C::state_t;

  // Columns: each thread has `vector` of them, 16 bytes of state; `lanes` threads make a slice.
  static constexpr int vector = 16 / int(sizeof(state_t));
  static constexpr int lanes = C::head_slice / vector;
  static constexpr int state_dim = C::head_dim * (C::overlap ? 2 : 1);
  static constexpr int state_slice = C::head_slice * (C::overlap ? 2 : 1);
  static constexpr int slices = C::head_dim / C::head_slice;

  // Rows: threads that have the same columns are in different groups, each with its own leaves.
  static constexpr int window_rows = C::compress_ratio * (C::overlap ? 2 : 1);
  static constexpr int groups = C::threads / lanes;
  static constexpr int leaves = power_of_two_at_least((window_rows + leaf_rows - 1) / leaf_rows);
  static constexpr int group_leaves = leaves > groups ? leaves / groups : 1;

  static constexpr int new_vecs = state_slice / vector;
  static constexpr int new_bytes = C::next_n * state_slice * int(sizeof(state_t));
  static constexpr int partial_bytes =
      C::reduce_warps > 1 ? C::reduce_warps * C::head_slice * int(sizeof(Partial)) : 0;

  static_assert(C::head_dim % C::head_slice == 0 && C::head_slice % vector == 0);
  static_assert(lanes % 32 == 0 || 32 % lanes == 0);
  static_assert(groups * lanes == C::threads && (groups & (groups - 1)) == 0);
  static_assert(C::shared_bytes == 2 * new_bytes + partial_bytes);

  using Columns = Vec<state_t, vector>;

  const Params& p;
  Request request;
  int slice_start;    // the slice's first column
  int lane_column;    // this thread's first column, from slice_start
  int group;          // which of the window's leaves are this thread's
  Columns* new_kv;    // [next_n][new_vecs], in shared memory
  Columns* new_score;
  float* partials;    // [3][reduce_warps][head_slice], in shared memory
  bool staged = false;

  __device__ __forceinline__ Compressor(const Params& params, uint4* shared) : p(params) {
    slice_start = int(blockIdx.x % slices) * C::head_slice;
    lane_column = int(threadIdx.x) % lanes * vector;
    group = int(threadIdx.x) / lanes;
    new_kv = reinterpret_cast<Columns*>(shared);
    new_score = new_kv + C::next_n * new_vecs;
    partials = reinterpret_cast<float*>(new_score + C::next_n * new_vecs);
  }

  __device__ __forceinline__ int logical_page(int position) const {
    return int(uint64(uint32(position)) * p.page_multiplier >> p.page_shift);
  }

  __device__ __forceinline__ int slot(int position, int page) const {
    return int(uint32(position) - uint32(page) * uint32(p.page_size));
  }

  __device__ __forceinline__ Place find(int position, int page) const {
    const bool listed = page < p.max_pages;
    Place place;
    place.page_kv = load_int(
        p.block_table_kv + request.index * p.block_table_kv_stride + page, listed, -1);
    place.page_score = load_int(
        p.block_table_score + request.index * p.block_table_score_stride + page, listed, -1);
    place.slot = slot(position, page);
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

  // Rounds the new rows to the state's dtype, into the state and into shared memory.
  __device__ __forceinline__ void stage_new_rows() {
    for (int item = threadIdx.x; item < request.new_tokens * new_vecs; item += C::threads) {
      const int token = item / new_vecs;
      const int local = item % new_vecs * vector;
      const int state_column =
          slice_start + local + (local < C::head_slice ? 0 : C::head_dim - C::head_slice);
      const int position = request.start + token;
      const kv_t* row = static_cast<const kv_t*>(p.kv_score) +
                        (request.first_token + token) * p.kv_score_stride + state_column;
      const float* ape_row = p.ape + position % C::compress_ratio * p.ape_stride + state_column;
      const auto kv_in = load<kv_t, vector>(row, true);
      const auto score_in = load<kv_t, vector>(row + state_dim, true);
      const auto ape_in = load<float, vector>(ape_row, true);
      const Place place = find(position, logical_page(position));

      float kv[vector], score[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        kv[i] = column(kv_in, i);
        score[i] = __fadd_rn(column(score_in, i), column(ape_in, i));
      }
      Columns rounded_kv, rounded_score;
      round_columns(kv, rounded_kv);
      round_columns(score, rounded_score);
      new_kv[item] = rounded_kv;
      new_score[item] = rounded_score;
      if (place.present) {
        store(kv_at(place, state_column), rounded_kv);
        store(score_at(place, state_column), rounded_score);
      }
    }
  }

  // Where the state holds the rows of one leaf.
  struct LeafPlace {
    const state_t* kv[leaf_rows];
    const state_t* score[leaf_rows];
    bool present[leaf_rows];
  };

  // An overlapping window's rows are those of the window before it, then its own.
  static __device__ __forceinline__ bool is_own(int row) {
    return !C::overlap || row >= C::compress_ratio;
  }

  __device__ __forceinline__ int column_of(int row) const {
    return slice_start + lane_column + (C::overlap && is_own(row) ? C::head_dim : 0);
  }

  __device__ __forceinline__ LeafPlace find_leaf(int first_row, int first_position) const {
    LeafPlace leaf;
    const int page = logical_page(first_position);
    constexpr bool never_cut = C::compress_ratio % leaf_rows == 0;
    if (never_cut && first_row < window_rows && first_position >= 0 &&
        page == logical_page(first_position + leaf_rows - 1)) {
      const Place place = find(first_position, page);
      const state_t* kv = kv_at(place, column_of(first_row));
      const state_t* score = score_at(place, column_of(first_row));
#pragma unroll
      for (int i = 0; i < leaf_rows; ++i) {
        leaf.kv[i] = kv + i * p.paged_kv_slot_stride;
        leaf.score[i] = score + i * p.paged_score_slot_stride;
        leaf.present[i] = place.present;
      }
    } else {
#pragma unroll
      for (int i = 0; i < leaf_rows; ++i) {
        const int row = first_row + i, position = first_position + i;
        const bool exists = row < window_rows && position >= 0;
        const Place place = find(position, exists ? logical_page(position) : p.max_pages);
        leaf.kv[i] = kv_at(place, column_of(row));
        leaf.score[i] = score_at(place, column_of(row));
        leaf.present[i] = place.present;
      }
    }
    return leaf;
  }

  // One leaf of one window, in this thread's columns.
  __device__ __forceinline__ void load_and_reduce_leaf(int window, int leaf,
                                                       Partial (&result)[vector]) {
    const int first_row = leaf * leaf_rows;
    const int first_position = (window - int(C::overlap)) * C::compress_ratio + first_row;
    const LeafPlace place = find_leaf(first_row, first_position);
    Columns kv[leaf_rows], score[leaf_rows];
#pragma unroll
    for (int i = 0; i < leaf_rows; ++i) {
      const bool old = place.present[i] && first_position + i < request.start;
      kv[i] = load<state_t, vector>(place.kv[i], old);
      score[i] = load<state_t, vector>(place.score[i], old);
    }

    // The state's rows are in flight; the new ones are fetched meanwhile.
    if (!staged) {
      stage_new_rows();
      __syncthreads();
      staged = true;
    }
    bool any_present = false;
#pragma unroll
    for (int i = 0; i < leaf_rows; ++i) {
      any_present |= place.present[i];
      const int token = first_position + i - request.start;
      if (place.present[i] && token >= 0) {
        const int half = C::overlap && is_own(first_row + i) ? C::head_slice : 0;
        const int item = token * new_vecs + (lane_column + half) / vector;
        kv[i] = new_kv[item];
        score[i] = new_score[item];
      }
    }

#pragma unroll
    for (int v = 0; v < vector; ++v) {
      float column_score[leaf_rows], column_kv[leaf_rows];
#pragma unroll
      for (int i = 0; i < leaf_rows; ++i) {
        column_score[i] = place.present[i] ? column(score[i], v) : minus_infinity();
        column_kv[i] = column(kv[i], v);
      }
      result[v] = reduce_leaf(column_score, column_kv, any_present);
    }
  }

  static __device__ __forceinline__ void combine_columns(Partial (&left)[vector],
                                                         const Partial (&right)[vector]) {
#pragma unroll
    for (int v = 0; v < vector; ++v) left[v] = combine(left[v], right[v]);
  }

  // The subtree over leaves [first, first + count), unrolled.
  template <int count>
  __device__ __forceinline__ void reduce_leaves(int window, int first, Partial (&result)[vector]) {
    if constexpr (count == 1) {
      load_and_reduce_leaf(window, first, result);
    } else {
      Partial right[vector];
      reduce_leaves<count / 2>(window, first, result);
      reduce_leaves<count / 2>(window, first + count / 2, right);
      combine_columns(result, right);
    }
  }

  // The subtree over this thread's leaves. The loop adds subtrees the way a binary counter adds
  // ones: open[k] holds a finished left subtree of 2^k of them, waiting for its right sibling.
  __device__ __forceinline__ void reduce_group(int window, Partial (&result)[vector]) {
    constexpr int step = group_leaves < unrolled_leaves ? group_leaves : unrolled_leaves;
    constexpr int steps = group_leaves / step;
    constexpr int levels = log2_of(steps);
    Partial open[levels ? levels : 1][vector];
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      reduce_leaves<step>(window, group * group_leaves + i * step, result);
      bool carries = true;
#pragma unroll
      for (int level = 0; level < levels; ++level) {
        if (carries && (i >> level & 1)) {
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
    for (int distance = lanes; distance < 32; distance *= 2) {
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
  __device__ __forceinline__ void reduce_cta(const Partial (&result)[vector], int64 output_row, bool writes) {
    if constexpr (C::reduce_warps == 1) {
      if (writes && group == 0) {
#pragma unroll
        for (int v = 0; v < vector; ++v) write_output(output_row, lane_column + v, finish(result[v]));
      }
    } else {
      constexpr int plane = C::reduce_warps * C::head_slice;
      constexpr int warp_groups = groups / C::reduce_warps;
      if (group % warp_groups == 0) {
        float* mine = partials + group / warp_groups * C::head_slice + lane_column;
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

  __device__ __forceinline__ void run() {
    if (!load_request<C>(p, int(blockIdx.x / slices), request)) return;
    for (int i = 0; i < request.windows; ++i) {
      Partial result[vector];
      reduce_group(request.first_window + i, result);
      reduce_warp(result);
      const int64 row = request.first_output + i;
      reduce_cta(result, row, row >= 0 && row < request.end_output);
      if (i + 1 < request.windows) __syncthreads();  // `partials` is read, and written again
    }
    if (!staged) stage_new_rows();
  }
};

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  extern __shared__ uint4 shared[];
  Compressor<C>(params, shared).run();
}

}  // namespace paged_kv_compress
