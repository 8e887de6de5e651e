// paged_kv_compress: stores the new tokens' rows in the paged state and reduces each window that
// they close to one output row. Reducing never waits for the store: it takes the new rows from
// kv_score.
//
// Two schedules, the same bits. Direct: a CTA per request and slice reduces, gone at once where no
// window closes, and other CTAs store. Persistent: no more CTAs than the GPU holds find the requests
// that close a window, deal them out among them, fetch one window while they reduce another, and
// share the store.
#pragma once
#include "paged_kv_compress/store.cuh"
#include "paged_kv_compress/window.cuh"

namespace paged_kv_compress {

// The output rows reserved for a request, of those that there are: [x, y).
__device__ __forceinline__ int2 output_rows(const Params& p, int index) {
  const int* rows = p.cu_outputs + index;
  return make_int2(rows[0], min_of(rows[1], p.num_outputs));
}

// ---- Direct -------------------------------------------------------------------------------------

// CTA `cta` of all the reducing ones. The loop over a thread's leaves adds them the way a binary
// counter adds ones: open[k] holds a finished left subtree of 2^k leaves, waiting for its right
// sibling.
template <class C>
__device__ __forceinline__ void reduce_request(const Params& p, uint4* shared, uint32 cta) {
  using window_t = Window<C>;
  constexpr int slices = C::head_dim / C::head_slice;
  constexpr int levels = log2_of(window_t::group_leaves);
  window_t window(p, shared, int(cta % slices));
  Request request;
  if (!load_request<C>(p, int(cta / slices), request) || !request.windows) return;
  const int2 reserved = output_rows(p, request.index);
  for (int i = 0; i < request.windows; ++i) {
    Partial result[window_t::vector];
    Partial open[levels ? levels : 1][window_t::vector];
#pragma unroll 1
    for (int leaf = 0; leaf < window_t::group_leaves; ++leaf) {
      const auto place = window.locate(request, request.first_window + i, leaf);
      const auto fetched = window.fetch(request, place);
      window.accept(fetched);
      window.reduce_leaf(fetched.any_present, result);
      bool carries = true;
#pragma unroll
      for (int level = 0; level < levels; ++level) {
        if (carries && (leaf >> level & 1)) {
          window.combine_columns(result, open[level]);
        } else if (carries) {
          carries = false;
#pragma unroll
          for (int v = 0; v < window_t::vector; ++v) open[level][v] = result[v];
        }
      }
    }
    window.reduce_warp(result);
    const int64 row = int64(reserved.x) + i;
    window.reduce_cta(result, row, row >= 0 && row < reserved.y);
    if (i + 1 < request.windows) __syncthreads();  // the partials are read; their slots are fetched to
  }
}

// What this CTA does, and which it is of those that do it.
struct Job {
  bool stores;
  uint32 number;
};

// CTAs that store are spread among those that reduce: they wait for the kernel ahead on the stream
// to end, and were they first, nothing would be read meanwhile; were they last, they would queue
// behind the many that may find no window.
__device__ __forceinline__ Job job_of(const Params& p, uint32 storing) {
  const uint32 before = __umulhi(blockIdx.x, p.storing_share);
  if (before < storing && __umulhi(blockIdx.x + 1, p.storing_share) > before) return {true, before};
  return {false, blockIdx.x - (before < storing ? before : storing)};
}

template <class C>
__device__ __forceinline__ void run_direct(const Params& p, uint4* shared) {
  const uint32 reducing = uint32(p.batch) * (C::head_dim / C::head_slice);
  const uint32 storing = gridDim.x - reducing;
  const Job job = job_of(p, storing);
  if (job.stores)
    Store<C>::store_items(p, job.number * C::threads + threadIdx.x, storing * C::threads);
  else
    reduce_request<C>(p, shared, job.number);
}

// ---- Persistent ---------------------------------------------------------------------------------

// Finds the requests that close a window among `capacity` neighbours. All threads of the CTA take
// part.
template <class C>
struct Closing {
  static constexpr int capacity = C::listed;  // a multiple of 32
  static constexpr int words = capacity / 32;
  static constexpr int each = (capacity + C::threads - 1) / C::threads;

  unsigned short* list;  // [capacity], in shared memory
  uint32* closes;        // [words], in shared memory: bit i of word w is for request 32 w + i
  int first;             // the first of the neighbours
  Lengths lengths[each];

  __device__ __forceinline__ explicit Closing(char* shared)
      : list(reinterpret_cast<unsigned short*>(shared)),
        closes(reinterpret_cast<uint32*>(shared + 2 * capacity)) {}

  static constexpr int shared_bytes = 2 * capacity + 4 * words;

  // Brings the lengths of those from `first_` on their way.
  __device__ __forceinline__ void look(const Params& p, int first_) {
    first = first_;
#pragma unroll
    for (int i = 0; i < each; ++i)
      lengths[i] = load_lengths(p, min_of(first + i * C::threads + int(threadIdx.x), p.batch - 1));
  }

