// The way of a compressed row to the cache: norm, RoPE, rotation, quantisation, store.
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
  if (exists) {
    // A multiplication costs less than a division; up to 2^31 it does.
    if (slot >> 31) page = slot / p.rows_per_page;
    else page = int64(uint64(slot) * p.rows_multiplier >> p.rows_shift);
  }
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

// Most warps that can share a row: a block of a scale, and a rotation, belong to one warp.
template <class C>
__device__ constexpr int most_row_warps() {
  if (C::rotate) return 1;
  int warps = max_of(1, C::head_dim / 128);  // a lane has four columns or more
  while (warps > 1 && C::block > C::head_dim / warps) warps /= 2;
  return warps;
}

// A lane's part of what a row is computed with. `many_rows`: the weight is held in fp32, for many rows.
template <class C, int warps, bool many_rows = false>
struct RowFactors {
  using Row = RowPart<C::head_dim, warps>;
  static constexpr int columns = Row::columns;
  static constexpr int first_rotated = C::head_dim - C::rope_dim;

  using weight_dtype = choose<C::weight_is_bf16, bf16, float>;

  Vec<choose<many_rows, float, weight_dtype>, columns> weight;
  float cosine[columns / 2], sine[columns / 2];

  __device__ __forceinline__ void load_weight(const typename C::Params& p) {
    const auto* from = static_cast<const weight_dtype*>(p.weight) + Row::first_column();
    const auto loaded = load_shared_by_ctas<weight_dtype, columns>(from, true);
    if constexpr (many_rows) {
#pragma unroll
      for (int i = 0; i < columns; ++i) weight.word[i] = __float_as_uint(column(loaded, i));
    } else {
      weight = loaded;
    }
  }

  // `position` is one that rope_table has.
  __device__ __forceinline__ void load_angles(const typename C::Params& p, int position) {
    if constexpr (C::rope_dim > 0) {
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) {
        cosine[i] = 1.0f;
        sine[i] = 0.0f;
      }
      if (Row::first_column() + columns <= first_rotated) return;
      const float* pair = p.rope_table + position * p.rope_position_stride +
                          int64((Row::first_column() - first_rotated) / 2) * p.rope_pair_stride;
      if constexpr (first_rotated % columns == 0) {
        using Vector = Vec<float, columns / 2>;
        const float* sines = pair + p.rope_part_stride;
        const uint64 either = reinterpret_cast<uint64>(pair) | reinterpret_cast<uint64>(sines);
        if (p.rope_pair_stride == 1 && either % alignof(Vector) == 0) {
          const auto c = load_shared_by_ctas<float, columns / 2>(pair, true);
          const auto s = load_shared_by_ctas<float, columns / 2>(sines, true);
#pragma unroll
          for (int i = 0; i < columns / 2; ++i) {
            cosine[i] = column(c, i);
            sine[i] = column(s, i);
          }
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < columns / 2; ++i, pair += p.rope_pair_stride) {
        if (!Row::template is_rotated<first_rotated>(2 * i)) continue;
        cosine[i] = *pair;
        sine[i] = pair[p.rope_part_stride];
      }
    }
  }
};

// The largest value among `lanes` neighbouring lanes, a power of two.
template <int lanes>
__device__ __forceinline__ uint32 maximum_of_lanes(uint32 value) {
#if __CUDA_ARCH__ >= 800
  if constexpr (lanes == 32) return __reduce_max_sync(all_lanes, value);
#endif
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) {
    const uint32 other = __shfl_xor_sync(all_lanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// Takes rows to the cache. `warps` warps share a row.
template <class C, int warps>
struct RowStore {
  using Params = typename C::Params;
  using Row = RowPart<C::head_dim, warps>;
  static constexpr int columns = Row::columns;
  // Lanes that share the scale of a block; 0: a page holds no scales.
  static constexpr int block_lanes = C::scale_code >= scale_fp32 ? C::block / columns : 0;
  static constexpr int scale_count = block_lanes ? C::code_columns / C::block : 0;
  static_assert(warps <= most_row_warps<C>() && block_lanes <= 32);
  // Bytes of the codes of a row. The columns behind code_columns are stored as bf16 behind them.
  static constexpr int code_bytes = C::code_columns * C::code_bits / 8;

  const Params& p;
  const RowPlace& place;  // which exists

  // Takes row number `index` to the cache and to the optional outputs. Source: load<N>(column, x) loads N
  // columns of the row from `column` on.
  // Factors: RowFactors.
  template <class Source, class Factors>
  __device__ __forceinline__ void run(int index, const Source& source, const Factors& factors) const {
    constexpr bool each_step = C::rounding == round_each_step;
    Row row;
    source.load(Row::first_column(), row.x);
    if constexpr (each_step) row.round_to_bf16();
    row.norm(factors.weight, rstd_of<C::head_dim>(squares(source, row), p.eps));
    if constexpr (each_step) row.round_to_bf16();
    write<C::latent_out>(p.latent_out, index * p.latent_out_stride, row);
    if constexpr (C::rope_dim > 0)
      row.template rope<Factors::first_rotated>(factors.cosine, factors.sine);
    if constexpr (each_step || C::rounding == round_codes_from_bf16) row.round_to_bf16();
    if constexpr (C::rotate) {
      row.hadamard();
      if constexpr (each_step) row.round_to_bf16();
    }
    write<C::rows_out>(p.rows_out, index * p.rows_out_stride, row);
    if constexpr (C::rounding == round_before_codes) row.round_to_bf16();
    store(index, row);
  }

  // Of all columns. Every warp adds them up by itself: to meet would take longer.
  template <class Source>
  static __device__ __forceinline__ float squares(const Source& source, const Row& row) {
    float x[warps][columns];
#pragma unroll
    for (int part = 0; part < warps; ++part) {
      if constexpr (warps > 1)
        source.load((part * 32 + int(threadIdx.x % 32)) * columns, x[part]);
#pragma unroll
      for (int i = 0; warps == 1 && i < columns; ++i) x[part][i] = row.x[i];
      if constexpr (C::rounding == round_each_step) round_columns_to_bf16(x[part]);
    }
    return sum_of_squares(x);
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
      if (has_code) {
        if constexpr (C::pow2) multiply(row, scale.reciprocal);
        else if constexpr (C::scale_code == scale_fp32) divide_block(row.x, scale.value);
        else divide_columns(row.x, scale.value);
      }
      write_scale(page + p.scale_start + int64(place.row) * p.scale_stride, scale.code);
      if constexpr (C::scales_out)
        write_scale(p.scales_out + index * p.scales_out_stride, scale.code);
    } else if constexpr (C::scale_code == scale_tensor) {
      if (has_code && p.scale) divide_columns(row.x, *p.scale);
    }
    write_codes(data, row, has_code);
    if constexpr (C::codes_out) write_codes(p.codes_out + index * p.codes_out_stride, row, has_code);
  }

  // Bits of the largest magnitude of the block that the lane's columns belong to.
  static __device__ __forceinline__ uint32 block_maximum(const Row& row) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < columns; ++i) amax = larger_magnitude(amax, row.x[i]);
    return maximum_of_lanes<block_lanes>(__float_as_uint(amax));
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
    for (int i = used; i < C::scale_bytes; i += 32 * warps)
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
    for (int i = 0; i < columns; i += 2)
      word[i / 8] |= encode_pair_e2m1<C::ties_down>(row.x[i], row.x[i + 1]) << 4 * (i % 8);
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
