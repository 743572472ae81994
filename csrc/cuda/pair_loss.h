// What the kernels of contrastive_loss and sigmoid_loss take. Products come from the streams by
// tensor cores ("fused") or from memory, a chunk that fits the workspace ("stored"). No torch
// headers.
#pragma once

#include "../contrastive_row.h"
#include "../pair_loss.h"
#include "attention_kernels.h"

namespace fmm::cuda {

// G problems of M rows against N columns, s[g, m, n] = scale[g, m] * <x[g, m], y[g, n]>.
struct Scores {
  const float* dots = nullptr;  // stored products [G, M, pitch], N of a row in use; pitch is even
  int64_t G = 0, M = 0, N = 0, pitch = 0;
  const float* scale = nullptr;  // [G, M]
  int64_t scale_stride[2] = {0, 0};
  Indices positives, ids_x, ids_y;
  bool ignore = false;
  const float* bias = nullptr;  // of sigmoid_loss
};

// Statistics of some rows or columns, [parts, kPartStats, G, L]: the maximum of the negatives in
// base 2 and the sum of 2^(s - maximum), the same of the positives, their sum and number, the sum
// of all and their number.
enum PartStat { kNegTop, kNegSum, kPosTop, kPosSum, kSumPos, kCountPos, kTotal, kCount };
constexpr int kPartStats = 8;

// A block owns rows and walks one of `splits` parts of the columns. contrastive_loss leaves parts
// of rows by splits and of columns by tiles of rows (nullptr: not wanted), sigmoid_loss [splits, G,
// M].
struct PairForward {
  Scores scores;
  Strided x, y;
  int64_t D, splits;
  float *part_x, *part_y;
};

// Parts of contrastive_loss into ContrastiveStats' six, which are joined to what is there if
// `join`.
struct Merge {
  const float* part;
  int64_t parts, G, L;
  double* stats;
  int64_t stride[2];  // of a statistic, of a problem
  bool join;
};

// What the backward knows of a row or column, [kFacts, G, padded]: lse in base 2 as hi + lo,
// weight, weight * uniform, target, value at a single positive, factor of s, index of its match
// (int32 bits, -1: none), id.
// clang-format off
enum Fact {
  kLseHi, kLseLo, kWeight, kShift, kTarget, kSingle, kScale, kMate, kIdLow, kIdHigh, kFacts
};
// clang-format on
constexpr int kFactRows = 128;  // `padded` is a multiple
constexpr int kFactThreads = 128;

struct Facts {
  const float* data = nullptr;
  int64_t stride[2] = {0, 0};  // of a fact, of a problem
};

struct FactRows {
  int64_t G, L, padded;
  const double* coef;   // ContrastiveGrad's [5, G, L], or nullptr
  const float* peak;    // divides weights, so that gradients fit fp16; nullptr: 1
  const float* weight;  // sigmoid_loss: [G, L]; nullptr: 1
  const float* scale;   // nullptr: 1
  int64_t scale_stride[2];
  Indices mate, id;
  float* facts;
};

// Backward from the streams: a block owns rows of one side and walks one of `splits` parts of the
// other; blocks below `first` those of side[0].
struct PairSide {
  Strided t;
  int64_t rows = 0, splits = 1;
  Facts facts;
  float* out = nullptr;   // [splits, G, rows, D]
  float* sums = nullptr;  // [splits, kSums, G, rows]: of ds * dots and, sigmoid_loss, of ds
};
struct FusedBackward {
  int64_t G, D, first;
  PairSide side[2];
  bool ids, ignore;
  const float* bias;
};

// w = scale * ds, [G, M, pitch] of the data's type; nullptr: not needed. May be `dots`.
struct StoredBackward {
  Scores scores;
  Facts x, y;
  void* w;
  float* sums;  // [tiles of columns, kSums, G, M]
};

// Rows of x [G, M, D] at unit length, u = inv * x.
struct UnitRows {
  Tensor4 x;  // stride[1] unused
  int64_t G, M, D;
  float* inv;  // [G, M] = 1 / max(|x|, 1e-12)
  void* unit;  // [G, M, D] of x's type
};

// dx = peak * (inv * (du - u * <u, du>)), or peak * du where inv == nullptr; no peak: 1.
struct UnitGrad {
  Tensor4 x;
  int64_t G, M, D;
  const float *inv, *du, *peak;
  void* dx;  // [G, M, D] of x's type
};
constexpr int kRowsPerBlock = 8;  // of the two kernels over UnitRows and UnitGrad, a warp each

// Kernels as launchers see them; the fused ones for 16-bit types.
struct PairKernels {
  int sums = 0;                 // of a row, see PairSide
  Kernel fused_fwd, fused_bwd;  // by padded width
  Kernel stored_fwd, stored_bwd;
};
PairKernels contrastive_kernels(DType dtype, int width);
PairKernels sigmoid_kernels(DType dtype, int width);
Kernel merge_parts(int64_t parts, int64_t rows);
Kernel loss_rows();
Kernel fact_rows();
Kernel unit_rows(DType dtype);
Kernel unit_grad(DType dtype);

}  // namespace fmm::cuda
