// contrastive_loss: each tile of s feeds the row and the column statistics with one exp; the
// backward visits each tile once and emits dx and dy. Positives never join the sums of negatives.
// Passes: 1 forward, 3 backward.
#include "kernels.h"
#include "pair_tiles.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// Statistics of one axis under way: references are base 2 until `finish`.
struct Axis {
  float *neg, *pos, *sum_pos, *n_pos, *total, *n_all;  // rows of the result [6, G, rows]
  float *neg_sum, *pos_sum;

  Axis(float* stats, int64_t n, int64_t others, Arena& arena)
      : neg(stats),
        pos(stats + n),
        sum_pos(stats + 2 * n),
        n_pos(stats + 3 * n),
        total(stats + 4 * n),
        n_all(stats + 5 * n),
        neg_sum(arena.take<float>(n)),
        pos_sum(arena.take<float>(n)) {
    std::fill(neg, neg + 2 * n, -kInf);
    std::fill(sum_pos, sum_pos + 3 * n, 0.0f);
    std::fill(n_all, n_all + n, static_cast<float>(others));
    std::fill(neg_sum, neg_sum + n, 0.0f);
    std::fill(pos_sum, pos_sum + n, 0.0f);
  }

  // s in base 2.
  void add(int64_t at, float s, bool positive) {
    if (!positive) {
      total[at] -= s;
      n_all[at] -= 1.0f;
      return;
    }
    raise(s, pos[at], pos_sum[at], nullptr, 0);
    pos_sum[at] += exp2(s - finite_reference(pos[at]));
    sum_pos[at] += s;
    n_pos[at] += 1.0f;
  }

  void finish(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      neg[i] = natural_lse(neg[i], neg_sum[i]);
      pos[i] = natural_lse(pos[i], pos_sum[i]);
      sum_pos[i] *= static_cast<float>(kLn2);
      total[i] *= static_cast<float>(kLn2);
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

  Forward(const PairLoss& a, const ContrastiveStats& out, Arena& arena)
      : a_(a), x_(out.x, a.G * a.M, a.N, arena), y_(out.y, a.G * a.N, a.M, arena) {}

  template <class P>
  void tile(PairTile& t, Scratch& w, P&) {
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
      raise(w.row_top[i], x_.neg[m + i], x_.neg_sum[m + i], nullptr, 0);
    }
    for (int j = 0; j < t.cols; ++j) {
      raise(w.column_top[j], y_.neg[n + j], y_.neg_sum[n + j], nullptr, 0);
      w.column_ref[j] = finite_reference(y_.neg[n + j]);
      y_.total[n + j] += w.column_total[j];
    }
    std::fill(w.column_ref + t.cols, w.column_ref + kBlock, kInf);
    const float* ref = x_.neg + m;
    w.transfer.prepare(ref, w.column_ref, t.rows, t.cols);
    if (masked) {
      w.transfer.ok ? sums<true, true>(t, w, m) : sums<true, false>(t, w, m);
    } else {
      w.transfer.ok ? sums<false, true>(t, w, m) : sums<false, false>(t, w, m);
    }
    for (int j = 0; j < t.cols; ++j) y_.neg_sum[n + j] += w.column_sum[j];
  }

  void finish() {
    x_.finish(a_.G * a_.M);
    y_.finish(a_.G * a_.N);
  }

