// sigmoid_loss: a block adds up softplus(-z * s) by rows; the backward turns tiles into scale * ds.
// No atomics.
#include "pair_kernels.cuh"

namespace fmm::cuda {

// log(1 + exp(v)) = max(v, 0) + 2 atanh(z), z = e / (2 + e) and e = exp(-|v|): small values keep
// all their bits. The polynomial in z^2 is off by at most 1e-7 of the result.
__device__ inline float softplus(float v) {
  const float e = exp2_fast(-fabsf(v) * kLog2e), z = __fdividef(e, 2.0f + e), w = z * z;
  float p = fmaf(w, 1.22066652e-01f, 1.06965943e-01f);
  p = fmaf(p, w, 1.43103635e-01f);
  p = fmaf(p, w, 1.99993454e-01f);
  p = fmaf(p, w, 3.33333397e-01f);
  p = fmaf(p, w, 1.0f);
  return fmaf(z + z, p, fmaxf(v, 0.0f));
}

// 1 / (1 + exp(-v))
__device__ inline float sigmoid(float v) { return __fdividef(1.0f, 1.0f + exp2_fast(-v * kLog2e)); }

struct Sigmoid {
  static constexpr int kSums = 2;  // of ds * dots and of ds

  template <typename S>
  class Forward {
   public:
    static constexpr int kMT = S::kMT, kNT = S::kNT;
    struct Room {};

    __device__ Forward(const PairForward& p, const BlockAt<S>& block, Room&)
        : p_(p), block_(block), known_(p.scores, block.lane(0)), bias_(*p.scores.bias) {}

    __device__ void tile(float (&s)[kMT][kNT][4], int n0) {
      PairBits<kMT> pos, out;
      if (find_matches<kMT, kNT>(pos, out, p_.scores, known_, block_.lane(n0))) {
        add<true>(s, pos, out);
      } else {
        add<false>(s, pos, out);
      }
    }

    __device__ void finish() {
      float* to = p_.part_x + (block_.part * p_.scores.G + block_.g) * p_.scores.M;
      store_sums<kMT>(to, p_.scores.M, block_.lane(0), sum_);
    }

   private:
    template <bool kMarked>
    __device__ void add(const float (&dots)[kMT][kNT][4], const PairBits<kMT>& pos,
                        const PairBits<kMT>& out) {
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        sum_[k / 2][k % 2] += fold_row<kNT>(k / 2, k % 2, Add(), [&](int m, int n, int i) {
          const float s = dots[m][n][i] * known_.scale[m][i / 2] + bias_;
          if (kMarked && out.has(m, n, i)) return 0.0f;
          return softplus(kMarked && pos.has(m, n, i) ? -s : s);
        });
      }
    }

    const PairForward& p_;
    const BlockAt<S>& block_;
    ScoreRows<kMT> known_;
    float bias_, sum_[kMT][2] = {};
  };

  struct Known {
    float weight, scale;

    Known() = default;
    template <int kRows>
    static __device__ void two(Known (&k)[2], FactTile<kRows> t, int row) {
      t.two(kWeight, row, k[0].weight, k[1].weight), t.two(kScale, row, k[0].scale, k[1].scale);
    }
    template <int kRows>
    __device__ Known(FactTile<kRows> t, int row)
        : weight(t.at(kWeight, row)), scale(t.at(kScale, row)) {}
  };
  static __device__ float score(float s, float bias) { return s + bias; }
  static __device__ float ds(float s, const Known& r, const Known& c) {
    return r.weight * c.weight * sigmoid(s);
  }
  template <int kRows, int kCols>
  static __device__ float ds_marked(bool match, float s, const Known& r, const Known& c,
                                    FactTile<kRows>, int, FactTile<kCols>, int) {
    const float sign = match ? -1.0f : 1.0f;
    return sign * r.weight * c.weight * sigmoid(sign * s);
  }
};

PairKernels sigmoid_kernels(DType dtype, int width) { return kernels_of<Sigmoid>(dtype, width); }

}  // namespace fmm::cuda
