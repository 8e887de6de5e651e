// Which new rows prefill_compress stores.
#pragma once
#include "device/request.cuh"
#include "ops/prefill_compress/params.cuh"

template <class C>
struct StoreRule<C, prefill_compress::Params> {
  static constexpr bool every_row = false;
  static constexpr int write_all = 0;  // write_state: all, tail
  static constexpr int ratio = C::compress_ratio;

  int first_whole;  // the first window of which all rows are stored
  int length;       // of the request; 0 if it does not restart
  uint32 state_period;

  __device__ __forceinline__ StoreRule(const prefill_compress::Params& p, const Request& request) {
    const int tokens = request.start + request.new_tokens;
    const int kept = tokens - min_of(p.max_rollback, tokens);
    first_whole = p.write_state == write_all ? 0 : int(uint32(kept) / ratio) - int(C::overlap);
    length = p.state_period ? tokens : 0;
    state_period = p.state_period;
  }

  // How many of the first rows of a window are stored if they are new.
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
