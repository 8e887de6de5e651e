// paged_kv_compress: a decode step whose compressed rows are the output.
#pragma once
#include "ops/paged_kv_compress/params.cuh"

#include "device/decode.cuh"

namespace paged_kv_compress {

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  decode<C, RowOutput<C>>(params);
}

}  // namespace paged_kv_compress
