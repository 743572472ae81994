// Scores of a tile, running maxima with their rescaling, and probabilities. exp is taken in base 2
// of differences (score - reference) * exponent, so that scores of 1e4 lose nothing to a factor.
// A reference is moved only when the maximum outgrows it, so accumulators are rarely rescaled.
#pragma once

#include <algorithm>

#include "dropout.h"

namespace fmm::cpu::FMM_ISA {

constexpr float kSlack = 8.0f;  // p stays below 2^kSlack
// One exp serves both directions while row and column references are this close: what underflows
// in p_row is then below 2^-40 in p_column.
constexpr float kOneExp = 86.0f;

// What scores are measured in: natural units, or raw products where only a scale separates the two.
struct Unit {
  float exponent;  // score -> base 2
  float slack;     // kSlack in scores
  double natural;  // score -> natural
};
FMM_INLINE Unit unit_of(double natural) {
  const auto exponent = static_cast<float>(natural * static_cast<double>(kLog2E));
  return {exponent, kSlack / exponent, natural};
}

// How raw products become scores.
struct ScoreRule {
  Unit unit;
  float scale, clamp;  // +inf: no clamp
  Tensor4 bias;
  bool swapped;  // tile rows are the bias's columns
  bool raw;      // products are the scores
};

FMM_INLINE ScoreRule score_rule(float scale, float clamp, const Tensor4& bias, bool swapped) {
  const bool raw = clamp == kInf && !bias.data && scale > 1e-20f;
  return {unit_of(raw ? scale : 1.0), scale, clamp, bias, swapped, raw};
}

// bias tile [rows][kBlock] at (m0, n0).
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
    for (int j = cols; j < round_up(cols, kLanes); ++j) out[j] = 0.0f;
  }
}

// s in place: clamp(s * scale) + bias, no finite sum below kLeastScore. Backward asks which entries
// the clamp passed (1 or 0).
inline void apply_rule(float* s, const ScoreRule& rule, const float* bias, int rows, int nv,
                       float* passed = nullptr) {
  if (rule.raw) return;
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
      if (bias) {
        x += load(bias + at);
        x = select((x < splat(kLeastScore)) & (x > splat(-kInf)), splat(kLeastScore), x);
      }
      store(s + at, x);
    }
  }
}

// Scores past the end of a tile's rows, as if not there: no mask is then needed for them.
inline void blank_tail(float* s, int rows, int cols) {
  if (cols % kLanes == 0) return;
  const int at = cols / kLanes * kLanes;
  const IVec in = first_lanes(cols - at);
  for (int i = 0; i < rows; ++i) {
    float* last = s + i * kBlock + at;
    store(last, select(in, load(last), splat(-kInf)));
  }
}

// Which columns (and rows) of a tile count, for softmaxes over them.
struct TileMask {
  alignas(64) int32_t column[kBlock];  // -1 keep, 0 not; columns past the end are not kept
  const bool* row;                     // nullptr: all
  int64_t row_stride;
  bool full;      // every lane is kept
  bool all_kept;  // every column within the tile is

  FMM_INLINE IVec columns(int v) const {
    IVec m;
    __builtin_memcpy(&m, column + v * kLanes, sizeof m);
    return m;
  }
  FMM_INLINE bool row_kept(int i) const { return !row || row[i * row_stride]; }
};

inline void fill_mask(TileMask& mask, const KeyMask& columns, const KeyMask& rows, int64_t b,
                      int64_t row0, int64_t col0, int cols) {
  mask.all_kept = true;
  for (int j = 0; j < kBlock; j += kLanes) {
    const IVec in = first_lanes(cols - j);
    __builtin_memcpy(mask.column + j, &in, sizeof in);
  }
  if (const bool* keep = columns.row(b)) {
    for (int j = 0; j < cols; ++j) {
      const bool kept = keep[(col0 + j) * columns.stride[1]];
      mask.column[j] = kept ? -1 : 0;
      mask.all_kept = mask.all_kept && kept;
    }
  }
  mask.full = mask.all_kept && cols % kLanes == 0;
  mask.row = rows.data ? rows.row(b) + row0 * rows.stride[1] : nullptr;
  mask.row_stride = rows.stride[1];
}

