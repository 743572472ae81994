// Tensors as the plain structs that kernels take.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../contrastive_row.h"
#include "check.h"
#include "params.h"

namespace fmm {

using OptTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kHalf:
      return DType::kHalf;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      FMM_CHECK(false, "dtype ", t.scalar_type(), " has no kernel");
  }
}

// [B, H, rows, width] as it is; [G, rows, width] as [G, 1, rows, width].
inline Tensor4 tensor4(const at::Tensor& t) {
  Tensor4 r;
  r.data = t.const_data_ptr();
  r.dtype = dtype_of(t);
  const int64_t n = t.dim();
  FMM_CHECK(n == 3 || n == 4, "expected 3 or 4 dimensions, got ", n);
  r.stride[0] = t.stride(0);
  r.stride[1] = n == 4 ? t.stride(1) : 0;
  r.stride[2] = t.stride(n - 2);
  r.stride[3] = t.stride(n - 1);
  return r;
}

// A bias broadcasts: dimensions of size 1 get stride 0. `hold` keeps a converted copy alive.
inline Tensor4 bias4(const OptTensor& t, at::IntArrayRef full, at::Tensor& hold) {
  if (!t) return {};
  hold = t->scalar_type() == at::kDouble ? t->to(at::kFloat) : *t;
  return tensor4(hold.expand(full));
}

inline KeyMask key_mask(const OptTensor& t, at::IntArrayRef shape, const char* name) {
  if (!t) return {};
  check_shape(*t, shape, name);
  FMM_CHECK(t->scalar_type() == at::kBool, name, ": expected bool");
  return {t->const_data_ptr<bool>(), {t->stride(0), t->stride(1)}};
}

inline Dropout dropout(const OptTensor& seed, double p) {
  if (!seed) return {};
  const double bits = p * 4294967296.0;
  return {true, static_cast<uint64_t>(seed->item<int64_t>()),
          bits >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(bits),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

// Zeroed fp32 sums of a bias's gradient, with stride 0 where the bias broadcasts.
inline at::Tensor make_dbias(const at::Tensor& bias, int64_t (&stride)[4]) {
  at::Tensor sums = at::zeros(bias.sizes(), bias.options().dtype(at::kFloat));
  for (int d = 0; d < 4; ++d) stride[d] = bias.size(d) == 1 ? 0 : sums.stride(d);
  return sums;
}

inline at::Tensor contiguous_double(const at::Tensor& t) { return t.to(at::kDouble).contiguous(); }
inline at::Tensor contiguous_float(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }
// The same, or zeros of the shape of `like` where there is none.
inline at::Tensor contiguous_float(const OptTensor& t, const at::Tensor& like) {
  return t ? contiguous_float(*t) : at::zeros(like.sizes(), like.options().dtype(at::kFloat));
}

// contrastive_row over statistics [6, G, rows], by run(ContrastiveRows): losses in fp32, or the
// backward's coefficients if there is a dloss [G, rows].
template <typename Run>
at::Tensor contrastive_rows(const at::Tensor& stats, const OptTensor& dloss, double smoothing,
                            const Run& run) {
  FMM_CHECK(stats.dim() == 3 && stats.size(0) == 6, "stats: [6, G, rows]");
  const int64_t G = stats.size(1), L = stats.size(2);
  const at::Tensor s = contiguous_double(stats);
  ContrastiveRows a{s.const_data_ptr<double>(), G * L, L, smoothing, nullptr, nullptr, {}, nullptr};
  at::Tensor out, d;
  if (dloss) {
    check_shape(*dloss, {G, L}, "dloss");
    d = dloss->to(at::kFloat);
    a.dloss = d.const_data_ptr<float>();
    a.dloss_stride[0] = d.stride(0), a.dloss_stride[1] = d.stride(1);
    out = at::empty({5, G, L}, s.options());
    a.coef = out.data_ptr<double>();
  } else {
    out = at::empty({G, L}, s.options().dtype(at::kFloat));
    a.loss = out.data_ptr<float>();
  }
  if (a.rows > 0) run(a);
  return out;
}

}  // namespace fmm
