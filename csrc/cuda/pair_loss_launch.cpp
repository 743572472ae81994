// contrastive_loss and sigmoid_loss on CUDA tensors: chunks of products that fit a workspace come
// from torch's matrix products, our kernels turn them into statistics or, for the backward, into
// w = scale * ds / peak, and two more products give dx and dy. Four products over s in all; chunks
// add to dy in order. Nothing waits for the device.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

#include "../common/launch.h"
#include "../common/torch_params.h"
#include "../ops.h"
#include "pair_loss.h"
#include "tuning.h"

namespace fmm::cuda {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
int64_t workspace = 64 << 20;  // bytes of a chunk's products and of its w

int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// Inside, torch's products record no gradient and keep their types.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// out = a @ b in fp32, added to out if `add`.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  at::Tensor to = out;
  if (add) {
    at::baddbmm_out(to, to, a, b, at::kFloat);
  } else {
    at::bmm_out(to, a, b, at::kFloat);
  }
}

// A tensor of the call and, with `normalize`, its rows at unit length.
struct Rows {
  at::Tensor raw, t, inv;

  Rows(const at::Tensor& raw, bool normalize) : raw(raw), t(raw) {
    if (!normalize) return;
    const int64_t G = raw.size(0), M = raw.size(1), D = raw.size(2);
    t = at::empty({G, M, D}, raw.options());
    inv = at::empty({G, M}, raw.options().dtype(at::kFloat));
    const UnitRows a{tensor4(raw), G, M, D, inv.data_ptr<float>(), t.data_ptr()};
    const void* kernel = unit_rows(dtype_of(raw));
    launch(kernel, tiles(G * M, kRowsPerBlock), 32 * kRowsPerBlock, 0, a, raw);
  }

  // Where the gradient of t accumulates; for most that is not yet the result.
  at::Tensor wide() const { return at::empty(raw.sizes(), raw.options().dtype(at::kFloat)); }

  at::Tensor grad(const at::Tensor& du, const at::Tensor& peak) const {
    if (!inv.defined() && raw.scalar_type() == at::kFloat) return du;
    const int64_t G = raw.size(0), M = raw.size(1), D = raw.size(2);
    at::Tensor dx = at::empty(raw.sizes(), raw.options());
    const UnitGrad a{tensor4(raw),
                     G,
                     M,
                     D,
                     inv.defined() ? inv.data_ptr<float>() : nullptr,
                     du.data_ptr<float>(),
                     peak.data_ptr<float>(),
                     dx.data_ptr()};
    const void* kernel = unit_grad(dtype_of(raw));
    launch(kernel, tiles(G * M, kRowsPerBlock), 32 * kRowsPerBlock, 0, a, raw);
    return dx;
  }
};

// Rows [m0, m1) of problems [g0, g1).
struct Chunk {
  int64_t g0, g1, m0, m1;
  Scores scores;
  at::Tensor x, y, dots;  // [g, m, D], [g, N, D], [g, m, N]

  int64_t g() const { return g1 - g0; }
  int64_t m() const { return m1 - m0; }
  int64_t tiles_m() const { return tiles(m(), PairTile::kRows); }
  int64_t tiles_n() const { return tiles(scores.N, PairTile::kCols); }
  int64_t blocks() const { return g() * tiles_m() * tiles_n(); }
  // The part of a [.., G, M] tensor that belongs to the chunk.
  at::Tensor rows(const at::Tensor& t) const { return t.narrow(-2, g0, g()).narrow(-1, m0, m()); }
};

Indices indices(const OptTensor& t, const at::Tensor& x, int64_t rows, const char* name) {
  if (!t) return {};
  check_shape(*t, {x.size(0), rows}, name);
  FMM_CHECK(t->scalar_type() == at::kLong && t->device() == x.device(), name, ": int64, device");
  return {t->const_data_ptr<int64_t>(), {t->stride(0), t->stride(1)}};
}

// The inputs of a call, checked, and the way through its chunks.
struct Call {
  int64_t G, M, N, D, pitch;
  Rows x, y;
  at::Tensor scale;  // [G, M], perhaps with stride 0
  Indices positives, ids_x, ids_y;
  bool ignore;

