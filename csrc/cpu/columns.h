// What ops with a softmax over either axis of one tile share: maxima of both axes, and the step
// that turns one exp into both probabilities.
#pragma once

#include "softmax.h"

namespace fmm::cpu::FMM_ISA {

// p_column = p_row * row[i] * column[j], valid where references are close enough.
struct Transfer {
  alignas(64) float row[kBlock], column[kBlock];
  bool ok;

  // column_ref is padded with +inf past cols; lows are the references' second floats, if any.
  void prepare(const Unit& unit, const float* row_ref, const float* column_ref, int rows, int cols,
               const float* row_low = nullptr, const float* column_low = nullptr) {
    float top = -kInf, low = kInf;
    for (int i = 0; i < rows; ++i) top = row_ref[i] > top ? row_ref[i] : top;
    for (int j = 0; j < cols; ++j) low = column_ref[j] < low ? column_ref[j] : low;
    ok = (top - low) * unit.exponent <= kOneExp && top > -kInf;
    if (!ok) return;
    for (int i = 0; i < rows; ++i) row[i] = row_ref[i] - top + (row_low ? row_low[i] : 0.0f);
    for (int i = rows; i < kBlock; ++i) row[i] = -kInf;
    for (int v = 0; v < kBlock; v += kLanes) {
      store(row + v, exp2(load(row + v) * unit.exponent));
      const Vec less = column_low ? load(column_low + v) : Vec{};
      store(column + v, exp2((splat(top) - load(column_ref + v) - less) * unit.exponent));
    }
  }
};

// Maxima of a score tile over its kept columns (row_top) and over its kept rows (column_top).
template <bool kMasked>
void maxima(const float* s, const TileMask& mask, int rows, int nv, float* row_top,
            float* column_top) {
  std::fill(column_top, column_top + kBlock, -kInf);
  for (int i = 0; i < rows; ++i) {
    const float* row = s + i * kBlock;
    const bool kept = !kMasked || mask.row_kept(i);
    Vec top = splat(-kInf);
    for (int v = 0; v < nv; ++v) {
      const Vec x = load(row + v * kLanes);
      float* column = column_top + v * kLanes;
      top = max_skip_nan(kMasked ? select(mask.columns(v), x, splat(-kInf)) : x, top);
      if (kept) store(column, max_skip_nan(x, load(column)));
    }
    row_top[i] = max(top);
  }
}

}  // namespace fmm::cpu::FMM_ISA
