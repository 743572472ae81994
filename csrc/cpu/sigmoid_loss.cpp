// sigmoid_loss: softplus(-z * s) summed over each row, z = +1 on matches and -1 elsewhere; the
// backward recomputes s. Passes: 1 forward, 3 backward.
#include "kernels.h"
#include "pair_tiles.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)), polynomial in the square; 1e-7 relative.
FMM_INLINE Vec log1p_unit(Vec u) {
  const Vec z = u / (u + 2.0f), w = z * z;
  Vec p = w * 1.22066652e-01f + 1.06965943e-01f;
  p = p * w + 1.43103635e-01f;
  p = p * w + 1.99993454e-01f;
  p = p * w + 3.33333397e-01f;
  p = p * w + 1.0f;
  return (z + z) * p;
}

// log(1 + exp(s))
FMM_INLINE Vec softplus(Vec s) {
  const Vec magnitude = s < Vec{} ? -s : s;
  return (s < Vec{} ? Vec{} : s) + log1p_unit(exp2(magnitude * -kLog2E));
}

// 1 / (1 + exp(-s))
FMM_INLINE Vec sigmoid(Vec s) {
  const Vec magnitude = s < Vec{} ? -s : s;
  const Vec e = exp2(magnitude * -kLog2E), r = 1.0f / (e + 1.0f);
  return s < Vec{} ? e * r : r;
}
FMM_INLINE float softplus(float s) { return softplus(splat(s))[0]; }
FMM_INLINE float sigmoid(float s) { return sigmoid(splat(s))[0]; }

class Forward {
 public:
  static constexpr bool kBackward = false;
  struct Scratch {
    void make(Arena&) {}
  };

  Forward(const PairLoss& a, const SigmoidTerms& out) : a_(a), out_(out) {
    std::fill(out.loss, out.loss + a.G * a.M, 0.0f);
  }

  template <class P>
  void tile(PairTile& t, Scratch&, P&) {
    float* loss = out_.loss + t.g * a_.M + t.m0;
    for (int k = 0; k < t.matches; ++k) {
      const Match& at = t.match[k];
      loss[at.i] += softplus(-(at.dot * t.scale[at.i] + out_.bias));
    }
    for (int i = 0; i < t.rows; ++i) {
      const Vec scale = splat(t.scale[i]);
      for (int v = 0; v < t.nv; ++v) {
        const int at = i * kBlock + v * kLanes;
        store(t.s + at, load(t.dots + at) * scale + out_.bias);
      }
    }
    for (int k = 0; k < t.matches; ++k) t.s[t.match[k].i * kBlock + t.match[k].j] = -kInf;
    for (int i = 0; i < t.rows; ++i) {
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        const Vec f = softplus(load(t.s + i * kBlock + v * kLanes));
        total += select(t.mask.columns(v), f, Vec{});
      }
      loss[i] += sum(total);
    }
  }

 private:
  const PairLoss& a_;
  const SigmoidTerms& out_;
};

class Backward {
 public:
  static constexpr bool kBackward = true;
  struct Scratch {
    float* live;  // 0 at matches
    void make(Arena& arena) { live = arena.take<float>(kBlock * kBlock); }
  };

  Backward(const PairLoss& a, const SigmoidGrad& g) : a_(a), g_(g) {
    if (g.dscale) std::fill(g.dscale, g.dscale + a.G * a.M, 0.0f);
    if (g.dbias) std::fill(g.dbias, g.dbias + a.G * a.M, 0.0f);
  }

  template <class P>
  void tile(PairTile& t, Scratch& w, const P& out) {
    const int64_t m = t.g * a_.M + t.m0;
    if (t.matches) {
      std::fill(w.live, w.live + kBlock * kBlock, 1.0f);
      for (int k = 0; k < t.matches; ++k) w.live[t.match[k].i * kBlock + t.match[k].j] = 0.0f;
    }
    // Copies: after a store the compiler would load them again.
    const float *all_dots = t.dots, *live = t.matches ? w.live : nullptr;
    const P to = out;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; i += 2) {
      const int count = std::min(2, rows - i);
      Vec scale[2], weight[2], along[2] = {}, total[2] = {};
      for (int k = 0; k < 2; ++k) {
        const int row = i + (k < count ? k : 0);
        scale[k] = splat(t.scale[row]), weight[k] = splat(g_.dloss[m + row]);
      }
      for (int v = 0; v < nv; ++v) {
        Vec ds[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int here = (i + k) * kBlock + v * kLanes;
          const Vec dots = load(all_dots + here);
          ds[k] = weight[k] * sigmoid(dots * scale[k] + g_.bias);
          if (live) ds[k] *= load(live + here);
          ds[k] = select(t.mask.columns(v), ds[k], Vec{});
          along[k] += ds[k] * dots;
          total[k] += ds[k];
          ds[k] *= scale[k];
        }
        to.template put<true, true>(i, v, ds[0], count < 2 ? Vec{} : ds[1]);
      }
      for (int k = 0; k < count; ++k) add(m + i + k, sum(along[k]), sum(total[k]));
    }
    for (int k = 0; k < t.matches; ++k) {
      const Match& at = t.match[k];
      const float scale = t.scale[at.i], s = at.dot * scale + g_.bias;
      const float ds = -g_.dloss[m + at.i] * sigmoid(-s);
      add(m + at.i, ds * at.dot, ds);
      out.set(at.i, at.j, ds * scale);
    }
  }

 private:
  void add(int64_t row, float along, float total) {
    if (g_.dscale) g_.dscale[row] += along;
    if (g_.dbias) g_.dbias[row] += total;
  }

  const PairLoss& a_;
  const SigmoidGrad& g_;
};

}  // namespace

void sigmoid_loss_fwd(const PairLoss& a, const SigmoidTerms& out, ParallelFor parallel) {
  Forward op(a, out);
  pair_loop(a, op, nullptr, nullptr, parallel);
}

void sigmoid_loss_bwd(const PairLoss& a, const SigmoidGrad& g, ParallelFor parallel) {
  Backward op(a, g);
  pair_loop(a, op, g.dx, g.dy, parallel);
}

}  // namespace fmm::cpu::FMM_ISA
