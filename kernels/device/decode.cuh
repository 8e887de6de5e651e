// A decode step: stores the new tokens' rows in the paged state and reduces each window that they close.
//
// Reducing and storing need no order between them: a window takes its new rows from kv_score. Two
// schedules, the same bits. Split: a CTA either reduces a slice of some requests, or stores. Fused: a
// CTA does both for a slice of one request. An Output takes the reduced rows: device/output.cuh has the
// plain one, device/cache_output.cuh another. Where CTAs form clusters, those of a cluster have the
// slices of one request, or they all store.
#pragma once
#include "device/closing_requests.cuh"
#include "device/decode_store.cuh"
#include "device/request_windows.cuh"

// ---- Split --------------------------------------------------------------------------------------

// One slice of the windows of some requests. `cta` counts the CTAs that reduce.
template <class C, class Output>
__device__ __forceinline__ void reduce_requests(const typename C::Params& p, uint4* shared, uint32 cta,
                                                Output& output, void* memory) {
  using Shape = WindowShape<C>;
  const ThreadPart<C> part(int(cta % Shape::slices));
  HeldRows<C> held(shared);
  ClosingRequests<C> requests(p, int(cta / Shape::slices), p.reducing / Shape::slices, memory);
  for (bool again = false; requests.has_one(); requests.advance(), again = true) {
    const int index = requests.index();
    const int2 reserved = output_rows(p, index);
    Request request;
    if (!read_request<C>(p, index, load_lengths(p, index), request)) return;
    if (C::reduce_warps > 1 && again) __syncthreads();  // the last window's partials are read
    RequestWindows<C, Output>{p, request, part, held, shared, output, reserved}.reduce(0);
  }
}

// What a CTA does, and its number among the CTAs that do it.
struct Job {
  bool stores;
  uint32 number;
};

// CTAs that store are spread among those that reduce, a cluster at a time. They wait for the
// predecessor: if they were first in the grid, they would hold their places on the SMs meanwhile and
// nothing would be read; if they were last, they would queue behind the many CTAs that find no window
// to close.
template <class C>
__device__ __forceinline__ Job job_of(const typename C::Params& p, uint32 storing) {
  if (storing == gridDim.x) return {true, blockIdx.x};
  const uint32 cluster = blockIdx.x / C::cluster, rank = blockIdx.x % C::cluster;
  storing /= C::cluster;
  const uint32 before = __umulhi(cluster, p.storing_share);
  if (before < storing && __umulhi(cluster + 1, p.storing_share) > before)
    return {true, before * C::cluster + rank};
  return {false, (cluster - (before < storing ? before : storing)) * C::cluster + rank};
}

template <class C, class Output>
__device__ __forceinline__ void run_split(const typename C::Params& p, uint4* shared, Output& output,
                                          void* memory) {
  const uint32 storing = gridDim.x - uint32(p.reducing);
  const Job job = job_of<C>(p, storing);
  if (job.stores)
    Store<C>::run(p, job.number * C::threads + threadIdx.x, storing * C::threads);
  else
    reduce_requests<C>(p, shared, job.number, output, memory);
}

// ---- Fused --------------------------------------------------------------------------------------

// Old rows are in flight while new rows are loaded and stored.
template <class C, class Output>
__device__ __forceinline__ void run_fused(const typename C::Params& p, uint4* shared, Output& output) {
  using Shape = WindowShape<C>;
  const ThreadPart<C> part(int(blockIdx.x % Shape::slices));
  HeldRows<C> held(shared);
  const int index = int(blockIdx.x / Shape::slices);
  const int2 reserved = output_rows(p, index);
  Request request;
  if (!read_request<C>(p, index, load_lengths(p, index), request)) return;
  if (!p.reduces) request.windows = 0;
  const RequestWindows<C, Output> windows{p, request, part, held, shared, output, reserved};
  StoreSlice<C> store(p, request, part, held);
  LeafFetch<C> rows = windows.fetch(request.first_window, 0);
  if (request.windows) {
    windows.begin(0);
    rows.start_old([&] { output.load_factors(); });
  }
  store.run(rows.present);
  if (!request.windows) return;
  Partial result[Shape::vector];
  windows.reduce_leaf(rows, result);
  WindowReduce<C>::reduce_warp(result);
  windows.write(0, result);
  windows.reduce(1);
}

template <class C, class Output>
__device__ __forceinline__ void decode(const typename C::Params& params) {
  extern __shared__ uint4 shared[];
  constexpr int rows_bytes = max_of(HeldRows<C>::shared_bytes, WarpPartials<C>::shared_bytes);
  constexpr int list_bytes = ClosingRequests<C>::shared_bytes;
  static_assert(C::shared_bytes == rows_bytes + list_bytes + Output::shared_bytes);
  char* memory = reinterpret_cast<char*>(shared) + rows_bytes;
  launch_dependents();
  if (params.prefetch == prefetch_none) wait_for_predecessor();
  Output output(params, memory + list_bytes);
  if constexpr (C::fused) run_fused<C>(params, shared, output);
  else run_split<C>(params, shared, output, memory);
  output.end();
  // One CTA that waits is enough: the grid does not end before its predecessor.
  if (blockIdx.x == 0) wait_for_predecessor();
}
