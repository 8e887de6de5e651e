// paged_kv_compress_store: a decode step whose compressed rows go to the cache.
#pragma once
#include "ops/paged_kv_compress_store/params.cuh"

#include "device/cache_output.cuh"
#include "device/decode.cuh"

namespace paged_kv_compress_store {

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  decode<C, CacheOutput<C, false>>(params);
}

}  // namespace paged_kv_compress_store
