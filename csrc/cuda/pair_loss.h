// What the kernels of contrastive_loss and sigmoid_loss take: a chunk of raw products that fits the
// workspace, and what turns it into scores. No torch headers.
#pragma once

#include "../pair_loss.h"

namespace fmm::cuda {

// G problems of M rows against N columns, s[g, m, n] = scale[g, m] * dots[g, m, n].
struct Scores {
  const float* dots = nullptr;  // [G, M, pitch], N of a row in use; pitch is even
  int64_t G = 0, M = 0, N = 0, pitch = 0;
  const float* scale = nullptr;  // [G, M]
  int64_t scale_stride[2] = {0, 0};
  Indices positives, ids_x, ids_y;
  bool ignore = false;
};

// Statistics of a tile's rows or columns, [tiles, kPartStats, G, L]: the maximum of the negatives
// and the sum of exp(s - maximum), the same of the positives, their sum and number, the sum of all
// and their number.
enum PartStat { kNegTop, kNegSum, kPosTop, kPosSum, kSumPos, kCountPos, kTotal, kCount };
constexpr int kPartStats = 8;

struct ContrastiveParts {
  Scores scores;
  float *x, *y;  // by tiles of columns [.., M], by tiles of rows [.., N]; nullptr where not wanted
};

// Parts of `tiles` tiles into ContrastiveStats' six, which are joined to what is there if `join`.
struct Merge {
  const float* part;
  int64_t tiles, G, L;
  double* stats;
  int64_t stride[2];  // of a statistic, of a problem
  bool join;
};

// Coefficients of ContrastiveGrad of one axis.
struct Coefficients {
  const double* data;
  int64_t stride[2];  // of a coefficient, of a problem
};

// w = scale * ds / peak, [G, M, pitch] of the data's type; nullptr: not needed. May be `dots`.
struct ContrastiveDs {
  Scores scores;
  Coefficients x, y;
  void* w;
  const float* peak;
  float* part;  // [tiles of columns, G, M]: sums of ds * dots
};

struct SigmoidParts {
  Scores scores;
  const float* bias;
  float* part;  // [tiles of columns, G, M]
};

struct SigmoidDs {
  Scores scores;
  const float* bias;
  const float* dloss;  // [G, M]
  int64_t dloss_stride;
  void* w;
  const float* peak;
  float* part;  // [tiles of columns, 2, G, M]: sums of ds * dots, of ds
};

// Rows of x [G, M, D] at unit length, u = inv * x.
struct UnitRows {
  Tensor4 x;  // stride[1] unused
  int64_t G, M, D;
  float* inv;  // [G, M] = 1 / max(|x|, 1e-12)
  void* unit;  // [G, M, D] of x's type
};

// dx = peak * (inv * (du - u * <u, du>)), or peak * du where inv == nullptr.
struct UnitGrad {
  Tensor4 x;
  int64_t G, M, D;
  const float *inv, *du, *peak;
  void* dx;  // [G, M, D] of x's type
};

constexpr int kRowsPerBlock = 8;  // of the two kernels over UnitRows and UnitGrad, a warp each
constexpr int kMergeThreads = 128;

// Kernels as launchers see them.
const void* contrastive_parts();
const void* contrastive_merge();
const void* contrastive_ds(DType dtype);
const void* sigmoid_parts();
const void* sigmoid_ds(DType dtype);
const void* unit_rows(DType dtype);
const void* unit_grad(DType dtype);

}  // namespace fmm::cuda