// A reference of -inf (nothing kept yet) subtracts as 0: exp2(-inf - 0) = 0.
FMM_INLINE float finite_reference(float r) { return r == -kInf ? 0.0f : r; }

// Moves reference to `top` if that has outgrown it: rescales sum and accumulator row.
FMM_INLINE void raise(float top, float& reference, float& sum, float* row, int64_t width,
                      const Unit& unit) {
  if (!(top > reference + unit.slack) || top == -kInf) return;
  if (reference != -kInf) {
    const float f = exp2((reference - top) * unit.exponent);
    sum *= f;
    if (row) {
      for (int64_t j = 0; j < width; ++j) row[j] *= f;
    }
  }
  reference = top;
}

// raise() of n references with the accumulator rows that start at `rows`. All four are readable in
// whole vectors.
inline void raise_all(const float* top, float* reference, float* sum, float* rows, int64_t width,
                      int n, const Unit& unit) {
  for (int v = 0; v < n; v += kLanes) {
    if (!any(load(top + v) > load(reference + v) + unit.slack)) continue;
    const int end = std::min(n, v + kLanes);
    for (int i = v; i < end; ++i) {
      raise(top[i], reference[i], sum[i], rows + i * width, width, unit);
    }
  }
}

// natural log of sum * exp(reference)
FMM_INLINE double natural_lse(float reference, float sum, const Unit& unit) {
  if (reference == -kInf && !(sum != sum)) return -kInf;
  return static_cast<double>(reference) * unit.natural + std::log(static_cast<double>(sum));
}

// Writes acc / sum as one output row; a row with no kept key gives 0 and lse -inf.
FMM_INLINE void finish_row(void* o, double* lse, const float* acc, float reference, float sum,
                           DType dtype, int64_t width, const Unit& unit) {
  store_row(o, acc, dtype, sum == 0.0f ? 0.0f : 1.0f / sum, width);
  *lse = natural_lse(reference, sum, unit);
}

// lse in scores, as a sum of two floats: at scores of 1e4 one float would be off by 5e-4. Rows of
// -inf subtract +inf, so that p = 0.
struct Lse2 {
  float high, low;
};
FMM_INLINE Lse2 split_lse(double lse, const Unit& unit) {
  if (lse == -static_cast<double>(kInf)) return {kInf, 0.0f};
  const double t = lse / unit.natural;
  const float high = static_cast<float>(t);
  return {high, high - high == 0.0f ? static_cast<float>(t - high) : 0.0f};
}

FMM_INLINE float dot_product(const float* a, const float* b, int64_t n) {
  Vec total{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) total += load(a + j) * load(b + j);
  float r = sum(total);
  for (; j < n; ++j) r += a[j] * b[j];
  return r;
}

// Units that row_deltas works in, beside the scratch of the packs.
template <class U>
FMM_INLINE int64_t row_deltas_units(int64_t width) {
  return 2 * bt_units<U>(kPanel, width);
}

// delta = rowsum(d_o * o) - dlse of n rows, each summed in the order of a product with the values:
// where one key takes all of a row, o is its value and dp - delta is exactly 0.
template <class U>
void row_deltas(float* delta, const RowSource& d_o, const RowSource& o, const float* dlse,
                int64_t n, int64_t width, U* room, U* scratch) {
  const int64_t k = units<U>(width);
  U *left = room, *right = room + k * kPanel;
  for (int64_t r = 0; r < n; r += kPanel) {
    const int64_t rows = std::min<int64_t>(kPanel, n - r);
    RowSource part[2] = {d_o, o};
    for (RowSource& source : part) source.data = static_cast<const char*>(source.row(r));
    pack_b_transposed(left, scratch, part[0], rows, width);
    pack_b_transposed(right, scratch, part[1], rows, width);
    Vec sums[2] = {};
    for (int64_t i = 0; i < k; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t at = i * kPanel + v * kLanes;
        sums[v] = dot_lanes<U>(sums[v], load(left + at), load(right + at));
      }
    }
    for (int64_t j = 0; j < rows; ++j) {
      delta[r + j] = sums[j / kLanes][j % kLanes] - dlse[r + j];
    }
  }
}

}  // namespace fmm::cpu::FMM_ISA
