// contrastive_loss and sigmoid_loss: reductions over s[m, n] = scale[m] * <x[m], y[n]>, G problems.
#pragma once

#include "common/params.h"

namespace fmm {

constexpr int64_t kDotsTile = 96 * 96;
constexpr int64_t kDotsHeader = 16;  // floats before a tile of 16-bit products: their step

// Floats of a kept tile of products.
inline int64_t dots_tile_floats(DType dtype) {
  return dtype == DType::kBFloat16 ? kDotsHeader + kDotsTile / 2 : kDotsTile;
}

// int64 [G, rows]; data == nullptr: absent.
struct Indices {
  const int64_t* data = nullptr;
  int64_t stride[2] = {0, 0};

  int64_t at(int64_t g, int64_t i) const { return data[g * stride[0] + i * stride[1]]; }
};

struct PairLoss {
  int64_t G, M, N, D;
  Tensor4 x, y;        // stride[1] unused
  const float* scale;  // [G, M] contiguous, or one value
  bool scale_per_row;
  Indices positives;     // row i matches column positives[i], if that is in [0, N)
  Indices ids_x, ids_y;  // equal ids match as well
  bool ignore;           // ... or leave the denominator
  bool normalize;        // rows to unit length
  // Raw products that a forward leaves for its backward: cpu/kept_dots.h. nullptr: none.
  float* dots = nullptr;
  int64_t dots_tiles = 0;

  float row_scale(int64_t g, int64_t i) const { return scale[scale_per_row ? g * M + i : 0]; }
};

// [6, G, rows]: lse of negatives, lse of positives, sum of positive s, their number, sum of all s,
// number of all; natural units.
struct ContrastiveStats {
  double *x, *y;
  bool want_x, want_y;
};

// coef [5, G, rows]: lse, weight, target, uniform, gradient at a single positive (or 2).
struct ContrastiveGrad {
  const double *coef_x, *coef_y;
  void *dx, *dy;  // contiguous, nullptr where not needed
  float* dscale;  // [G, M] or nullptr
};

struct SigmoidTerms {
  float bias;
  float* loss;  // [G, M], row sums
};

struct SigmoidGrad {
  float bias;
  const float* dloss;  // [G, M]
  void *dx, *dy;
  float *dscale, *dbias;  // [G, M] or nullptr
};

}  // namespace fmm
