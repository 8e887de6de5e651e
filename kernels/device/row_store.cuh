// The way of a compressed row to the cache: norm, RoPE, rotation, quantisation, store. One warp has it.
//
// Params has the members that ops/row_spec.py lists, and the op's tensors with their strides.
#pragma once
#include "device/memory.cuh"
#include "device/quantise.cuh"
#include "device/row_math.cuh"

// The values of Params::rounding, in the order of ROUNDINGS in ops/row_spec.py.
constexpr int round_once = 0, round_before_codes = 1, round_codes_from_bf16 = 2, round_each_step = 3;

// The metadata of a row as they are in memory. To load them early costs no wait.
struct RowMetadata {
  int position;
  int64 slot;
};

template <class Params>
__device__ __forceinline__ RowMetadata load_metadata(const Params& p, int64 row) {
  return {p.positions[row], p.slots[row]};
}

// Where a row goes.
struct RowPlace {
  int position;  // in rope_table
  int64 page;
  int row;  // of the page
  bool exists;
};

template <class Params>
__device__ __forceinline__ RowPlace place_of(const Params& p, const RowMetadata& metadata) {
  const auto [position, slot] = metadata;
  const bool exists = position >= 0 && position < p.max_pos && slot >= 0 &&
                      slot < int64(p.cache_pages) * p.rows_per_page;
  const int64 page = exists ? slot / p.rows_per_page : 0;
  return {position, page, int(slot - page * p.rows_per_page), exists};
}

// N bytes to an address that is a multiple of 4, or of N where N is less.
template <int N>
__device__ __forceinline__ void store_bytes(uint8* at, const uint32 (&word)[(N + 3) / 4]) {
  if constexpr (N == 2) {
    *reinterpret_cast<unsigned short*>(at) = static_cast<unsigned short>(word[0]);
  } else if (N % 16 == 0 && reinterpret_cast<uint64>(at) % 16 == 0) {
#pragma unroll
    for (int i = 0; i + 3 < N / 4; i += 4)
      reinterpret_cast<uint4*>(at)[i / 4] =
          make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) reinterpret_cast<uint32*>(at)[i] = word[i];
  }
}

template <class C>
struct RowStore {
  using Params = typename C::Params;
  using Row = WarpRow<C::head_dim>;
  static constexpr int columns = Row::columns;

  const Params& p;
  const RowPlace place;
  float weight[columns];
  float cosine[columns / 2], sine[columns / 2];

