// contrastive_loss: each tile of s feeds the row and the column statistics with one exp; the
// backward visits each tile once and emits dx and dy. Positives never join the sums of negatives.
// Passes: 1 forward, 3 backward.
#include "kernels.h"
#include "pair_tiles.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// Scores are in natural units: rows may have scales of their own.
const Unit kUnit = unit_of(1.0);

// Statistics of one axis under way; `finish` writes [6, G, rows].
struct Axis {
  int64_t n;
  float *neg, *neg_sum, *pos, *pos_sum, *sum_pos, *n_pos, *total, *n_all;

  Axis(int64_t rows, int64_t others, Arena& arena) : n(rows) {
    for (float** p : {&neg, &neg_sum, &pos, &pos_sum, &sum_pos, &n_pos, &total, &n_all}) {
      *p = arena.take<float>(n);
      std::fill(*p, *p + n, 0.0f);
    }
    std::fill(neg, neg + n, -kInf);
    std::fill(pos, pos + n, -kInf);
    std::fill(n_all, n_all + n, static_cast<float>(others));
  }

  // A match.
  void add(int64_t at, float s, bool positive) {
    if (!positive) {
      total[at] -= s;
      n_all[at] -= 1.0f;
      return;
    }
    raise(s, pos[at], pos_sum[at], nullptr, 0, kUnit);
    pos_sum[at] += exp2((s - finite_reference(pos[at])) * kLog2E);
    sum_pos[at] += s;
    n_pos[at] += 1.0f;
  }

  void finish(double* out) const {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = natural_lse(neg[i], neg_sum[i], kUnit);
      out[n + i] = natural_lse(pos[i], pos_sum[i], kUnit);
      out[2 * n + i] = sum_pos[i];
      out[3 * n + i] = n_pos[i];
      out[4 * n + i] = total[i];
      out[5 * n + i] = n_all[i];
    }
  }
};

class Forward {
 public:
  static constexpr bool kBackward = false;
  struct Scratch {
    Transfer transfer;
    alignas(64) float row_top[kBlock], column_top[kBlock], column_ref[kBlock], column_sum[kBlock],
        column_total[kBlock];
    void make(Arena&) {}
  };

  Forward(const PairLoss& a, Arena& arena)
      : a_(a), x_(a.G * a.M, a.N, arena), y_(a.G * a.N, a.M, arena) {}

  template <class P>
  void tile(PairTile& t, Scratch& w, const P&) {
    const int64_t m = t.g * a_.M + t.m0, n = t.g * a_.N + t.n0;
    scale_and_total(t, w, m);
    for (int k = 0; k < t.matches; ++k) {
      const Match& at = t.match[k];
      float& s = t.s[at.i * kBlock + at.j];
      x_.add(m + at.i, s, at.positive);
      y_.add(n + at.j, s, at.positive);
      s = -kInf;
    }
    const bool masked = !t.mask.full;
    (masked ? maxima<true> : maxima<false>)(t.s, t.mask, t.rows, t.nv, w.row_top, w.column_top);
    for (int i = 0; i < t.rows; ++i) {
      raise(w.row_top[i], x_.neg[m + i], x_.neg_sum[m + i], nullptr, 0, kUnit);
    }
    for (int j = 0; j < t.cols; ++j) {
      raise(w.column_top[j], y_.neg[n + j], y_.neg_sum[n + j], nullptr, 0, kUnit);
      w.column_ref[j] = finite_reference(y_.neg[n + j]);
      y_.total[n + j] += w.column_total[j];
    }
    std::fill(w.column_ref + t.cols, w.column_ref + kBlock, kInf);
    const float* ref = x_.neg + m;
    w.transfer.prepare(kUnit, ref, w.column_ref, t.rows, t.cols);
    if (masked) {
      w.transfer.ok ? sums<true, true>(t, w, m) : sums<true, false>(t, w, m);
    } else {
      w.transfer.ok ? sums<false, true>(t, w, m) : sums<false, false>(t, w, m);
    }
    for (int j = 0; j < t.cols; ++j) y_.neg_sum[n + j] += w.column_sum[j];
  }