  // Lists what there is of them, as numbers from `first` on, ascending; returns how many.
  __device__ __forceinline__ int make_list(const Params& p) {
    const int lane = int(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int offset = i * C::threads + int(threadIdx.x);
      Request request;
      const bool any = first + offset < p.batch &&
                       read_request<C>(p, first + offset, lengths[i], request) &&
                       request.windows > 0;
      const uint32 bits = __ballot_sync(0xffffffffu, any);
      if (lane == 0 && offset < capacity) closes[offset / 32] = bits;
    }
    __syncthreads();
    int count = 0;
#pragma unroll
    for (int word = 0; word < words; ++word) {
      const uint32 bits = closes[word];
      if (word % (C::threads / 32) == int(threadIdx.x / 32) && (bits >> lane & 1))
        list[count + __popc(bits & ((1u << lane) - 1))] =
            static_cast<unsigned short>(word * 32 + lane);
      count += __popc(bits);
    }
    __syncthreads();
    return count;
  }
};

// The windows that fall to one CTA, one after the other: those of the request of its own number,
// which it need not look for, then those of every stride-th closing request of the rest. The last
// CTA begins with the first of these: where few requests close a window, that spreads them.
template <class C>
struct Tasks {
  const Params& p;
  Closing<C>& closing;
  int own, stride;
  int beyond;      // the first request that no list has held yet
  int at, listed;  // in the list
  Request request;
  int window;      // of those that the request closes
  int2 reserved;   // the request's output rows

  __device__ __forceinline__ bool take_own() {
    const Lengths lengths = load_lengths(p, own);
    closing.look(p, stride);
    reserved = output_rows(p, own);
    window = 0;
    return read_request<C>(p, own, lengths, request) && request.windows;
  }

  // Takes up the neighbours that were looked at last.
  __device__ __forceinline__ void make_list() {
    listed = closing.make_list(p);
    beyond = closing.first + Closing<C>::capacity;
    at = stride - 1 - own;
  }

  __device__ __forceinline__ bool next() {
    if (++window < request.windows) return true;
    for (; at >= listed; make_list()) {
      if (beyond >= p.batch) return false;
      closing.look(p, beyond);
    }
    load_request<C>(p, closing.first + closing.list[at], request);
    reserved = output_rows(p, request.index);
    window = 0;
    at += stride;
    return true;
  }
};

template <class C>
__device__ __forceinline__ void store_share(const Params& p) {
  const uint32 items = uint32(p.batch) * Store<C>::row_vecs * (p.store_by_token ? C::next_n : 1);
  const uint32 step = gridDim.x * C::threads;
  for (uint32 item = blockIdx.x * C::threads + threadIdx.x; item < items;
       item += C::items_at_once * step)
    Store<C>::store_items(p, item, step);
}

template <class C>
__device__ __forceinline__ void run_persistent(const Params& p, uint4* shared) {
  using window_t = Window<C>;
  static_assert(window_t::group_leaves == 1, "a thread fetches one leaf ahead");
  constexpr int slices = C::head_dim / C::head_slice;  // the grid is a multiple of them
  window_t window(p, shared, int(blockIdx.x % slices));
  Closing<C> closing(reinterpret_cast<char*>(shared) + window_t::shared_bytes);
  Tasks<C> tasks{p, closing, int(blockIdx.x) / slices, int(gridDim.x) / slices};
  typename window_t::Fetched fetched;
  const auto fetch = [&] {
    const int index = tasks.request.first_window + tasks.window;
    fetched = window.fetch(tasks.request, window.locate(tasks.request, index, 0));
  };

  bool busy = tasks.take_own();
  if (busy) fetch();
  else tasks.request.windows = 0;
  tasks.make_list();
  store_share<C>(p);
  float* const partials = window.partials;
  for (int set = 0;; set ^= 1) {
    const int64 row = int64(tasks.reserved.x) + tasks.window;
    const bool writes = row >= 0 && row < tasks.reserved.y;
    const bool more = tasks.next();
    Partial result[window_t::vector];
    if (busy) {
      window.accept(fetched);
      window.reduce_leaf(fetched.any_present, result);
    }
    if (more) fetch();
    if (busy) {
      window.reduce_warp(result);
      window.partials = partials + set * window_t::partial_floats;
      window.reduce_cta(result, row, writes);
    }
    if (!more) break;
    busy = true;
  }
}

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  extern __shared__ uint4 shared[];
  launch_dependents();
  if (!params.prefetch_state) wait_for_predecessor();
  static_assert(C::shared_bytes ==
                Window<C>::shared_bytes + (C::persistent ? Closing<C>::shared_bytes : 0));
  if constexpr (C::persistent) run_persistent<C>(params, shared);
  else run_direct<C>(params, shared);
  // One CTA is enough to keep the grid from ending before the one ahead of it.
  if (blockIdx.x == 0) wait_for_predecessor();
}

}  // namespace paged_kv_compress
