// Prefill: reduces every window that closes, whatever the number of new tokens, and stores the new rows
// that are to be stored. An Output takes the reduced rows, as in device/decode.cuh.
//
// Every CTA first reduces its share of the windows that need old rows, as decode does. Then it stores its
// share of the new rows that belong to no window of new rows. At last it reduces and stores the windows of
// new rows that begin in its range of rows of kv_score, as a stream.
#pragma once
#include "device/store_rule.cuh"

#include "device/request_windows.cuh"
#include "device/row_range.cuh"

// Windows that need old rows: at most two of a request.
template <class C, class Output>
__device__ __forceinline__ void reduce_old(const typename C::Params& p, RowRange<C>& range,
                                           const ThreadPart<C>& part, uint4* shared, Output& output) {
  HeldRows<C> held(shared);
  Request request;
  while (range.next_old(request)) {
    const int2 reserved = output_rows(p, request.index);
    RequestWindows<C, Output>{p, request, part, held, shared, output, reserved}.reduce(0);
    __syncthreads();  // shared memory has been read
  }
}

// Each turn starts the copies of one window, if there is one, and takes the window of `ahead` turns ago.
// Each has one copy group, so that all but the last `ahead` groups are those of windows to take.
template <class C, class Output>
__device__ __forceinline__ void run_stream(RowRange<C>& range, WindowStream<C, Output>& stream) {
  constexpr int ahead = WindowStream<C, Output>::ahead;
  int fetched = 0, free = 0, stage = 0, before = C::stages - 1;
  bool more = true;
  stream.start();
  for (int turn = 0;; ++turn) {
    StreamWindow window;
    more = more && range.next(window);
    if (more) {
      if (!fetched) stream.load_ape();
      stream.fetch(free, window);
      free = free + 1 == C::stages ? 0 : free + 1;
      ++fetched;
    }
    end_copy_group();
    if (turn < ahead) continue;
    if (turn - ahead == fetched) break;
    wait_for_groups<ahead>();
    stream.take(stage, before);
    before = stage;
    stage = stage + 1 == C::stages ? 0 : stage + 1;
  }
  stream.join_pending();
}

template <class C, class Output>
__device__ __forceinline__ void prefill(const typename C::Params& params) {
  using Stream = WindowStream<C, Output>;
  constexpr int slices = WindowShape<C>::slices;
  extern __shared__ uint4 shared[];
  constexpr int most_bytes =
      max_of(Stream::shared_bytes, max_of(HeldRows<C>::shared_bytes, WarpPartials<C>::shared_bytes));
  constexpr int work_bytes = (most_bytes + 15) / 16 * 16;
  constexpr int range_bytes = (RowRange<C>::shared_bytes + 15) / 16 * 16;
  static_assert(C::shared_bytes == work_bytes + range_bytes + Output::shared_bytes);
  char* memory = reinterpret_cast<char*>(shared);
  launch_dependents();
  const int slice = int(blockIdx.x % slices), index = int(blockIdx.x / slices);
  if (params.prefetch == prefetch_none) wait_for_predecessor();
  Output output(params, memory + work_bytes + range_bytes);
  Stream stream(params, output, slice, shared);
  RowRange<C> range(params, stream.part, index, memory + work_bytes);
  for (int chunk = 0; chunk < range.chunks(); ++chunk) {
    range.template scan<true>(chunk);
    if (params.prefetch < prefetch_state) wait_for_predecessor();
    reduce_old(params, range, stream.part, shared, output);  // first: it begins with old rows
    range.store_rest();
  }
  range.rewind();
  run_stream(range, stream);
  output.end();
  // One CTA that waits is enough: the grid does not end before its predecessor.
  if (blockIdx.x == 0) wait_for_predecessor();
}
