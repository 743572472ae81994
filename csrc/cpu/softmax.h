// Scores of a tile, running maxima with their rescaling, and probabilities. Base 2 throughout:
// scores carry a factor log2(e). A softmax's reference is moved only when the maximum outgrows it
// by kSlack, so accumulators are rarely rescaled; p stays below 2^kSlack.
#pragma once

#include "dropout.h"

namespace fmm::cpu::FMM_ISA {

constexpr float kSlack = 8.0f;
// One exp serves both directions while row and column references are this close: what underflows
// in p_row is then below 2^-40 in p_column.
constexpr float kOneExp = 86.0f;

// How raw products become scores.
struct ScoreRule {
  float scale;  // times log2(e)
  float clamp;  // times log2(e), +inf: none
  Tensor4 bias;
  bool swapped;  // tile rows are the bias's columns

  bool plain() const { return clamp == kInf && !bias.data; }
};

FMM_INLINE ScoreRule score_rule(float scale, float clamp, const Tensor4& bias, bool swapped) {
  return {scale * kLog2E, clamp * kLog2E, bias, swapped};
}

// bias tile [rows][kBlock] at (m0, n0), times log2(e).
inline void load_bias(float* dst, const ScoreRule& rule, int64_t b, int64_t h, int64_t row0,
                      int64_t col0, int rows, int cols) {
  const Tensor4& t = rule.bias;
  const int64_t row_stride = t.stride[rule.swapped ? 3 : 2];
  const int64_t col_stride = t.stride[rule.swapped ? 2 : 3];
  const int64_t base = b * t.stride[0] + h * t.stride[1];
  for (int i = 0; i < rows; ++i) {
    float* out = dst + i * kBlock;
    load_row(out, at(t, base + (row0 + i) * row_stride + col0 * col_stride), t.dtype, col_stride,
             cols);
    for (int j = 0; j < cols; ++j) out[j] *= kLog2E;
    for (int j = cols; j < round_up(cols, kLanes); ++j) out[j] = 0.0f;
  }
}

// s in place: clamp(s * scale) + bias. Backward asks which entries the clamp passed (1 or 0).
inline void apply_rule(float* s, const ScoreRule& rule, const float* bias, int rows, int nv,
                       float* passed = nullptr) {
  const Vec scale = splat(rule.scale), hi = splat(rule.clamp), lo = -hi;
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < nv; ++v) {
      const int at = i * kBlock + v * kLanes;
      Vec x = load(s + at) * scale;
      if (rule.clamp != kInf) {
        if (passed) store(passed + at, (x > hi) | (x < lo) ? Vec{} : splat(1.0f));
        x = x > hi ? hi : x;
        x = x < lo ? lo : x;
      }
      if (bias) x += load(bias + at);
      store(s + at, x);
    }
  }
}

// Which columns (and rows) of a tile count, for softmaxes over them.
struct TileMask {
  alignas(64) int32_t column[kBlock];  // -1 keep, 0 not; columns past the end are not kept
  const bool* row;                     // nullptr: all
  int64_t row_stride;
  bool full;  // every column is kept

  FMM_INLINE IVec columns(int v) const {
    IVec m;
    __builtin_memcpy(&m, column + v * kLanes, sizeof m);
    return m;
  }
  FMM_INLINE bool row_kept(int i) const { return !row || row[i * row_stride]; }
};

inline void fill_mask(TileMask& mask, const KeyMask& columns, const KeyMask& rows, int64_t b,
                      int64_t row0, int64_t col0, int cols) {
  const bool* keep = columns.row(b);
  mask.full = cols % kLanes == 0;
  for (int j = 0; j < cols; ++j) {
    const bool kept = !keep || keep[(col0 + j) * columns.stride[1]];
    mask.column[j] = kept ? -1 : 0;
    mask.full = mask.full && kept;
  }
  for (int j = cols; j < kBlock; ++j) mask.column[j] = 0;
  mask.row = rows.data ? rows.row(b) + row0 * rows.stride[1] : nullptr;
  mask.row_stride = rows.stride[1];
}

// A reference of -inf (nothing kept yet) subtracts as 0: exp2(-inf - 0) = 0.
FMM_INLINE float finite_reference(float r) { return r == -kInf ? 0.0f : r; }

// Moves reference to `top` if that has outgrown it: rescales sum and accumulator row.
FMM_INLINE void raise(float top, float& reference, float& sum, float* row, int64_t width) {
  if (!(top > reference + kSlack) || top == -kInf) return;
  if (reference != -kInf) {
    const float f = exp2(reference - top);
    sum *= f;
    if (row) {
      for (int64_t j = 0; j < width; ++j) row[j] *= f;
    }
  }
  reference = top;
}

// natural log of sum * 2^reference
FMM_INLINE float natural_lse(float reference, float sum) {
  if (reference == -kInf && !(sum != sum)) return -kInf;
  return static_cast<float>(static_cast<double>(reference) * kLn2 +
                            std::log(static_cast<double>(sum)));
}

// Writes acc / sum as one output row; a row with no kept key gives 0 and lse -inf.
FMM_INLINE void finish_row(void* o, float* lse, const float* acc, float reference, float sum,
                           DType dtype, int64_t width) {
  store_row(o, acc, dtype, sum == 0.0f ? 0.0f : 1.0f / sum, width);
  *lse = natural_lse(reference, sum);
}

// base-2 lse for the backward; -inf rows subtract +inf, so that p = 0.
FMM_INLINE float base2_lse(float lse) {
  return lse == -kInf ? kInf : static_cast<float>(static_cast<double>(lse) / kLn2);
}

FMM_INLINE float dot_product(const float* a, const float* b, int64_t n) {
  Vec total{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) total += load(a + j) * load(b + j);
  float r = sum(total);
  for (; j < n; ++j) r += a[j] * b[j];
  return r;
}

// delta = rowsum(d_o * o) - dlse, of one row; scratch holds 2 * width floats.
inline float row_delta(const RowSource& d_o, const RowSource& o, const float* dlse, int64_t i,
                       int64_t width, float* scratch) {
  read_row(scratch, d_o, i, width);
  read_row(scratch + width, o, i, width);
  return dot_product(scratch, scratch + width, width) - dlse[i];
}

}  // namespace fmm::cpu::FMM_ISA
