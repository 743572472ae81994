// contrastive_loss and sigmoid_loss on CPU tensors: allocates results, fills Params, calls kernels.
#include "../ops.h"
#include "launch.h"

namespace fmm::cpu {
namespace {

Indices indices(const OptTensor& t, int64_t G, int64_t rows, const char* name) {
  if (!t) return {};
  check_shape(*t, {G, rows}, name);
  FMM_CHECK(t->scalar_type() == at::kLong, name, ": expected int64");
  return {t->const_data_ptr<int64_t>(), {t->stride(0), t->stride(1)}};
}

PairLoss params(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale,
                const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y,
                bool ignore, bool normalize, const OptTensor& dots) {
  FMM_CHECK(x.dim() == 3 && y.dim() == 3, "3 dims");
  PairLoss a{};
  a.G = x.size(0), a.M = x.size(1), a.D = x.size(2), a.N = y.size(1);
  check_shape(y, {a.G, a.N, a.D}, "y");
  FMM_CHECK(scale.scalar_type() == at::kFloat && scale.is_contiguous(), "logit_scale");
  a.scale_per_row = scale.dim() == 2;
  if (a.scale_per_row) check_shape(scale, {a.G, a.M}, "logit_scale");
  FMM_CHECK(a.scale_per_row || scale.numel() == 1, "logit_scale");
  a.x = tensor4(x), a.y = tensor4(y), a.scale = scale.const_data_ptr<float>();
  a.positives = indices(positives, a.G, a.M, "positives");
  a.ids_x = indices(ids_x, a.G, a.M, "ids_x"), a.ids_y = indices(ids_y, a.G, a.N, "ids_y");
  a.ignore = ignore, a.normalize = normalize;
  if (dots) {
    FMM_CHECK(dots->scalar_type() == at::kFloat && dots->is_contiguous(), "dots");
    a.dots = static_cast<float*>(dots->data_ptr());
    a.dots_tiles = dots->numel() / dots_tile_floats(a.x.dtype);
  }
  return a;
}

// Allocates the gradients that are needed; `next` hands them out in order.
class Results {
 public:
  explicit Results(at::ArrayRef<bool> needs) : needs_(needs) {}
  void* next(at::IntArrayRef shape, const at::TensorOptions& options) {
    if (!needs_[at_++]) return nullptr;
    grads.push_back(empty_result(shape, options));
    return grads.back().data_ptr();
  }
  std::vector<at::Tensor> grads;

 private:
  at::ArrayRef<bool> needs_;
  size_t at_ = 0;
};

}  // namespace

at::Tensor kept_dots(int64_t n) {
  FMM_CHECK(n >= 0, "dots");
  return empty_result({n}, at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_fwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
    const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y, bool ignore,
    bool normalize, bool want_x, bool want_y, const OptTensor& dots) {
  const at::Tensor scale = contiguous_float(logit_scale);
  const PairLoss a = params(x, y, scale, positives, ids_x, ids_y, ignore, normalize, dots);
  at::Tensor stats_x = at::empty({6, a.G, a.M}, scale.options().dtype(at::kDouble));
  at::Tensor stats_y = at::empty({6, a.G, a.N}, scale.options().dtype(at::kDouble));
  const ContrastiveStats out{stats_x.data_ptr<double>(), stats_y.data_ptr<double>(), want_x,
                             want_y};
  kernels().contrastive_loss_fwd(a, out, parallel_for);
  return {stats_x, stats_y};
}

std::vector<at::Tensor> contrastive_loss_bwd(const at::Tensor& coef_x, const at::Tensor& coef_y,
                                             const at::Tensor& x, const at::Tensor& y,
                                             const at::Tensor& logit_scale,
                                             const OptTensor& positives, const OptTensor& ids_x,
                                             const OptTensor& ids_y, bool ignore, bool normalize,
                                             std::array<bool, 3> needs, const OptTensor& dots) {
  const at::Tensor scale = contiguous_float(logit_scale);
  const at::Tensor cx = contiguous_double(coef_x), cy = contiguous_double(coef_y);
  const PairLoss a = params(x, y, scale, positives, ids_x, ids_y, ignore, normalize, dots);
  check_shape(cx, {5, a.G, a.M}, "coef_x");
  check_shape(cy, {5, a.G, a.N}, "coef_y");
  FMM_CHECK(needs.size() == 3, "needs");
  Results out(needs);
  ContrastiveGrad g{cx.const_data_ptr<double>(), cy.const_data_ptr<double>(), nullptr, nullptr,
                    nullptr};
  g.dx = out.next(x.sizes(), x.options()), g.dy = out.next(y.sizes(), y.options());
  g.dscale = static_cast<float*>(out.next({a.G, a.M}, scale.options()));
  kernels().contrastive_loss_bwd(a, g, parallel_for);
  return out.grads;
}

at::Tensor contrastive_rows(const at::Tensor& stats, const OptTensor& dloss, double smoothing) {
  constexpr int64_t kGrain = 2048;  // rows a thread takes at least: waking one costs about as much
  return fmm::contrastive_rows(stats, dloss, smoothing, [](const ContrastiveRows& a) {
    at::parallel_for(0, a.rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) contrastive_row(a, i);
    });
  });
}

at::Tensor sigmoid_loss_fwd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
                            const at::Tensor& logit_bias, const OptTensor& positives,
                            const OptTensor& ids_x, const OptTensor& ids_y, bool normalize,
                            const OptTensor& dots) {
  const at::Tensor scale = contiguous_float(logit_scale);
  const PairLoss a = params(x, y, scale, positives, ids_x, ids_y, false, normalize, dots);
  at::Tensor loss = at::empty({a.G, a.M}, scale.options());
  const SigmoidTerms out{logit_bias.item<float>(), loss.data_ptr<float>()};
  kernels().sigmoid_loss_fwd(a, out, parallel_for);
  return loss;
}

std::vector<at::Tensor> sigmoid_loss_bwd(const at::Tensor& dloss, const at::Tensor& x,
                                         const at::Tensor& y, const at::Tensor& logit_scale,
                                         const at::Tensor& logit_bias, const OptTensor& positives,
                                         const OptTensor& ids_x, const OptTensor& ids_y,
                                         bool normalize, std::array<bool, 4> needs,
                                         const OptTensor& dots) {
  const at::Tensor scale = contiguous_float(logit_scale), weight = contiguous_float(dloss);
  const PairLoss a = params(x, y, scale, positives, ids_x, ids_y, false, normalize, dots);
  check_shape(weight, {a.G, a.M}, "dloss");
  FMM_CHECK(needs.size() == 4, "needs");
  Results out(needs);
  SigmoidGrad g{
      logit_bias.item<float>(), weight.const_data_ptr<float>(), nullptr, nullptr, nullptr, nullptr};
  g.dx = out.next(x.sizes(), x.options()), g.dy = out.next(y.sizes(), y.options());
  g.dscale = static_cast<float*>(out.next({a.G, a.M}, scale.options()));
  g.dbias = static_cast<float*>(out.next({a.G, a.M}, scale.options()));
  kernels().sigmoid_loss_bwd(a, g, parallel_for);
  return out.grads;
}

}  // namespace fmm::cpu