  void finish(const ContrastiveStats& out) const {
    x_.finish(out.x);
    y_.finish(out.y);
  }

 private:
  void scale_and_total(PairTile& t, Scratch& w, int64_t m) {
    std::fill(w.column_total, w.column_total + kBlock, 0.0f);
    for (int i = 0; i < t.rows; ++i) {
      const Vec scale = splat(t.scale[i]);
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        const int at = i * kBlock + v * kLanes;
        float* column = w.column_total + v * kLanes;
        const Vec x = load(t.dots + at) * scale;  // columns past the end are zero
        store(t.s + at, x);
        total += x;
        store(column, load(column) + x);
      }
      x_.total[m + i] += sum(total);
    }
  }

  template <bool kMasked, bool kOneExp>
  void sums(PairTile& t, Scratch& w, int64_t m) {
    std::fill(w.column_sum, w.column_sum + kBlock, 0.0f);
    for (int i = 0; i < t.rows; ++i) {
      const Vec ref = splat(finite_reference(x_.neg[m + i]));
      const Vec carry = splat(kOneExp ? w.transfer.row[i] : 0.0f);
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        const int at = v * kLanes;
        const Vec s = load(t.s + i * kBlock + at);
        Vec p = exp2((s - ref) * kLog2E);
        const Vec q = kOneExp ? p * (carry * load(w.transfer.column + at))
                              : exp2((s - load(w.column_ref + at)) * kLog2E);
        if constexpr (kMasked) p = select(t.mask.columns(v), p, Vec{});
        total += p;
        store(w.column_sum + at, load(w.column_sum + at) + q);
      }
      x_.neg_sum[m + i] += sum(total);
    }
  }

  const PairLoss& a_;
  Axis x_, y_;
};

// Backward coefficients of one axis.
struct Coefficients {
  const double *lse, *weight, *target, *uniform, *single;

  Coefficients(const double* coef, int64_t n)
      : lse(coef),
        weight(coef + n),
        target(coef + 2 * n),
        uniform(coef + 3 * n),
        single(coef + 4 * n) {}

  float at_positive(int64_t i, float s) const {
    const Lse2 two = split_lse(lse[i], kUnit);
    const double p = exp2((s - two.high - two.low) * kLog2E);
    const double g = single[i] <= 1.0 ? single[i] : p - target[i];
    return static_cast<float>(weight[i] == 0.0 ? 0.0 : weight[i] * (g - uniform[i]));
  }
};

class Backward {
 public:
  static constexpr bool kBackward = true;
  struct Scratch {
    Transfer transfer;
    alignas(64) float row_lse[kBlock], row_low[kBlock], column_lse[kBlock], column_low[kBlock],
        column_weight[kBlock], column_uniform[kBlock];
    float* live;  // 0 at matches
    void make(Arena& arena) { live = arena.take<float>(kBlock * kBlock); }
  };

  Backward(const PairLoss& a, const ContrastiveGrad& g)
      : a_(a), x_(g.coef_x, a.G * a.M), y_(g.coef_y, a.G * a.N), dscale_(g.dscale) {
    if (dscale_) std::fill(dscale_, dscale_ + a.G * a.M, 0.0f);
  }

