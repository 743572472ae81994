// sigmoid_loss on a chunk of products: each tile's row sums of softplus(-z * s), and w = scale * ds
// / peak for the two products of the backward. No atomics.
#include "pair_tile.cuh"

namespace fmm::cuda {
namespace {

// log(1 + exp(v)); small values keep all their bits.
__device__ inline float softplus(float v) {
  return fmaxf(v, 0.0f) + log1pf(exp2_fast(-fabsf(v) * kLog2e));
}

__global__ void __launch_bounds__(PairTile::kThreads)
    sigmoid_parts_kernel(const __grid_constant__ SigmoidParts p) {
  const Scores& a = p.scores;
  const PairPlace at(a);
  PairAcc x;
  float scale[kPairMT][2], sum[kPairMT][2];
  PairBits pos, out;
  load_dots(x, a, at);
  load_scale(scale, a, at);
  find_matches(pos, out, a, at);
  const float bias = *p.bias;
  fold_rows(sum, Add(), [&](int m, int n, int i) {
    const float s = x[m][n][i] * scale[m][i / 2] + bias;
    return out.has(m, n, i) ? 0.0f : softplus(pos.has(m, n, i) ? -s : s);
  });
  store_rows(p.part + (at.tile_n * a.G + at.g) * a.M, a, at, sum);
}

template <typename T>
__global__ void __launch_bounds__(PairTile::kThreads)
    sigmoid_ds_kernel(const __grid_constant__ SigmoidDs p) {
  const Scores& a = p.scores;
  const PairPlace at(a);
  PairAcc x;
  float scale[kPairMT][2], along[kPairMT][2], sum[kPairMT][2];
  PairBits pos, out;
  load_dots(x, a, at);
  load_scale(scale, a, at);
  find_matches(pos, out, a, at);
  const float bias = *p.bias, inverse = 1.0f / *p.peak;
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int m = k / 2, h = k % 2, row = at.row_of(m, 2 * h);
    const float weight = row < a.M ? p.dloss[at.g * p.dloss_stride + row] : 0.0f;
    float total = 0.0f, products = 0.0f;
#pragma unroll
    for (int j = 0; j < 2 * kPairNT; ++j) {
      const int n = j / 2, i = 2 * h + j % 2;
      const float s = x[m][n][i] * scale[m][h] + bias;
      const bool match = pos.has(m, n, i);
      const float sigma = __fdividef(1.0f, 1.0f + exp2_fast((match ? s : -s) * kLog2e));
      const float ds = out.has(m, n, i) ? 0.0f : weight * (match ? -sigma : sigma);
      total += ds, products += ds * x[m][n][i];
      x[m][n][i] = ds * scale[m][h] * inverse;
    }
    along[m][h] = quad_sum(products), sum[m][h] = quad_sum(total);
  }
  float* part = p.part + (at.tile_n * 2 * a.G + at.g) * a.M;
  store_rows(part, a, at, along);
  store_rows(part + a.G * a.M, a, at, sum);
  if (p.w) store_w<T>(p.w, a, at, [&](int m, int n, int i) { return x[m][n][i]; });
}

}  // namespace

const void* sigmoid_parts() { return reinterpret_cast<const void*>(&sigmoid_parts_kernel); }
const void* sigmoid_ds(DType dtype) {
  return pick(dtype, [](auto type) {
    return reinterpret_cast<const void*>(&sigmoid_ds_kernel<typename decltype(type)::Type>);
  });
}

}  // namespace fmm::cuda
