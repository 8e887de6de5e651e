// The metadata of one request. Params is the parameter struct of an op: it has the members kv_lens,
// cu_seq_lens, cu_outputs, num_tokens and num_outputs.
#pragma once
#include "device/types.cuh"

struct Request {
  int index;
  int new_tokens;
  int start;                  // position of its first new token
  int first_token;            // row of that token in kv_score
  int first_window, windows;  // the windows that close in this call
};

// The metadata as they are in memory.
struct Lengths {
  int length;      // tokens after the call
  int begin, end;  // rows of kv_score that are the request's
};

// The op has an argument new_tokens, and the call may give it.
template <class Params>
__device__ __forceinline__ auto counts_of(const Params& p, int) -> decltype(p.new_tokens) {
  return p.new_tokens;
}
template <class Params>
__device__ __forceinline__ const int* counts_of(const Params&, long) {
  return nullptr;
}

template <class Params>
__device__ __forceinline__ Lengths load_lengths(const Params& p, int index) {
  // All are loaded at once: a load that waits for another costs more than one that is not used.
  Lengths lengths = {p.kv_lens[index], p.cu_seq_lens[index], p.cu_seq_lens[index + 1]};
  // Where the unsigned sum wraps around, `end` is below `begin`, and the request is skipped.
  if (const int* counts = counts_of(p, 0))
    lengths.end = int(uint32(lengths.begin) + uint32(counts[index]));
  return lengths;
}

// Returns false if the metadata cannot be those of a request. Such a request is skipped.
template <class C>
__device__ __forceinline__ bool read_request(const typename C::Params& p, int index,
                                             const Lengths& lengths, Request& r) {
  const auto [length, begin, end] = lengths;
  // As unsigned values, the difference of two ordered ints does not overflow.
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

// The output rows [x, y) that are reserved for a request and exist.
template <class Params>
__device__ __forceinline__ int2 output_rows(const Params& p, int index) {
  const int* rows = p.cu_outputs + index;
  return make_int2(rows[0], min_of(rows[1], p.num_outputs));
}
