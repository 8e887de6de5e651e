// Which requests a reducing CTA of a decode step works on, one after the other.
//
// Without C::deal: C::requests_per_cta neighbouring ones. With it every CTA checks all requests, and those
// that close a window are dealt out, so the grid need not have more CTAs than run at once.
#pragma once
#include "device/request.cuh"

// Whether a request of a decode step exists and closes a window.
template <class C>
__device__ __forceinline__ bool closes_window(const typename C::Params& p, int index,
                                              const Lengths& lengths) {
  Request request;
  return index < p.batch && read_request<C>(p, index, lengths, request) && request.windows > 0;
}

template <class C>
class NeighbouringRequests {
 public:
  static constexpr int shared_bytes = 0;

  // `number` counts the CTAs that have the same columns.
  __device__ __forceinline__ NeighbouringRequests(const typename C::Params& p, int number, int, void*)
      : first(number * C::requests_per_cta), closing(1) {
    if constexpr (C::requests_per_cta > 1) {
      // Each lane checks one request, so that those that close nothing cost one load latency.
      const int lane = int(threadIdx.x % 32);
      const Lengths lengths = load_lengths(p, min_of(first + lane, p.batch - 1));
      const bool closes = lane < C::requests_per_cta && closes_window<C>(p, first + lane, lengths);
      closing = __ballot_sync(all_lanes, closes);
    }
  }

  // Whether there is a request. It may close no window if the CTA has no other.
  __device__ __forceinline__ bool has_one() const { return closing; }
  __device__ __forceinline__ int index() const { return first + __ffs(closing) - 1; }
  __device__ __forceinline__ void advance() { closing &= closing - 1; }

 private:
  const int first;
  uint32 closing;  // bit i: request `first` + i
};

// Of the n-th request that closes a window the CTA number n % count takes a slice.
template <class C>
class DealtRequests {
 public:
  static constexpr int warps = C::threads / 32;
  static constexpr int each = min_of(8, 32 / warps);  // requests that a thread checks at once
  static constexpr int words = each * warps;          // of 32 requests; a lane keeps one
  static constexpr int shared_bytes = 32 * int(sizeof(uint32));

  __device__ __forceinline__ DealtRequests(const typename C::Params& params, int number, int ctas,
                                           void* memory)
      : p(params), count(ctas), shared(static_cast<uint32*>(memory)), first(0), turn(number), seen(0) {
    if (ctas >= p.batch) {  // each has one request
      first = number;
      word = threadIdx.x % 32 == 0;
      rank = number;
      end = number + 1;
      checked = p.batch;
    } else {
      check();
    }
  }

  __device__ __forceinline__ bool has_one() {
    while (turn >= end) {
      if (checked >= p.batch) return false;
      first = checked;
      check();
    }
    return true;
  }

  __device__ __forceinline__ int index() const {
    const uint32 owner = __ballot_sync(all_lanes, rank <= turn && turn < rank + __popc(word));
    const int lane = __ffs(owner) - 1;
    uint32 bits = __shfl_sync(all_lanes, word, lane);
    for (int skipped = __shfl_sync(all_lanes, rank, lane); skipped < turn; ++skipped) bits &= bits - 1;
    return first + lane * 32 + __ffs(bits) - 1;
  }

  __device__ __forceinline__ void advance() { turn += count; }

 private:
  // Checks the requests from `first` on. Lane i gets those number 32 * i to 32 * i + 31.
  __device__ __forceinline__ void check() {
    Lengths lengths[each];
#pragma unroll
    for (int k = 0; k < each; ++k)
      lengths[k] = load_lengths(p, min_of(first + k * C::threads + int(threadIdx.x), p.batch - 1));
    __syncthreads();  // the last words have been read
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int index = first + k * C::threads + int(threadIdx.x);
      const uint32 bits = __ballot_sync(all_lanes, closes_window<C>(p, index, lengths[k]));
      if (threadIdx.x % 32 == 0) shared[k * warps + threadIdx.x / 32] = bits;
    }
    __syncthreads();
    const int lane = int(threadIdx.x % 32);
    word = lane < words ? shared[lane] : 0;
    int before = __popc(word);  // and of the lanes before
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(all_lanes, before, distance);
      if (lane >= distance) before += other;
    }
    rank = seen + before - __popc(word);
    seen = end = seen + __shfl_sync(all_lanes, before, 31);
    checked = first + 32 * words;
  }

  const typename C::Params& p;
  const int count;
  uint32* shared;
  int first;    // of the requests that were checked last
  int checked;  // requests before this one have been checked
  int turn;     // rank of the CTA's next request among those that close a window
  int seen;     // requests that close a window and were checked
  int end;      // ranks below are known
  uint32 word;  // bit i: this lane's request i closes a window
  int rank;     // of the first of them
};

template <class C>
using ClosingRequests = choose<C::deal, DealtRequests<C>, NeighbouringRequests<C>>;
