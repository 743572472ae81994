// What ops with a softmax over either axis of one tile share: maxima of both axes, and the step
// that turns one exp into both probabilities.
#pragma once

#include "softmax.h"

namespace fmm::cpu::FMM_ISA {

// p_column = p_row * row[i] * column[j], valid where references are close enough.
struct Transfer {
  alignas(64) float row[kBlock], column[kBlock];
  bool ok;

  // All are readable in whole vectors, and column_ref is +inf past cols; lows are the references'
  // second floats, if any.
  void prepare(const Unit& unit, const float* row_ref, const float* column_ref, int rows, int cols,
               const float* row_low = nullptr, const float* column_low = nullptr) {
    Vec most = splat(-kInf), less_than_all = splat(-kInf);
    for (int v = 0; v < rows; v += kLanes) {
      const Vec x = select(first_lanes(rows - v), load(row_ref + v), splat(-kInf));
      most = max_skip_nan(x, most);
    }
    for (int v = 0; v < cols; v += kLanes) {
      less_than_all = max_skip_nan(-load(column_ref + v), less_than_all);
    }
    const float top = max(most), low = -max(less_than_all);
    ok = (top - low) * unit.exponent <= kOneExp && top > -kInf;
    if (!ok) return;
    for (int v = 0; v < rows; v += kLanes) {
      const Vec more = row_low ? load(row_low + v) : Vec{};
      store(row + v, exp2((load(row_ref + v) - splat(top) + more) * unit.exponent));
    }
    for (int v = 0; v < cols; v += kLanes) {
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
