// Where the compressed rows of a state op go: to the cache, after norm, RoPE, rotation and quantisation.
//
// A row needs all its columns at once, and the CTAs of a cluster have a slice of them each. They write
// their columns to the shared memory of one CTA, the row's owner, and warps of it take the row on. The
// rows of a cluster have their owners and warps in turn. Barriers are split: a thread arrives when it has
// written its columns, and waits later. In a stream of rows (`streamed`) a row is taken on when its warp
// has written its columns of the next row, so that it hardly waits for the others.
//
// Without a stream, what a row is computed with is loaded before its rows are; `prefetch` covers it.
#pragma once
#include "device/cluster.cuh"
#include "device/cta_barrier.cuh"
#include "device/output.cuh"
#include "device/row_store.cuh"
#include "device/window_shape.cuh"

// The columns of a row in shared memory.
struct BufferedRow {
  const float* row;

  template <int N>
  __device__ __forceinline__ void load(int first, float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + first + i);
      x[i] = four.x;
      x[i + 1] = four.y;
      x[i + 2] = four.z;
      x[i + 3] = four.w;
    }
  }
};

// C and Params have the members that RowStore needs. C::row_is_bf16: a row is rounded to bf16 first.
template <class C, bool streamed>
struct CacheOutput {
  using Params = typename C::Params;
  static constexpr bool clustered = C::cluster > 1;
  static_assert(C::cluster == WindowShape<C>::slices);

  static constexpr bool early = true;
  static constexpr int warps = C::threads / 32;
  // Warps that share a row. In a stream other rows keep the other warps busy.
  static constexpr int row_warps = streamed ? 1 : min_of(warps, most_row_warps<C>());
  static_assert(warps % row_warps == 0);
  // In a cluster row k may be written while row k - 3 is read: its reader arrives for row k - 2 first.
  // Without one a thread waits until a buffer has been read.
  static constexpr int buffers = 4;
  static constexpr int row_bytes = C::head_dim * int(sizeof(float));
  static constexpr int shared_bytes = buffers * (row_bytes + 2 * CtaBarrier::bytes);

  const Params& p;
  char* memory;          // rows, then the barriers `written` and `read` of each
  int count;             // rows that have been ended
  RowMetadata metadata;  // not streamed: of the row that is expected
  int last_row;          // streamed: the last row that was ended
  RowPlace place;        // of the row that is expected or, streamed, of the last; if it is this warp's
  RowFactors<C, row_warps> factors;

  __device__ __forceinline__ CacheOutput(const Params& params, void* shared)
      : p(params), memory(static_cast<char*>(shared)), count(0), metadata{}, last_row(0), place{} {
    if constexpr (clustered) {
      cluster_arrive();  // begin_row() waits until all CTAs of the cluster run
    } else {
      if (threadIdx.x < buffers) {
        written(int(threadIdx.x)).init(C::threads);
        read(int(threadIdx.x)).init(32 * row_warps);
      }
      __syncthreads();
    }
  }

  // ---- Buffers and barriers ----------------------------------------------------------------------

  __device__ __forceinline__ float* buffer(int number) const {
    return reinterpret_cast<float*>(memory + number % buffers * row_bytes);
  }
  __device__ __forceinline__ CtaBarrier barrier(int index) const {
    return CtaBarrier(memory + buffers * row_bytes + index * CtaBarrier::bytes);
  }
  __device__ __forceinline__ CtaBarrier written(int number) const { return barrier(number % buffers); }
  __device__ __forceinline__ CtaBarrier read(int number) const {
    return barrier(buffers + number % buffers);
  }
  static __device__ __forceinline__ int parity(int number) { return number / buffers & 1; }

  static __device__ __forceinline__ uint32 owner(int number) { return uint32(number) % C::cluster; }
  // Whether this warp is one of those that take row number `number` on.
  __device__ __forceinline__ bool is_mine(int number) const {
    uint32 rank = 0;
    if constexpr (clustered) rank = cluster_rank();
    const uint32 turn = uint32(number) / C::cluster % (warps / row_warps);
    return uniform(owner(number) == rank && turn == threadIdx.x / (32 * row_warps));
  }

  // ---- Output ------------------------------------------------------------------------------------

  __device__ __forceinline__ void expect(int64 row) {
    if (!streamed) metadata = load_metadata(p, row);
    if (count == 0 && threadIdx.x * 128 < row_bytes)
      prefetch_to_l2(static_cast<const char*>(p.weight) +
                     threadIdx.x * (C::weight_is_bf16 ? 64 : 128));
  }

  __device__ __forceinline__ void load_factors() {
    if (streamed || !is_mine(count)) return;
    place = place_of(p, metadata);
    if (!uniform(place.exists)) return;
    factors.load_angles(p, place.position);
    factors.load_weight(p);
  }

  __device__ __forceinline__ void begin_row() {
    if constexpr (clustered) {
      if (count == 0) cluster_wait();
    } else {
      if (count >= buffers) read(count).wait(parity(count - buffers));
    }
  }

  __device__ __forceinline__ void write_column(int64, int column, float value) const {
    if constexpr (C::row_is_bf16) value = __uint_as_float(round_pair_to_bf16(value, 0.0f) << 16);
    if constexpr (clustered)
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
    if constexpr (clustered) {
      if (streamed && count > 0) cluster_wait();
      cluster_arrive();
      if (!streamed) cluster_wait();
    } else {
      written(count).arrive();
    }
    if constexpr (streamed) {
      take_last();
      last_row = int(row);
    } else if (is_mine(count)) {
      take(count, int(row));
    }
    ++count;
  }

  __device__ __forceinline__ void end() {
    if (!streamed || count == 0) return;
    if constexpr (clustered) cluster_wait();
    take_last();
  }

  // ---- Rows of this warp -------------------------------------------------------------------------

  // Takes the last row of the stream to the cache, if it is this warp's.
  __device__ __forceinline__ void take_last() {
    if (count == 0 || !is_mine(count - 1)) return;
    place = place_of(p, load_metadata(p, last_row));
    if (uniform(place.exists)) factors.load_weight(p);
    take(count - 1, last_row);
  }

  // Takes row number `number` to the cache, if it has a place there.
  __device__ __forceinline__ void take(int number, int row) {
    if constexpr (!clustered) written(number).wait(parity(number));
    if (uniform(place.exists)) {
      wait_for_predecessor();
      // Loaded earlier they would take registers that the stream has.
      if constexpr (streamed) factors.load_angles(p, place.position);
      RowStore<C, row_warps>{p, place}.run(row, BufferedRow{buffer(number)}, factors);
    }
    if constexpr (!clustered) read(number).arrive();
  }
};
