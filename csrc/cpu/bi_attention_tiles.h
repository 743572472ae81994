// What the forward and the backward of bi_attention share. Every score tile is computed once and
// feeds both softmaxes. Rows of the longer stream (x here) are dealt to tasks; what belongs to the
// shorter stream (y) is accumulated per task and merged in order. With sum_heads a task visits all
// heads of its rows, and sums their outputs and gradients before it writes them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "../bi_attention.h"
#include "attention.h"
#include "columns.h"
#include "kernels.h"
#include "schedule.h"

namespace fmm::cpu::FMM_ISA {

// The same problem with the streams exchanged.
inline BiAttention exchanged(BiAttention a) {
  std::swap(a.M, a.N);
  std::swap(a.Dv_x, a.Dv_y);
  std::swap(a.qk_x, a.qk_y);
  std::swap(a.v_x, a.v_y);
  std::swap(a.mask_x, a.mask_y);
  std::swap(a.o_x, a.o_y);
  std::swap(a.lse_x, a.lse_y);
  return a;
}

// What forward and backward share: sizes, masks, scores of one tile.
class Tiles {
 protected:
  Tiles(const BiAttention& a, bool swapped, ParallelFor parallel)
      : a_(a),
        parallel_(parallel),
        swapped_(swapped),
        summed_(a.sum_heads),
        heads_(summed_ ? a.H : 1),
        planes_(a.B * a.H),
        tiles_(ceil_div(a.N, kBlock)),
        rule_(score_rule(a.scale, a.clamp, a.bias, swapped)) {}

  struct Common {
    TileMask mask;
    Transfer transfer;
    Ahead ahead;
    float *s, *bias, *drop_row, *drop_column, *passed;
  };

  void make_common(Common& w, Arena& arena, bool backward) const {
    w.s = arena.take<float>(kBlock * kBlock);
    w.bias = a_.bias.data ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.drop_row = a_.dropout.on ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.drop_column = a_.dropout.on ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.passed = backward && a_.clamp != kInf ? arena.take<float>(kBlock * kBlock) : nullptr;
  }

  // Mask, bias and dropout of a tile.
  void load_tile(Common& w, const TileShape& t) const {
    fill_mask(w.mask, a_.mask_y, a_.mask_x, t.b, t.m0, t.n0, t.cols);
    if (w.bias) load_bias(w.bias, rule_, t.b, t.h, t.m0, t.n0, t.rows, t.cols);
    if (w.drop_row) {
      dropout_tile(w.drop_row, a_.dropout, t.bh, swapped_ ? 1 : 0, swapped_, t.m0, t.n0, t.rows,
                   t.cols);
      dropout_tile(w.drop_column, a_.dropout, t.bh, swapped_ ? 0 : 1, swapped_, t.m0, t.n0, t.rows,
                   t.cols);
    }
  }

  // Raw products in w.s become scores.
  void apply(Common& w, const TileShape& t) const {
    apply_rule(w.s, rule_, w.bias, t.rows, t.nv, w.passed);
    blank_tail(w.s, t.rows, t.cols);
  }

  // What is read after the rows before m0 of a plane: the rows from there, or the next plane.
  // `rows` are the tensors of x, `columns` those of y, with their widths.
  struct Source {
    const Tensor4& t;
    int64_t width;
  };
  void look_ahead(Ahead& ahead, int64_t bh, int64_t m0, std::initializer_list<Source> rows,
                  std::initializer_list<Source> columns) const {
    ahead.clear();
    if (m0 >= a_.M) {
      m0 = 0;
      if (++bh == planes_) return;
      const int64_t n = std::min<int64_t>(a_.N, 2 * kBlock);
      for (const Source& y : columns) ahead.add(y.t, bh / a_.H, bh % a_.H, 0, n, y.width);
    }
    const int64_t n = std::min<int64_t>(a_.M - m0, kBlock);
    for (const Source& x : rows) ahead.add(x.t, bh / a_.H, bh % a_.H, m0, n, x.width);
  }

  // Row m of a tensor of x's, contiguous: one plane a head, or one for all.
  int64_t row_of_x(const TileShape& t, int64_t m) const {
    return (summed_ ? t.b : t.bh) * a_.M + m;
  }
  bool first_head(const TileShape& t) const { return t.h % heads_ == 0; }
  bool last_head(const TileShape& t) const { return t.h % heads_ == heads_ - 1; }

  const BiAttention& a_;
  ParallelFor parallel_;
  bool swapped_;
  bool summed_;    // over the heads, which one task visits
  int64_t heads_;  // in a task
  int64_t planes_, tiles_;
  ScoreRule rule_;
  Chunks deal_;
};

// Runs `Pass` with the longer stream as rows, in bf16 products where the machine has them.
template <template <class> class Pass, class... Args>
void launch(const BiAttention& a, bool swapped, ParallelFor parallel, Args&&... args) {
#if defined(__AVX512BF16__)
  if (a.qk_x.dtype == DType::kBFloat16) {
    Pass<Bf2>(a, args..., swapped, parallel).run();
    return;
  }
#endif
  Pass<float>(a, args..., swapped, parallel).run();
}

}  // namespace fmm::cpu::FMM_ISA