 private:
  void scale_and_total(PairTile& t, Scratch& w, int64_t m) {
    std::fill(w.column_total, w.column_total + kBlock, 0.0f);
    for (int i = 0; i < t.rows; ++i) {
      const Vec scale = splat(t.scale[i] * kLog2E);
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        float* s = t.s + i * kBlock + v * kLanes;
        float* column = w.column_total + v * kLanes;
        const Vec x = load(s) * scale;  // columns past the end are zero
        store(s, x);
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
        Vec p = exp2(s - ref);
        const Vec q = kOneExp ? p * (carry * load(w.transfer.column + at))
                              : exp2(s - load(w.column_ref + at));
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
  const float *lse, *weight, *target, *uniform, *single;

  Coefficients(const float* coef, int64_t n)
      : lse(coef),
        weight(coef + n),
        target(coef + 2 * n),
        uniform(coef + 3 * n),
        single(coef + 4 * n) {}

  float at_positive(int64_t i, float s) const {
    const float g = single[i] <= 1.0f ? single[i] : exp2(s - base2_lse(lse[i])) - target[i];
    return weight[i] == 0.0f ? 0.0f : weight[i] * (g - uniform[i]);
  }
};

class Backward {
 public:
  static constexpr bool kBackward = true;
  struct Scratch {
    Transfer transfer;
    alignas(64) float row_lse[kBlock], column_lse[kBlock], column_weight[kBlock],
        column_uniform[kBlock];
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
    for (int i = 0; i < t.rows; ++i) w.row_lse[i] = base2_lse(x_.lse[m + i]);
    for (int j = 0; j < kBlock; ++j) {
      const bool in = j < t.cols;
      w.column_lse[j] = in ? base2_lse(y_.lse[n + j]) : kInf;
      w.column_weight[j] = in ? y_.weight[n + j] : 0.0f;
      w.column_uniform[j] = in ? y_.weight[n + j] * y_.uniform[n + j] : 0.0f;
    }
    if (t.matches) {
      std::fill(w.live, w.live + kBlock * kBlock, 1.0f);
      for (int k = 0; k < t.matches; ++k) w.live[t.match[k].i * kBlock + t.match[k].j] = 0.0f;
    }
    w.transfer.prepare(w.row_lse, w.column_lse, t.rows, t.cols);
    w.transfer.ok ? gradients<true>(t, w, m, out) : gradients<false>(t, w, m, out);
    for (int k = 0; k < t.matches; ++k) {
      const Match& at = t.match[k];
      const float scale = t.scale[at.i], s = at.dot * (scale * kLog2E);
      float ds = 0.0f;
      if (at.positive) ds = x_.at_positive(m + at.i, s) + y_.at_positive(n + at.j, s);
      if (dscale_) dscale_[m + at.i] += ds * at.dot;
      out.set(at.i, at.j, ds * scale);
    }
  }

 private:
  template <bool kOneExp, class P>
  void gradients(PairTile& t, Scratch& w, int64_t m, const P& out) {
    for (int i = 0; i < t.rows; ++i) {
      const Vec scale = splat(t.scale[i]), scale2 = splat(t.scale[i] * kLog2E);
      const Vec lse = splat(w.row_lse[i]), carry = splat(kOneExp ? w.transfer.row[i] : 0.0f);
      const Vec weight = splat(x_.weight[m + i]);
      const Vec uniform = splat(x_.weight[m + i] * x_.uniform[m + i]);
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        const int at = v * kLanes;
        const Vec dots = load(t.s + i * kBlock + at), s = dots * scale2;
        const Vec p = exp2(s - lse);
        const Vec q = kOneExp ? p * (carry * load(w.transfer.column + at))
                              : exp2(s - load(w.column_lse + at));
        Vec ds = p * weight - uniform + q * load(w.column_weight + at) -
                 load(w.column_uniform + at);
        if (t.matches) ds *= load(w.live + i * kBlock + at);
        total += ds * dots;
        ds = select(t.mask.columns(v), ds * scale, Vec{});
        out.put_rm(i, v, ds);
        if (P::kTwo) out.put_tr(i, v, ds);
      }
      if (dscale_) dscale_[m + i] += sum(total);
    }
  }

  const PairLoss& a_;
  Coefficients x_, y_;
  float* dscale_;
};

}  // namespace

void contrastive_loss_fwd(const PairLoss& a, const ContrastiveStats& out, ParallelFor parallel) {
  Arena arena;
  Forward op(a, out, arena);
  pair_loop(a, op, nullptr, nullptr, parallel);
  op.finish();
}

void contrastive_loss_bwd(const PairLoss& a, const ContrastiveGrad& g, ParallelFor parallel) {
  Backward op(a, g);
  pair_loop(a, op, g.dx, g.dy, parallel);
}

}  // namespace fmm::cpu::FMM_ISA
