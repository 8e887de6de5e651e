// The work of a CTA: a range of rows of kv_score, and its share of the requests that need old rows and of
// the rest rows.
//
// Every CTA checks all requests, so the balance depends on rows and windows and never on requests, and
// invalid metadata affect their own request only.
#pragma once
#include "device/rest_rows.cuh"
#include "device/window_stream.cuh"

template <class C>
struct RowRange {
  using Params = typename C::Params;
  static constexpr int warps = C::threads / 32;
  static constexpr int ratio = C::compress_ratio;
  static constexpr int chunk_requests = requests_per_thread<C> * C::threads;
  static constexpr int max_words = requests_per_thread<C> * warps;
  static constexpr int rest_bytes = (int(sizeof(typename RestRows<C>::Memory)) + 15) / 16 * 16;
  static constexpr int shared_bytes = rest_bytes + 2 * 2 * max_words * int(sizeof(uint32));

  const Params& p;
  const int begin, end;  // rows of kv_score
  RestRows<C> rest;
  int rest_rows;  // of this thread's requests of the chunk
  bool has_rest;  // whether any thread has such rows
  uint32* words;  // [2][stream, old][max_words]: a bit for every request of a chunk
  int parity;     // of the chunk, so that one barrier per chunk is enough
  int chunk;      // the requests that are read together
  int chunk_words;  // that the chunk has
  int word;       // the current one
  uint32 bits;    // of that word that are left

  int old_seen;  // requests with old windows before that word
  int old_rank;  // of the next such request that is this CTA's

  // The windows of the current request.
  int request;
  int window, end_window;
  int row;                         // of kv_score, the window's first
  int first_reduced, end_reduced;  // the windows that are reduced here
  int target_of_window_0;          // a window's output row is this + its number
  bool lead;
  StoreRule<C> store_rule;

  __device__ __forceinline__ RowRange(const Params& params, const ThreadPart<C>& part, int index,
                                      char* memory)
      : p(params),
        begin(index * params.range_rows),
        end(begin + min_of(params.range_rows, params.num_tokens - begin)),
        rest{params, part, *reinterpret_cast<typename RestRows<C>::Memory*>(memory), index},
        words(reinterpret_cast<uint32*>(memory + rest_bytes)),
        store_rule(params, Request{}) {
    parity = old_seen = window = end_window = 0;
    old_rank = index;
    lead = false;
  }

  // ---- Requests ---------------------------------------------------------------------------------

  __device__ __forceinline__ int chunks() const {
    return (p.batch + chunk_requests - 1) / chunk_requests;
  }

  // Finds the requests of a chunk that have work here. The first pass also notes the rest rows.
  template <bool first_pass>
  __device__ __forceinline__ void scan(int number) {
    chunk = number;
    parity ^= 1;
    const int first = chunk * chunk_requests;
    const int count = min_of(p.batch - first, chunk_requests);
    const int per_thread = (count + C::threads - 1) / C::threads;
    chunk_words = per_thread * warps;
    rest_rows = 0;
#pragma unroll 1
    for (int k = 0; k < per_thread; ++k) {
      const int index = first + k * C::threads + int(threadIdx.x);
      Request r = {};
      const bool valid =
          index < p.batch && read_request<C>(p, index, load_lengths(p, index), r);
      const NewWindows<C> windows(r);
      const bool streams = valid && windows.end > windows.first && windows.low < end &&
                           windows.high > begin;
      const bool old = valid && p.reduces && windows.old_windows(r) > 0;
      const uint32 stream_bits = __ballot_sync(all_lanes, streams);
      const uint32 old_bits = __ballot_sync(all_lanes, old);
      if (threadIdx.x % 32 == 0) {
        word_of(0, k * warps + threadIdx.x / 32) = stream_bits;
        word_of(1, k * warps + threadIdx.x / 32) = old_bits;
      }
      if (first_pass) rest_rows += rest.put(k, valid, r, windows);
    }
    has_rest = __syncthreads_or(rest_rows);
    word = -1;
    bits = 0;
  }

  // Stores this CTA's share of the rest rows of the chunk's requests.
  __device__ __forceinline__ void store_rest() {
    if (has_rest) rest.store(chunk, rest_rows);
  }

  __device__ __forceinline__ uint32& word_of(int kind, int number) const {
    return words[(parity * 2 + kind) * max_words + number];
  }

  // The next request of the chunk whose old windows are this CTA's; false if there is none.
  __device__ __forceinline__ bool next_old(Request& r) {
    while (true) {
      const int left = __popc(bits);
      if (old_rank < old_seen + left) {
        for (; old_seen < old_rank; ++old_seen) bits &= bits - 1;
        old_rank += p.ranges;
        ++old_seen;
        const int index = take_bit();
        read_request<C>(p, index, load_lengths(p, index), r);
        r.windows = NewWindows<C>(r).old_windows(r);
        return true;
      }
      old_seen += left;
      if (++word == chunk_words) break;
      bits = word_of(1, word);
    }
    word = -1;  // for the stream
    bits = 0;
    return false;
  }

  // Ends the first pass.
  __device__ __forceinline__ void rewind() {
    if (chunks() <= 1) return;
    chunk = -1;
    word = chunk_words = 0;
  }

  // Takes the lowest bit; returns its request.
  __device__ __forceinline__ int take_bit() {
    const int bit = __ffs(bits) - 1;
    bits &= bits - 1;
    return chunk * chunk_requests + word * 32 + bit;
  }

  // ---- The stream -------------------------------------------------------------------------------

  // The next window of the stream; false if there is none. The same for all threads of the CTA.
  __device__ __forceinline__ bool next(StreamWindow& next_window) {
    while (window == end_window) {
      if (bits) {
        begin_request(take_bit());
      } else if (++word < chunk_words) {
        bits = word_of(0, word);
      } else if (chunk + 1 < chunks()) {
        scan<false>(chunk + 1);
      } else {
        return false;
      }
    }
    const bool reduces = !lead && window >= first_reduced && window < end_reduced;
    next_window = {row, request, window, reduces ? target_of_window_0 + window : -1,
                   store_rule.stored_rows(window), int(lead)};
    lead = false;
    ++window;
    row += ratio;
    return true;
  }

  // The windows of a request that begin in the range.
  __device__ __forceinline__ void begin_request(int index) {
    const int2 reserved = output_rows(p, index);
    Request r;
    read_request<C>(p, index, load_lengths(p, index), r);
    const NewWindows<C> windows(r);
    const int before = max_of(begin - windows.low, 0), past = max_of(end - windows.low, 0);
    request = index;
    // The range may go far beyond the request, and a sum of positions overflow.
    const int past_windows = int((uint32(past) + ratio - 1) / ratio);
    window = windows.first + int((uint32(before) + ratio - 1) / ratio);
    end_window = max_of(window, windows.first + min_of(past_windows, windows.end - windows.first));
    lead = C::overlap && window > windows.first && window < end_window;
    // A window that overlaps old rows is not reduced here, nor is one without an output row.
    const int64 window_of_row_0 = int64(r.first_window) - reserved.x;
    first_reduced = clamp(window_of_row_0, windows.first + int(C::overlap), end_window);
    end_reduced = p.reduces ? clamp(window_of_row_0 + reserved.y, window, end_window) : window;
    target_of_window_0 = int(-window_of_row_0);
    window -= int(lead);
    row = NewWindows<C>::row_of(r, window);
    store_rule = StoreRule<C>(p, r);
  }
};