  // Loads what does not depend on the row. The place must exist.
  __device__ __forceinline__ RowStore(const Params& params, const RowPlace& row_place)
      : p(params), place(row_place) {
    const int column = Row::first_column();
    load_weight(column);
    const float* pair =
        p.rope_table + place.position * p.rope_position_stride +
        int64((column - first_rotated()) / 2) * p.rope_pair_stride;
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) {
      const bool rotated = column + 2 * i >= first_rotated();
      cosine[i] = rotated ? pair[i * p.rope_pair_stride] : 1.0f;
      sine[i] = rotated ? pair[i * p.rope_pair_stride + p.rope_part_stride] : 0.0f;
    }
  }

  __device__ __forceinline__ int first_rotated() const { return C::head_dim - 2 * p.rope_pairs; }

  __device__ __forceinline__ void load_weight(int column) {
    if (p.weight_is_bf16) {
      const auto v = load<bf16, columns>(static_cast<const bf16*>(p.weight) + column, true);
#pragma unroll
      for (int i = 0; i < columns; ++i) weight[i] = ::column(v, i);
    } else {
      const auto v = load<float, columns>(static_cast<const float*>(p.weight) + column, true);
#pragma unroll
      for (int i = 0; i < columns; ++i) weight[i] = ::column(v, i);
    }
  }

  // Takes row number `index` to the cache and to the optional outputs.
  __device__ __forceinline__ void run(int index, Row& row) const {
    const bool each_step = p.rounding == round_each_step;
    if (each_step) row.round_to_bf16();
    row.norm(weight, p.eps);
    if (each_step) row.round_to_bf16();
    if (p.latent_out)
      write(p.latent_out, p.latent_out_is_bf16, index * p.latent_out_stride, row);
    row.rope(first_rotated(), cosine, sine);
    if (each_step || p.rounding == round_codes_from_bf16) row.round_to_bf16();
    if (p.rotate) {
      row.hadamard();
      if (each_step) row.round_to_bf16();
    }
    if (p.rows_out) write(p.rows_out, p.rows_out_is_bf16, index * p.rows_out_stride, row);
    if (p.rounding == round_before_codes) row.round_to_bf16();
    store(index, row);
  }

  // A row of an optional output.
  static __device__ __forceinline__ void write(void* output, bool is_bf16, int64 offset,
                                               const Row& row) {
    offset += Row::first_column();
    if (is_bf16) {
      Vec<bf16, columns> rounded;
      round_columns(row.x, rounded);
      ::store(static_cast<bf16*>(output) + offset, rounded);
    } else {
      Vec<float, columns> exact;
      round_columns(row.x, exact);
      ::store(static_cast<float*>(output) + offset, exact);
    }
  }

  // ---- Quantising --------------------------------------------------------------------------------

  __device__ __forceinline__ void store(int index, Row& row) const {
    uint8* page = p.cache + place.page * p.cache_stride;
    uint8* data = page + int64(place.row) * p.row_stride;
    uint8* scales = page + p.scale_start + int64(place.row) * p.scale_stride;
    uint8* codes_out = p.codes_out ? p.codes_out + index * p.codes_out_stride : nullptr;
    uint8* scales_out = p.scales_out ? p.scales_out + index * p.scales_out_stride : nullptr;
    const bool has_code = Row::first_column() < p.code_columns;  // else bf16, behind the codes
    if (p.block_lanes) {
      const BlockScale scale = block_scale(row);
      if (has_code && p.pow2) multiply(row, scale.reciprocal);
      if (has_code && !p.pow2) divide(row, scale.value);
      write_scale(scales, scale.code);
      if (scales_out) write_scale(scales_out, scale.code);
    } else if (p.scale_code == scale_tensor && p.scale) {
      if (has_code) divide(row, *p.scale);
    }
    write_codes(data, row, has_code);
    if (codes_out) write_codes(codes_out, row, has_code);
  }

  // The scale of the block that the lane's columns belong to.
  __device__ __forceinline__ BlockScale block_scale(const Row& row) const {
    uint32 amax = 0;
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      const uint32 magnitude = __float_as_uint(row.x[i]) & magnitude_bits;
      amax = magnitude > amax ? magnitude : amax;
    }
    for (int distance = 1; distance < p.block_lanes; distance *= 2) {
      const uint32 other = __shfl_xor_sync(all_lanes, amax, distance);
      amax = other > amax ? other : amax;
    }
    return scale_of_block(p, amax);
  }

  static __device__ __forceinline__ void divide(Row& row, float scale) {
#pragma unroll
    for (int i = 0; i < columns; ++i) row.x[i] = divide_by_scale(row.x[i], scale);
  }

  // A product with an exact reciprocal is rounded as the quotient is.
  static __device__ __forceinline__ void multiply(Row& row, float reciprocal) {
#pragma unroll
    for (int i = 0; i < columns; ++i) row.x[i] = __fmul_rn(row.x[i], reciprocal);
  }

  // The scale of the lane's block, by the block's first lane, and the zeros behind all scales.
  __device__ __forceinline__ void write_scale(uint8* scales, uint32 code) const {
    const int lane = Row::lane(), block = lane / p.block_lanes;
    const bool writes = lane % p.block_lanes == 0 && block < p.scale_count;
    int used = p.scale_count;
    if (p.scale_code == scale_fp32) {
      if (writes) store_bytewise(scales + 4 * block, code);
      used *= 4;
    } else if (writes) {
      scales[block] = uint8(code);
    }
    for (int i = used + lane; i < p.scale_bytes; i += 32) scales[i] = 0;
  }

  // A word to any address.
  static __device__ __forceinline__ void store_bytewise(uint8* at, uint32 word) {
    if (reinterpret_cast<uint64>(at) % 4 == 0) {
      *reinterpret_cast<uint32*>(at) = word;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[i] = uint8(word >> 8 * i);
    }
  }

  // The lane's columns, as codes or as bf16 behind the codes.
  __device__ __forceinline__ void write_codes(uint8* data, const Row& row, bool has_code) const {
    const int column = Row::first_column();
    if (!has_code) return write_bf16(data + p.code_bytes + 2 * (column - p.code_columns), row);
    if (p.code_bits == 8) return write_fp8(data + column, row);
    if (p.code_bits == 4) return write_fp4(data + column / 2, row);
    if (p.code_bits == 16) return write_bf16(data + 2 * column, row);
    write_fp32(data + 4 * column, row);
  }

  __device__ __forceinline__ void write_fp8(uint8* at, const Row& row) const {
    uint32 word[columns / 4];
#pragma unroll
    for (int i = 0; i < columns; i += 4)
      word[i / 4] = encode_pair_e4m3(row.x[i], row.x[i + 1], p.ties_down) |
                    encode_pair_e4m3(row.x[i + 2], row.x[i + 3], p.ties_down) << 16;
    store_bytes<columns>(at, word);
  }

  __device__ __forceinline__ void write_fp4(uint8* at, const Row& row) const {
    uint32 word[(columns + 7) / 8] = {};
#pragma unroll
    for (int i = 0; i < columns; ++i)
      word[i / 8] |= encode_e2m1(row.x[i], p.ties_down) << 4 * (i % 8);
    store_bytes<columns / 2>(at, word);
  }

  static __device__ __forceinline__ void write_bf16(uint8* at, const Row& row) {
    uint32 word[columns / 2];
#pragma unroll
    for (int i = 0; i < columns; i += 2) word[i / 2] = round_pair_to_bf16(row.x[i], row.x[i + 1]);
    store_bytes<2 * columns>(at, word);
  }

  static __device__ __forceinline__ void write_fp32(uint8* at, const Row& row) {
    uint32 word[columns];
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      const uint32 bits = __float_as_uint(row.x[i]);
      word[i] = (bits & magnitude_bits) > infinity_bits ? nan_bits : bits;
    }
    store_bytes<4 * columns>(at, word);
  }
};
