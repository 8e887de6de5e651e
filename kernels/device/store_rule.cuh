// Which new rows of a request an op stores.
#pragma once
#include "device/request.cuh"

// An op without write_state stores all of them.
template <class C, bool has_write_state = C::has_write_state>
struct StoreRule {
  static constexpr bool every_row = true;
  __device__ __forceinline__ StoreRule(const typename C::Params&, const Request&) {}

  // How many of the first rows of a window are stored if they are new.
  __device__ __forceinline__ int stored_rows(int) const { return C::compress_ratio; }
};

template <class C>
struct StoreRule<C, true> {
  static constexpr bool every_row = false;
  static constexpr int write_all = 0;  // write_state: all, tail
  static constexpr int ratio = C::compress_ratio;

  int first_whole;  // the first window of which all rows are stored
  int length;       // of the request; 0 if it does not restart
  uint32 state_period;

  __device__ __forceinline__ StoreRule(const typename C::Params& p, const Request& request) {
    const int tokens = request.start + request.new_tokens;
    const int kept = tokens - min_of(p.max_rollback, tokens);
    first_whole = p.write_state == write_all ? 0 : int(uint32(kept) / ratio) - int(C::overlap);
    length = p.state_period ? tokens : 0;
    state_period = p.state_period;
  }

  __device__ __forceinline__ int stored_rows(int window) const {
    if (window >= first_whole) return ratio;
    if (!length) return 0;
    // The last restart that reads the window, and so the most of its rows.
    const uint32 past = uint32(window + 1 + int(C::overlap)) * ratio;
    const uint32 last = past > uint32(length) ? uint32(length) : past - 1;
    const int restart = int(last / state_period * state_period);
    return min_of(max_of(restart - window * ratio, 0), ratio);
  }
};
