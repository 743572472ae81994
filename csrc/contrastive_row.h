// contrastive_loss between its statistics and its kernels: a row's loss, and what the backward
// takes of it. Definitions in fusedmm/ops/pairs.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FMM_HOST_DEVICE __host__ __device__
#else
#define FMM_HOST_DEVICE
#endif

namespace fmm {

// ContrastiveStats' [6, rows], rows = G * L, and what is made of them: losses [rows], or of dloss
// [G, L] ContrastiveGrad's coefficients [5, rows].
struct ContrastiveRows {
  const double* stats;
  int64_t rows, L;
  double smoothing;
  float* loss;
  const float* dloss;
  int64_t dloss_stride[2];
  double* coef;

  FMM_HOST_DEVICE float dloss_of(int64_t i) const {
    return dloss[i / L * dloss_stride[0] + i % L * dloss_stride[1]];
  }
};

struct ContrastiveRow {
  double neg, pos, sum_pos, n_pos, sum_all, n_all, smoothing;

  FMM_HOST_DEVICE ContrastiveRow(const ContrastiveRows& a, int64_t i)
      : neg(a.stats[i]),
        pos(a.stats[a.rows + i]),
        sum_pos(a.stats[2 * a.rows + i]),
        n_pos(a.stats[3 * a.rows + i]),
        sum_all(a.stats[4 * a.rows + i]),
        n_all(a.stats[5 * a.rows + i]),
        smoothing(a.smoothing) {}

  FMM_HOST_DEVICE double lse() const {
    if (neg == pos && neg - pos != 0.0) return neg;  // equal infinities
    return (neg > pos ? neg : pos) + std::log1p(std::exp(-std::fabs(neg - pos)));
  }

  FMM_HOST_DEVICE double loss() const {
    if (!(n_pos > 0.0)) return 0.0;
    if (n_pos == 1.0 && smoothing == 0.0) {  // log1p(exp(neg - pos)), exact also at 1e-7
      const double d = neg - pos;
      return (d > 0.0 ? d : 0.0) + std::log1p(std::exp(-std::fabs(d)));
    }
    const double loss = lse() - (1.0 - smoothing) * sum_pos / n_pos;
    return smoothing == 0.0 ? loss : loss - smoothing * sum_all / n_all;
  }

  // Rows without weight get p = 0, so that no kernel multiplies 0 by an overflowed exp.
  FMM_HOST_DEVICE void coefficients(double dloss, double* out, int64_t step) const {
    const double weight = n_pos > 0.0 ? dloss : 0.0;
    const double total = weight == 0.0 ? HUGE_VAL : lse();
    out[0] = total;
    out[step] = weight;
    out[2 * step] = (1.0 - smoothing) / (n_pos > 1.0 ? n_pos : 1.0);
    out[3 * step] = smoothing / (n_all > 1.0 ? n_all : 1.0);
    out[4 * step] = n_pos == 1.0 ? smoothing - std::exp(neg - total) : 2.0;
  }
};

FMM_HOST_DEVICE inline void contrastive_row(const ContrastiveRows& a, int64_t i) {
  const ContrastiveRow row(a, i);
  if (a.loss != nullptr) {
    a.loss[i] = static_cast<float>(row.loss());
  } else {
    row.coefficients(a.dloss_of(i), a.coef + i, a.rows);
  }
}

}  // namespace fmm