  Call(const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
       const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y, bool ignore,
       bool normalize, const OptTensor& dots)
      : x(checked(x, y), normalize), y(y, normalize), ignore(ignore) {
    G = x.size(0), M = x.size(1), D = x.size(2), N = y.size(1);
    pitch = tiles(N, 8) * 8;
    FMM_CHECK(M < (1 << 30) && N < (1 << 30), "too many rows");
    FMM_CHECK(!dots, "dots: the CUDA kernels keep none");
    scale = contiguous_float(logit_scale);
    FMM_CHECK(scale.device() == x.device(), "logit_scale: device");
    if (scale.numel() == 1 && scale.dim() != 2) scale = scale.reshape({1, 1}).expand({G, M});
    check_shape(scale, {G, M}, "logit_scale");
    this->positives = indices(positives, x, M, "positives");
    this->ids_x = indices(ids_x, x, M, "ids_x"), this->ids_y = indices(ids_y, x, N, "ids_y");
    FMM_CHECK(ids_x.has_value() == ids_y.has_value(), "ids_x, ids_y: one without the other");
  }

  static const at::Tensor& checked(const at::Tensor& x, const at::Tensor& y) {
    FMM_CHECK(x.dim() == 3 && y.dim() == 3, "x, y: expected 3 dimensions");
    check_shape(y, {x.size(0), y.size(1), x.size(2)}, "y");
    FMM_CHECK(y.scalar_type() == x.scalar_type() && y.device() == x.device(), "y: dtype or device");
    return x;
  }

  bool empty() const { return G * M * N == 0; }
  at::TensorOptions floats() const { return scale.options(); }

  // body(chunk) with the chunk's products in place, in the order of rows.
  template <typename Body>
  void chunks(const Body& body) const {
    const int64_t fits = std::max<int64_t>(1, workspace / (pitch * int64_t{sizeof(float)}));
    const int64_t step_g = std::clamp<int64_t>(fits / M, 1, G);
    const int64_t step_m =
        fits >= M ? M : std::max<int64_t>(1, fits / PairTile::kRows) * PairTile::kRows;
    const at::Tensor room = at::empty({step_g * std::min(step_m, M) * pitch}, floats());
    for (int64_t g0 = 0; g0 < G; g0 += step_g) {
      for (int64_t m0 = 0; m0 < M; m0 += step_m) {
        Chunk c{g0, std::min(g0 + step_g, G), m0, std::min(m0 + step_m, M), {}, {}, {}, {}};
        c.x = x.t.narrow(0, g0, c.g()).narrow(1, m0, c.m()), c.y = y.t.narrow(0, g0, c.g());
        c.dots = view(room, c);
        product(c.dots, c.x, c.y.mT(), false);
        Scores& s = c.scores;
        s.dots = room.data_ptr<float>(), s.G = c.g(), s.M = c.m(), s.N = N, s.pitch = pitch;
        const at::Tensor part = c.rows(scale);
        s.scale = part.const_data_ptr<float>();
        s.scale_stride[0] = part.stride(0), s.scale_stride[1] = part.stride(1);
        s.positives = moved(positives, g0, m0), s.ids_x = moved(ids_x, g0, m0);
        s.ids_y = moved(ids_y, g0, 0), s.ignore = ignore;
        body(c);
      }
    }
  }

  // A chunk's [g, m, N] in a buffer whose rows are `pitch` long.
  at::Tensor view(const at::Tensor& room, const Chunk& c) const {
    return room.as_strided({c.g(), c.m(), N}, {c.m() * pitch, pitch, 1});
  }

 private:
  static Indices moved(const Indices& t, int64_t g, int64_t i) {
    if (!t.data) return t;
    return {t.data + g * t.stride[0] + i * t.stride[1], {t.stride[0], t.stride[1]}};
  }
};

// A number near max |w|, [1]: fp16 would flush w to zero without it; 1 for other types.
at::Tensor peak_of(const Call& call, std::initializer_list<at::Tensor> weights) {
  at::Tensor one = at::ones({1}, call.floats());
  if (call.x.raw.scalar_type() != at::kHalf || call.empty()) return one;
  const auto most = [](const at::Tensor& t) { return t.nan_to_num(0.0, 0.0, 0.0).abs().amax(); };
  at::Tensor sum = at::zeros({}, call.floats());
  for (const at::Tensor& w : weights) sum = sum + most(w).to(at::kFloat);
  const at::Tensor peak = sum * most(call.scale);
  return at::where(peak > 0.0, peak, one);
}

