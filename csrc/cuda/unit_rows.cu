// Rows of unit length and the gradient through them, a warp a row; the latter also undoes the
// factor that fp16 gradients carry.
#include "../common/switch.h"
#include "pair_loss.h"

namespace fmm::cuda {
namespace {

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <typename T>
__device__ inline const T* row_of(const Tensor4& x, int64_t g, int64_t row) {
  return static_cast<const T*>(x.data) + g * x.stride[0] + row * x.stride[2];
}

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    unit_rows_kernel(const __grid_constant__ UnitRows a) {
  const int64_t at = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= a.G * a.M) return;
  const T* x = row_of<T>(a.x, at / a.M, at % a.M);
  T* unit = static_cast<T*>(a.unit) + at * a.D;
  float squares = 0.0f;
  for (int64_t d = lane; d < a.D; d += 32) {
    const float v = static_cast<float>(x[d * a.x.stride[3]]);
    squares += v * v;
  }
  const float norm = sqrtf(warp_sum(squares));
  const float inv = 1.0f / (norm < 1e-12f ? 1e-12f : norm);  // NaN stays NaN
  if (lane == 0) a.inv[at] = inv;
  for (int64_t d = lane; d < a.D; d += 32) {
    unit[d] = static_cast<T>(static_cast<float>(x[d * a.x.stride[3]]) * inv);
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    unit_grad_kernel(const __grid_constant__ UnitGrad a) {
  const int64_t at = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= a.G * a.M) return;
  const float* du = a.du + at * a.D;
  T* dx = static_cast<T*>(a.dx) + at * a.D;
  const float peak = *a.peak;
  if (a.inv == nullptr) {
    for (int64_t d = lane; d < a.D; d += 32) dx[d] = static_cast<T>(peak * du[d]);
    return;
  }
  const T* x = row_of<T>(a.x, at / a.M, at % a.M);
  const float inv = a.inv[at];
  float along = 0.0f;
  for (int64_t d = lane; d < a.D; d += 32) {
    along += static_cast<float>(x[d * a.x.stride[3]]) * inv * du[d];
  }
  along = warp_sum(along);
  for (int64_t d = lane; d < a.D; d += 32) {
    const float u = static_cast<float>(x[d * a.x.stride[3]]) * inv;
    dx[d] = static_cast<T>(peak * (inv * (du[d] - u * along)));
  }
}

}  // namespace

const void* unit_rows(DType dtype) {
  return pick(dtype, [](auto type) {
    return reinterpret_cast<const void*>(&unit_rows_kernel<typename decltype(type)::Type>);
  });
}
const void* unit_grad(DType dtype) {
  return pick(dtype, [](auto type) {
    return reinterpret_cast<const void*>(&unit_grad_kernel<typename decltype(type)::Type>);
  });
}

}  // namespace fmm::cuda
