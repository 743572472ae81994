// What a pair loss does by rows: unit length and the gradient through it, which also undoes the
// factor that fp16 gradients carry; losses; and the facts that the backward needs.
#include <limits>

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
  const float peak = a.peak ? *a.peak : 1.0f;
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

constexpr double kLog2e = 1.4426950408889634f;  // as the kernels round it
constexpr double kInf = std::numeric_limits<double>::infinity();

__global__ void __launch_bounds__(kFactThreads)
    fact_rows_kernel(const __grid_constant__ FactRows a) {
  const int64_t at = int64_t{blockIdx.x} * kFactThreads + threadIdx.x;
  if (at >= a.G * a.padded) return;
  const int64_t g = at / a.padded, i = at % a.padded;
  float fact[kFacts] = {};
  fact[kLseHi] = kInf, fact[kSingle] = 2.0f;
  int mate = -1;
  if (i < a.L) {
    const float inverse = a.peak ? 1.0f / *a.peak : 1.0f;
    fact[kWeight] = a.weight ? a.weight[g * a.L + i] : 1.0f;
    fact[kScale] = a.scale ? a.scale[g * a.scale_stride[0] + i * a.scale_stride[1]] : 1.0f;
    if (a.coef) {
      const double* c = a.coef + g * a.L + i;
      const int64_t step = a.G * a.L;
      const double lse = c[0] * kLog2e;
      fact[kLseHi] = static_cast<float>(lse);
      if (fabs(lse) < kInf) fact[kLseLo] = static_cast<float>(lse - fact[kLseHi]);
      fact[kWeight] = static_cast<float>(c[step]);
      fact[kTarget] = static_cast<float>(c[2 * step]);
      fact[kShift] = static_cast<float>(c[step] * c[3 * step]);
      fact[kSingle] = static_cast<float>(c[4 * step]);
    }
    fact[kWeight] *= inverse, fact[kShift] *= inverse;
    if (a.mate.data) {
      const int64_t m = a.mate.data[g * a.mate.stride[0] + i * a.mate.stride[1]];
      if (m >= 0 && m < (1 << 30)) mate = static_cast<int>(m);
    }
    if (a.id.data) {
      const int64_t id = a.id.data[g * a.id.stride[0] + i * a.id.stride[1]];
      fact[kIdLow] = __int_as_float(static_cast<int>(id));
      fact[kIdHigh] = __int_as_float(static_cast<int>(id >> 32));
    }
  }
  fact[kMate] = __int_as_float(mate);
#pragma unroll
  for (int k = 0; k < kFacts; ++k) a.facts[(k * a.G + g) * a.padded + i] = fact[k];
}

__global__ void __launch_bounds__(kFactThreads)
    loss_rows_kernel(const __grid_constant__ ContrastiveRows a) {
  const int64_t i = int64_t{blockIdx.x} * kFactThreads + threadIdx.x;
  if (i < a.rows) contrastive_row(a, i);
}

}  // namespace

Kernel loss_rows() {
  const auto f = &loss_rows_kernel;
  return {reinterpret_cast<const void*>(f), kFactThreads, 0, kFactThreads, 0};
}
Kernel fact_rows() {
  return {reinterpret_cast<const void*>(&fact_rows_kernel), kFactThreads, 0, kFactThreads, 0};
}
Kernel unit_rows(DType dtype) {
  return pick(dtype, [](auto type) {
    const auto f = &unit_rows_kernel<typename decltype(type)::Type>;
    return Kernel{reinterpret_cast<const void*>(f), kRowsPerBlock, 0, 32 * kRowsPerBlock, 0};
  });
}
Kernel unit_grad(DType dtype) {
  return pick(dtype, [](auto type) {
    const auto f = &unit_grad_kernel<typename decltype(type)::Type>;
    return Kernel{reinterpret_cast<const void*>(f), kRowsPerBlock, 0, 32 * kRowsPerBlock, 0};
  });
}

}  // namespace fmm::cuda
