// prefill_compress_store: a prefill whose compressed rows go to the cache.
#pragma once
#include "ops/prefill_compress_store/params.cuh"

#include "device/cache_output.cuh"
#include "device/prefill.cuh"

namespace prefill_compress_store {

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  prefill<C, CacheOutput<C, true>>(params);
}

}  // namespace prefill_compress_store
