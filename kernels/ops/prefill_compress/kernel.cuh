// prefill_compress: a prefill whose compressed rows are the output.
#pragma once
#include "ops/prefill_compress/params.cuh"

#include "device/prefill.cuh"

namespace prefill_compress {

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  prefill<C, RowOutput<C>>(params);
}

}  // namespace prefill_compress