  template <class P>
  void tile(PairTile& t, Scratch& w, const P& out) {
    const int64_t m = t.g * a_.M + t.m0, n = t.g * a_.N + t.n0;
    for (int i = 0; i < t.rows; ++i) {
      const Lse2 lse = split_lse(x_.lse[m + i], kUnit);
      w.row_lse[i] = lse.high, w.row_low[i] = lse.low;
    }
    for (int j = 0; j < kBlock; ++j) {
      const bool in = j < t.cols;
      const Lse2 lse = in ? split_lse(y_.lse[n + j], kUnit) : Lse2{kInf, 0.0f};
      w.column_lse[j] = lse.high, w.column_low[j] = lse.low;
      w.column_weight[j] = static_cast<float>(in ? y_.weight[n + j] : 0.0);
      w.column_uniform[j] = static_cast<float>(in ? y_.weight[n + j] * y_.uniform[n + j] : 0.0);
    }
    if (t.matches) {
      std::fill(w.live, w.live + kBlock * kBlock, 1.0f);
      for (int k = 0; k < t.matches; ++k) w.live[t.match[k].i * kBlock + t.match[k].j] = 0.0f;
    }
    w.transfer.prepare(kUnit, w.row_lse, w.column_lse, t.rows, t.cols, w.row_low, w.column_low);
    w.transfer.ok ? gradients<true>(t, w, m, out) : gradients<false>(t, w, m, out);
    for (int k = 0; k < t.matches; ++k) {
      const Match& at = t.match[k];
      const float scale = t.scale[at.i], s = rounded(at.dot * scale);
      float ds = 0.0f;
      if (at.positive) ds = x_.at_positive(m + at.i, s) + y_.at_positive(n + at.j, s);
      if (dscale_) dscale_[m + at.i] += ds * at.dot;
      out.set(at.i, at.j, ds * scale);
    }
  }

 private:
  template <bool kOneExp, class P>
  void gradients(PairTile& t, Scratch& w, int64_t m, const P& out) {
    // Copies: after a store the compiler would load them again.
    const float *all_dots = t.dots, *live = t.matches ? w.live : nullptr;
    const P to = out;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; i += 2) {
      const int count = std::min(2, rows - i);
      Vec scale[2], lse[2], low[2], carry[2], weight[2], uniform[2], total[2] = {};
      for (int k = 0; k < 2; ++k) {
        const int row = i + (k < count ? k : 0);
        const double row_weight = x_.weight[m + row];
        scale[k] = splat(t.scale[row]);
        lse[k] = splat(w.row_lse[row]), low[k] = splat(w.row_low[row]);
        carry[k] = splat(kOneExp ? w.transfer.row[row] : 0.0f);
        weight[k] = splat(static_cast<float>(row_weight));
        uniform[k] = splat(static_cast<float>(row_weight * x_.uniform[m + row]));
      }
      for (int v = 0; v < nv; ++v) {
        const int at = v * kLanes;
        Vec ds[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int here = (i + k) * kBlock + at;
          const Vec dots = load(all_dots + here), s = rounded(dots * scale[k]);
          const Vec p = exp2((s - lse[k] - low[k]) * kLog2E);
          const Vec less = s - load(w.column_lse + at) - load(w.column_low + at);
          const Vec q =
              kOneExp ? p * (carry[k] * load(w.transfer.column + at)) : exp2(less * kLog2E);
          ds[k] = p * weight[k] - uniform[k] + q * load(w.column_weight + at) -
                  load(w.column_uniform + at);
          if (live) ds[k] = select(load(live + here) == Vec{}, Vec{}, ds[k]);  // p may be infinite
          ds[k] = select(t.mask.columns(v), ds[k], Vec{});  // past the end likewise
          total[k] += ds[k] * dots;
          ds[k] *= scale[k];
        }
        to.template put<true, true>(i, v, ds[0], count < 2 ? Vec{} : ds[1]);
      }
      for (int k = 0; k < count && dscale_; ++k) dscale_[m + i + k] += sum(total[k]);
    }
  }

  const PairLoss& a_;
  Coefficients x_, y_;
  float* dscale_;
};

}  // namespace

void contrastive_loss_fwd(const PairLoss& a, const ContrastiveStats& out, ParallelFor parallel) {
  Arena arena;
  Forward op(a, arena);
  pair_loop(a, op, nullptr, nullptr, parallel);
  op.finish(out);
}

void contrastive_loss_bwd(const PairLoss& a, const ContrastiveGrad& g, ParallelFor parallel) {
  Backward op(a, g);
  pair_loop(a, op, g.dx, g.dy, parallel);
}

}  // namespace fmm::cpu::FMM_ISA