// Gradients of x and y where `needs`, then `sums` sums a row: write(chunk, w, part) launches the
// loss's kernel.
template <typename Write>
std::vector<at::Tensor> backward(const Call& call, at::ArrayRef<bool> needs, int64_t sums,
                                 const at::Tensor& peak, const Write& write) {
  const bool products = needs[0] || needs[1], empty = call.empty();
  at::Tensor dx, dy, room, totals = at::zeros({sums, call.G, call.M}, call.floats());
  if (needs[0]) dx = call.x.wide();
  if (needs[1]) dy = call.y.wide();
  if (empty) {
    for (at::Tensor* t : {&dx, &dy}) {
      if (t->defined()) t->zero_();
    }
  } else {
    const bool narrow = call.x.raw.scalar_type() != at::kFloat;
    call.chunks([&](const Chunk& c) {
      if (products && narrow && !room.defined()) {
        room = at::empty({c.g() * c.m() * call.pitch}, call.x.raw.options());
      }
      const at::Tensor w = narrow && products ? call.view(room, c) : c.dots;
      const at::Tensor part = at::empty({c.tiles_n(), sums, c.g(), c.m()}, call.floats());
      write(c, products ? w.data_ptr() : nullptr, part.data_ptr<float>());
      c.rows(totals).copy_(part.sum(0));
      if (needs[0]) product(dx.narrow(0, c.g0, c.g()).narrow(1, c.m0, c.m()), w, c.y, false);
      if (needs[1]) product(dy.narrow(0, c.g0, c.g()), w.mT(), c.x, c.m0 > 0);
    });
  }
  std::vector<at::Tensor> grads;
  if (needs[0]) grads.push_back(call.x.grad(dx, peak));
  if (needs[1]) grads.push_back(call.y.grad(dy, peak));
  for (int64_t k = 0; k < sums; ++k) {
    if (needs[2 + k]) grads.push_back(sums == 1 ? totals[k] : totals[k].clone());
  }
  return grads;
}

// Merges the parts of a chunk into the statistics [6, G, L], whose row `first` of problem g0 is the
// first.
void merge(const at::Tensor& part, const at::Tensor& stats, int64_t g0, int64_t first, bool join) {
  const int64_t G = part.size(2), L = part.size(3);
  const int64_t stride[] = {stats.stride(0), stats.stride(1)};
  double* to = stats.data_ptr<double>() + g0 * stride[1] + first;
  const Merge a{part.data_ptr<float>(), part.size(0), G, L, to, {stride[0], stride[1]}, join};
  launch(contrastive_merge(), tiles(G * L, kMergeThreads), kMergeThreads, 0, a, part);
}

Coefficients coefficients(const at::Tensor& coef, int64_t g0, int64_t first) {
  const int64_t stride[] = {coef.stride(0), coef.stride(1)};
  return {coef.const_data_ptr<double>() + g0 * stride[1] + first, {stride[0], stride[1]}};
}

}  // namespace

int64_t pair_workspace(int64_t bytes) { return std::exchange(workspace, bytes); }

std::tuple<at::Tensor, at::Tensor> contrastive_loss_fwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
    const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y, bool ignore,
    bool normalize, bool want_x, bool want_y, const OptTensor& dots) {
  const Plain plain;
  const Call call(x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, dots);
  const auto stats = [&](int64_t rows) {
    at::Tensor t = at::zeros({6, call.G, rows}, call.floats().dtype(at::kDouble));
    t.narrow(0, 0, 2).fill_(-kInf);
    return t;
  };
  at::Tensor stats_x = stats(call.M), stats_y = stats(call.N);
  if (call.empty()) return {stats_x, stats_y};
  call.chunks([&](const Chunk& c) {
    at::Tensor by_x, by_y;
    if (want_x) by_x = at::empty({c.tiles_n(), kPartStats, c.g(), c.m()}, call.floats());
    if (want_y) by_y = at::empty({c.tiles_m(), kPartStats, c.g(), call.N}, call.floats());
    const ContrastiveParts a{c.scores, want_x ? by_x.data_ptr<float>() : nullptr,
                             want_y ? by_y.data_ptr<float>() : nullptr};
    launch(contrastive_parts(), c.blocks(), PairTile::kThreads, 0, a, x);
    if (want_x) merge(by_x, stats_x, c.g0, c.m0, false);
    if (want_y) merge(by_y, stats_y, c.g0, 0, c.m0 > 0);
  });
  return {stats_x, stats_y};
}

