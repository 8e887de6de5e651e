// The windows of a request whose rows are all new, and where they are in kv_score.
#pragma once
#include "device/request.cuh"

// Of the requests that a CTA reads together.
template <class C>
constexpr int requests_per_thread = C::threads < 256 ? 4 : 2;

// Windows [first, end). The new rows of the window before are [first_token, low) of kv_score; those of
// the window after, [high, end_token).
template <class C>
struct NewWindows {
  int first, end;
  int low, high, end_token;

  __device__ __forceinline__ explicit NewWindows(const Request& r) {
    first = int((uint32(r.start) + C::compress_ratio - 1) / C::compress_ratio);
    end = max_of(first, r.first_window + r.windows);
    end_token = r.first_token + r.new_tokens;
    low = r.first_token + min_of(offset(r, first), r.new_tokens);
    high = r.first_token + min_of(offset(r, end), r.new_tokens);
  }

  // Row of kv_score of a window's first token.
  static __device__ __forceinline__ int row_of(const Request& r, int window) {
    return r.first_token + offset(r, window);
  }

  // The same, from the request's first new token. The difference of the positions does not overflow.
  static __device__ __forceinline__ int offset(const Request& r, int window) {
    return int(uint32(window) * C::compress_ratio - uint32(r.start));
  }

  // How many of the windows that close need old rows: they have some, or overlap a window that has.
  __device__ __forceinline__ int old_windows(const Request& r) const {
    return min_of(r.windows, first + int(C::overlap) - r.first_window);
  }
};
