// The way of a compressed row to the cache: norm, RoPE, rotation, quantisation, store. One warp has it.
//
// Params has the members that ops/row_spec.py lists in ROW_PARAMS, and the op's tensors with their strides.
// C has the constants of ROW_CONSTANTS: a kernel is compiled for a format, a rounding and the outputs.
#pragma once
#include "device/memory.cuh"
#include "device/quantise.cuh"
#include "device/row_math.cuh"

// The values of C::rounding, in the order of ROUNDINGS in ops/row_spec.py.
constexpr int round_once = 0, round_before_codes = 1, round_codes_from_bf16 = 2, round_each_step = 3;
// The values of C::latent_out and C::rows_out, in the order of OUTPUTS.
constexpr int no_output = 0, bf16_output = 1;

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
  int64 page = 0;
  if (exists) page = slot >> 32 ? slot / p.rows_per_page : uint32(slot) / uint32(p.rows_per_page);
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
  static constexpr int first_rotated = C::head_dim - C::rope_dim;
  // Lanes that share the scale of a block; 0: a page holds no scales.
  static constexpr int block_lanes = C::scale_code >= scale_fp32 ? C::block / columns : 0;
  static constexpr int scale_count = block_lanes ? C::code_columns / C::block : 0;
  // Bytes of the codes of a row. The columns behind code_columns are stored as bf16 behind them.
  static constexpr int code_bytes = C::code_columns * C::code_bits / 8;

  const Params& p;
  const RowPlace place;
  float weight[columns];
  float cosine[columns / 2], sine[columns / 2];

  // Loads what does not depend on the row. The place must exist.
  __device__ __forceinline__ RowStore(const Params& params, const RowPlace& row_place)
      : p(params), place(row_place) {
    const int column = Row::first_column();
    load_weight(column);
    if constexpr (C::rope_dim > 0) {
      const float* pair = p.rope_table + place.position * p.rope_position_stride +
                          int64((column - first_rotated) / 2) * p.rope_pair_stride;
#pragma unroll
      for (int i = 0; i < columns / 2; ++i, pair += p.rope_pair_stride) {
        const bool rotated = Row::template is_rotated<first_rotated>(2 * i);
        cosine[i] = rotated ? *pair : 1.0f;
        sine[i] = rotated ? pair[p.rope_part_stride] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void load_weight(int column) {
    using weight_dtype = choose<C::weight_is_bf16, bf16, float>;
    const auto v =
        load<weight_dtype, columns>(static_cast<const weight_dtype*>(p.weight) + column, true);
#pragma unroll
    for (int i = 0; i < columns; ++i) weight[i] = ::column(v, i);
  }

  // Takes row number `index` to the cache and to the optional outputs.
  __device__ __forceinline__ void run(int index, Row& row) const {
    constexpr bool each_step = C::rounding == round_each_step;
    if constexpr (each_step) row.round_to_bf16();
    row.norm(weight, p.eps);
    if constexpr (each_step) row.round_to_bf16();
    write<C::latent_out>(p.latent_out, index * p.latent_out_stride, row);
    if constexpr (C::rope_dim > 0) row.template rope<first_rotated>(cosine, sine);
    if constexpr (each_step || C::rounding == round_codes_from_bf16) row.round_to_bf16();
    if constexpr (C::rotate) {
      row.hadamard();
      if constexpr (each_step) row.round_to_bf16();
    }
    write<C::rows_out>(p.rows_out, index * p.rows_out_stride, row);
    if constexpr (C::rounding == round_before_codes) row.round_to_bf16();
    store(index, row);
  }

  // A row of an optional output.
  template <int dtype>
  static __device__ __forceinline__ void write(void* output, int64 offset, const Row& row) {
    if constexpr (dtype != no_output) {
      using value_dtype = choose<dtype == bf16_output, bf16, float>;
      Vec<value_dtype, columns> rounded;
      round_columns(row.x, rounded);
      ::store(static_cast<value_dtype*>(output) + offset + Row::first_column(), rounded);
    }
  }

  // ---- Quantising --------------------------------------------------------------------------------

  __device__ __forceinline__ void store(int index, Row& row) const {
    uint8* page = p.cache + place.page * p.cache_stride;
    uint8* data = page + int64(place.row) * p.row_stride;
    const bool has_code = Row::first_column() < C::code_columns;  // else bf16, behind the codes
    if constexpr (block_lanes > 0) {
      const BlockScale scale = scale_of_block<C>(p, block_maximum(row));
      if (has_code) C::pow2 ? multiply(row, scale.reciprocal) : divide(row, scale.value);
      write_scale(page + p.scale_start + int64(place.row) * p.scale_stride, scale.code);
      if constexpr (C::scales_out)
        write_scale(p.scales_out + index * p.scales_out_stride, scale.code);
    } else if constexpr (C::scale_code == scale_tensor) {
      if (has_code && p.scale) divide(row, *p.scale);
    }
    write_codes(data, row, has_code);
    if constexpr (C::codes_out) write_codes(p.codes_out + index * p.codes_out_stride, row, has_code);
  }

  // Bits of the largest magnitude of the block that the lane's columns belong to.
  static __device__ __forceinline__ uint32 block_maximum(const Row& row) {
    uint32 amax = 0;
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      const uint32 magnitude = __float_as_uint(row.x[i]) & magnitude_bits;
      amax = magnitude > amax ? magnitude : amax;
    }
#pragma unroll
    for (int distance = 1; distance < block_lanes; distance *= 2) {
      const uint32 other = __shfl_xor_sync(all_lanes, amax, distance);
      amax = other > amax ? other : amax;
    }
    return amax;
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
  static __device__ __forceinline__ void write_scale(uint8* scales, uint32 code) {
    constexpr int width = C::scale_code == scale_fp32 ? 4 : 1, used = width * scale_count;
    const int lane = Row::lane(), block = lane / block_lanes;
    if (lane % block_lanes == 0 && block < scale_count) {
      if constexpr (width == 4) store_bytewise(scales + 4 * block, code);
      else scales[block] = uint8(code);
    }
#pragma unroll
    for (int i = used; i < C::scale_bytes; i += 32)
      if (i + lane < C::scale_bytes) scales[i + lane] = 0;
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
  static __device__ __forceinline__ void write_codes(uint8* data, const Row& row, bool has_code) {
    const int column = Row::first_column();
    if (C::code_columns < C::head_dim && !has_code)
      write_bf16(data + code_bytes + 2 * (column - C::code_columns), row);
    else if constexpr (C::code_bits == 4)
      write_fp4(data + column / 2, row);
    else if constexpr (C::code_bits == 8)
      write_fp8(data + column, row);
    else if constexpr (C::code_bits == 16)
      write_bf16(data + 2 * column, row);
    else
      write_fp32(data + 4 * column, row);
  }

  static __device__ __forceinline__ void write_fp8(uint8* at, const Row& row) {
    uint32 word[columns / 4];
#pragma unroll
    for (int i = 0; i < columns; i += 4)
      word[i / 4] = encode_pair_e4m3<C::ties_down>(row.x[i], row.x[i + 1]) |
                    encode_pair_e4m3<C::ties_down>(row.x[i + 2], row.x[i + 3]) << 16;
    store_bytes<columns>(at, word);
  }

  static __device__ __forceinline__ void write_fp4(uint8* at, const Row& row) {
    uint32 word[(columns + 7) / 8] = {};
#pragma unroll
    for (int i = 0; i < columns; ++i)
      word[i / 8] |= encode_e2m1<C::ties_down>(row.x[i]) << 4 * (i % 8);
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
