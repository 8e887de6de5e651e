// toy: y = factor * x, one CTA per row.
#pragma once
#include "ops/toy/params.cuh"

#include "device/stream_order.cuh"

namespace toy {

template <class C>
__device__ __forceinline__ void run(const Params& params) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x;
  if (row >= params.rows) return;
  const float* x = params.x + row * params.x_stride;
  float* y = params.y + row * params.y_stride;
  constexpr int width = C::vectors ? 4 : 1;
  for (int column = width * threadIdx.x; column < C::columns; column += C::step)
#pragma unroll
    for (int i = 0; i < width; ++i) y[column + i] = params.factor * x[column + i];
}

}  // namespace toy