std::vector<at::Tensor> contrastive_loss_bwd(const at::Tensor& coef_x, const at::Tensor& coef_y,
                                             const at::Tensor& x, const at::Tensor& y,
                                             const at::Tensor& logit_scale,
                                             const OptTensor& positives, const OptTensor& ids_x,
                                             const OptTensor& ids_y, bool ignore, bool normalize,
                                             std::array<bool, 3> needs, const OptTensor& dots) {
  const Plain plain;
  const Call call(x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, dots);
  const at::Tensor cx = contiguous_double(coef_x), cy = contiguous_double(coef_y);
  check_shape(cx, {5, call.G, call.M}, "coef_x");
  check_shape(cy, {5, call.G, call.N}, "coef_y");
  const at::Tensor peak = peak_of(call, {cx[1], cy[1]});
  return backward(call, needs, 1, peak, [&](const Chunk& c, void* w, float* part) {
    const ContrastiveDs a{c.scores, coefficients(cx, c.g0, c.m0), coefficients(cy, c.g0, 0),
                          w,        peak.data_ptr<float>(),       part};
    launch(contrastive_ds(dtype_of(x)), c.blocks(), PairTile::kThreads, 0, a, x);
  });
}

at::Tensor sigmoid_loss_fwd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
                            const at::Tensor& logit_bias, const OptTensor& positives,
                            const OptTensor& ids_x, const OptTensor& ids_y, bool normalize,
                            const OptTensor& dots) {
  const Plain plain;
  const Call call(x, y, logit_scale, positives, ids_x, ids_y, false, normalize, dots);
  const at::Tensor bias = contiguous_float(logit_bias);
  FMM_CHECK(bias.numel() == 1 && bias.device() == x.device(), "logit_bias");
  at::Tensor loss = at::zeros({call.G, call.M}, call.floats());
  if (call.empty()) return loss;
  call.chunks([&](const Chunk& c) {
    const at::Tensor part = at::empty({c.tiles_n(), c.g(), c.m()}, call.floats());
    const SigmoidParts a{c.scores, bias.const_data_ptr<float>(), part.data_ptr<float>()};
    launch(sigmoid_parts(), c.blocks(), PairTile::kThreads, 0, a, x);
    c.rows(loss).copy_(part.sum(0));
  });
  return loss;
}

std::vector<at::Tensor> sigmoid_loss_bwd(const at::Tensor& dloss, const at::Tensor& x,
                                         const at::Tensor& y, const at::Tensor& logit_scale,
                                         const at::Tensor& logit_bias, const OptTensor& positives,
                                         const OptTensor& ids_x, const OptTensor& ids_y,
                                         bool normalize, std::array<bool, 4> needs,
                                         const OptTensor& dots) {
  const Plain plain;
  const Call call(x, y, logit_scale, positives, ids_x, ids_y, false, normalize, dots);
  const at::Tensor bias = contiguous_float(logit_bias), weight = contiguous_float(dloss);
  FMM_CHECK(bias.numel() == 1 && bias.device() == x.device(), "logit_bias");
  check_shape(weight, {call.G, call.M}, "dloss");
  const at::Tensor peak = peak_of(call, {weight});
  return backward(call, needs, 2, peak, [&](const Chunk& c, void* w, float* part) {
    const SigmoidDs a{c.scores,
                      bias.const_data_ptr<float>(),
                      weight.const_data_ptr<float>() + c.g0 * call.M + c.m0,
                      call.M,
                      w,
                      peak.data_ptr<float>(),
                      part};
    launch(sigmoid_ds(dtype_of(x)), c.blocks(), PairTile::kThreads, 0, a, x);
  });
}

}  // namespace fmm::cuda
