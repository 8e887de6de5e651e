// Where the compressed rows of a state op go: to the cache, after norm, RoPE, rotation and quantisation.
//
// A row needs all its columns at once, and the CTAs of a cluster have a slice of them each. They write
// their columns to the shared memory of one CTA, the row's owner, and a warp of it takes the row on. The
// rows of a cluster have their owners and warps in turn. The barrier between the two is split: a thread
// arrives when it has written its columns, and waits later. In a stream of rows (`streamed`) it waits
// when it has written its columns of the next row, so that no one waits for the last CTA to write.
#pragma once
#include "device/cluster.cuh"
#include "device/cta_barrier.cuh"
#include "device/output.cuh"
#include "device/row_store.cuh"
#include "device/window_shape.cuh"

// C and Params have the members that RowStore needs. C::row_is_bf16: a row is rounded to bf16 first.
template <class C, bool streamed>
struct CacheOutput {
  using Params = typename C::Params;
  using Row = WarpRow<C::head_dim>;
  static_assert(C::cluster == WindowShape<C>::slices);

  static constexpr bool early = true;
  static constexpr int warps = C::threads / 32;
  // Row k may be written while row k - 3 is read: its reader arrives for row k - 2 before it reads.
  static constexpr int buffers = 4;
  static constexpr int row_bytes = C::head_dim * int(sizeof(float));
  static constexpr int shared_bytes = buffers * row_bytes + 16;  // and a barrier

  const Params& p;
  char* memory;
  int count;          // rows that have been ended
  int64 last_row;     // the last of them
  RowMetadata last_metadata;
  RowMetadata metadata;  // of the row that is expected

  __device__ __forceinline__ CacheOutput(const Params& params, void* shared)
      : p(params), memory(static_cast<char*>(shared)), count(0), last_row(0), last_metadata{}, metadata{} {
    if constexpr (C::cluster > 1) {
      cluster_arrive();  // begin_row() waits until all CTAs of the cluster run
    } else {
      if (threadIdx.x == 0) barrier().init(C::threads);
      __syncthreads();
    }
  }

  __device__ __forceinline__ CtaBarrier barrier() const {
    return CtaBarrier(memory + buffers * row_bytes);
  }
  __device__ __forceinline__ void arrive() const {
    if constexpr (C::cluster > 1) cluster_arrive();
    else barrier().arrive();
  }
  // Waits until all columns of row number `number` have been written.
  __device__ __forceinline__ void wait(int number) const {
    if constexpr (C::cluster > 1) cluster_wait();
    else barrier().wait(number & 1);
  }

  static __device__ __forceinline__ uint32 owner(int number) { return uint32(number) % C::cluster; }
  __device__ __forceinline__ bool is_mine(int number) const {
    uint32 rank = 0;
    if constexpr (C::cluster > 1) rank = cluster_rank();
    return owner(number) == rank && uint32(number) / C::cluster % warps == threadIdx.x / 32;
  }
  __device__ __forceinline__ float* buffer(int number) const {
    return reinterpret_cast<float*>(memory + number % buffers * row_bytes);
  }

  __device__ __forceinline__ void expect(int64 row) {
    metadata = load_metadata(p, row);
    if (count == 0 && threadIdx.x * 128 < row_bytes)
      prefetch_to_l2(static_cast<const char*>(p.weight) +
                     threadIdx.x * (C::weight_is_bf16 ? 64 : 128));
  }

  __device__ __forceinline__ void begin_row() {
    if constexpr (C::cluster > 1)
      if (count == 0) cluster_wait();
  }

  __device__ __forceinline__ void write_column(int64, int column, float value) const {
    if constexpr (C::row_is_bf16) value = __uint_as_float(round_pair_to_bf16(value, 0.0f) << 16);
    if constexpr (C::cluster > 1)
      store_to_cta(shared_address(buffer(count) + column), owner(count), value);
    else
      buffer(count)[column] = value;
  }

  template <int N>
  __device__ __forceinline__ void write_columns(int64 row, int column,
                                                const Partial (&result)[N]) const {
#pragma unroll
    for (int v = 0; v < N; ++v) write_column(row, column + v, finish(result[v]));
  }

  __device__ __forceinline__ void end_row(int64 row) {
    if (streamed && count > 0) wait(count - 1);
    arrive();
    if (streamed && count > 0) take_last([] {});
    last_row = row;
    last_metadata = metadata;
    ++count;
    if (!streamed) take_last([&] { wait(count - 1); });
  }

  __device__ __forceinline__ void end() {
    if (streamed && count > 0) take_last([&] { wait(count - 1); });
  }

  // Takes the last row to the cache, if it is this warp's. All warps call `wait_for_columns`; what does
  // not depend on the row is loaded meanwhile.
  template <class Wait>
  __device__ __forceinline__ void take_last(const Wait& wait_for_columns) const {
    const RowPlace place = place_of(p, last_metadata);
    if (!place.exists || !is_mine(count - 1)) return wait_for_columns();
    wait_for_predecessor();
    const RowStore<C> store(p, place);
    wait_for_columns();
    Row row;
    load_columns(row);
    store.run(int(last_row), row);
  }

  // The lane's columns of the last row.
  __device__ __forceinline__ void load_columns(Row& row) const {
    const float* from = buffer(count - 1) + Row::first_column();
#pragma unroll
    for (int i = 0; i < Row::columns; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      row.x[i] = four.x;
      row.x[i + 1] = four.y;
      row.x[i + 2] = four.z;
      row.x[i + 3] = four.w;
    }
  }
};
