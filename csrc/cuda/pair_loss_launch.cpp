// contrastive_loss and sigmoid_loss on CUDA tensors. Nothing waits for the device.
//
// 16-bit types up to D = 256 are fused: products by tensor cores, a forward kernel, and a backward
// kernel whose blocks own rows of x or of y, five products in all. Otherwise chunks of products
// that fit a workspace come from torch's matrix products, our kernels turn them into statistics or
// into w = scale * ds, and two more products give dx and dy; chunks add to dy in order. The forward
// leaves the products of as many chunks as fit `dots` to its backward: three products for those,
// four for the rest.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

#include "../common/launch.h"
#include "../ops.h"
#include "pair_loss.h"
#include "strided.h"
#include "tuning.h"

namespace fmm::cuda {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kMaxSplits = 8;
constexpr int kWalk = 4;       // tiles of stored products that a block walks
int64_t workspace = 64 << 20;  // bytes of a chunk's products or parts

int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

int64_t padded_rows(int64_t rows) { return tiles(rows, kFactRows) * kFactRows; }

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

// out = the sum of parts [n, ...].
void sum_of(const at::Tensor& parts, at::Tensor out) { at::sum_out(out, parts, 0); }

// A kernel of k.rows elements a block over n of them.
template <typename Params>
void run(const Kernel& k, int64_t n, const Params& params, const at::Tensor& on) {
  launch(k.function, tiles(n, k.rows), k.threads, k.smem, params, on);
}

const float* floats_of(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
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
    run(unit_rows(dtype_of(raw)), G * M, a, raw);
  }

  // Where the gradient of t accumulates; for most that is not yet the result.
  at::Tensor wide() const { return at::empty(raw.sizes(), raw.options().dtype(at::kFloat)); }

  at::Tensor grad(const at::Tensor& du, const at::Tensor& peak) const {
    if (!inv.defined() && raw.scalar_type() == at::kFloat) return du;
    const int64_t G = raw.size(0), M = raw.size(1), D = raw.size(2);
    at::Tensor dx = at::empty(raw.sizes(), raw.options());
    const UnitGrad a{tensor4(raw), G, M, D, floats_of(inv), du.data_ptr<float>(), floats_of(peak),
                     dx.data_ptr()};
    run(unit_grad(dtype_of(raw)), G * M, a, raw);
    return dx;
  }
};

// Rows [m0, m1) of problems [g0, g1).
struct Chunk {
  int64_t g0, g1, m0, m1;
  Scores scores;
  at::Tensor x, y, dots;  // [g, m, D], [g, N, D], stored products [g, m, N]
  bool kept = false;      // whether `dots` outlives the call

  int64_t g() const { return g1 - g0; }
  int64_t m() const { return m1 - m0; }
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
  PairKernels kernels;
  at::Tensor scale;  // [G, M], perhaps with stride 0
  at::Tensor bias;   // [1] of sigmoid_loss
  at::Tensor kept;  // products from forward to backward, rows in the order of G, M; undefined: none
  Indices positives, ids_x, ids_y;
  bool ignore;

  Call(PairKernels (*of)(DType, int), const at::Tensor& x, const at::Tensor& y,
       const at::Tensor& logit_scale, const OptTensor& positives, const OptTensor& ids_x,
       const OptTensor& ids_y, bool ignore, bool normalize, const OptTensor& dots)
      : x(checked(x, y), normalize), y(y, normalize), ignore(ignore) {
    G = x.size(0), M = x.size(1), D = x.size(2), N = y.size(1);
    pitch = tiles(N, 8) * 8;
    kernels = of(dtype_of(x), padded_width(D));
    FMM_CHECK(M < (1 << 30) && N < (1 << 30), "too many rows");
    if (dots) {
      kept = *dots;
      FMM_CHECK(kept.scalar_type() == at::kFloat && kept.dim() == 1 && kept.is_contiguous(),
                "dots");
      FMM_CHECK(kept.device() == x.device(), "dots: device");
    }
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

  // Whether products come from the streams.
  bool fused() const {
    return x.raw.scalar_type() != at::kFloat && D <= 256 &&
           (kernels.fused_fwd.smem <= max_shared(x.raw) &&
            kernels.fused_bwd.smem <= max_shared(x.raw));
  }

  // How many blocks share the walk of a row: enough for two a multiprocessor, of four tiles or
  // more.
  int64_t splits(const Kernel& k, int64_t G, int64_t rows, int64_t cols) const {
    const int64_t blocks = G * tiles(rows, k.rows), wanted = 2 * multiprocessors(x.raw);
    return std::clamp<int64_t>(wanted / blocks, 1, std::min(kMaxSplits, tiles(cols, 4 * k.cols)));
  }

  // body(chunk) in the order of rows, a row taking `bytes` of the workspace.
  template <typename Body>
  void chunks(int64_t bytes, int block, const Body& body) const {
    const int64_t fits = std::max<int64_t>(1, workspace / bytes);
    const int64_t step_g = std::clamp<int64_t>(fits / M, 1, G);
    const int64_t step_m = fits >= M ? M : std::max<int64_t>(1, fits / block) * block;
    for (int64_t g0 = 0; g0 < G; g0 += step_g) {
      for (int64_t m0 = 0; m0 < M; m0 += step_m) {
        Chunk c{g0, std::min(g0 + step_g, G), m0, std::min(m0 + step_m, M), {}, {}, {}, {}};
        c.x = x.t.narrow(0, g0, c.g()).narrow(1, m0, c.m()), c.y = y.t.narrow(0, g0, c.g());
        Scores& s = c.scores;
        s.G = c.g(), s.M = c.m(), s.N = N, s.pitch = pitch, s.bias = floats_of(bias);
        const at::Tensor part = c.rows(scale);
        s.scale = part.const_data_ptr<float>();
        s.scale_stride[0] = part.stride(0), s.scale_stride[1] = part.stride(1);
        s.positives = moved(positives, g0, m0), s.ids_x = moved(ids_x, g0, m0);
        s.ids_y = moved(ids_y, g0, 0), s.ignore = ignore;
        body(c);
      }
    }
  }

  // The same with the products stored, in `room` if not kept; a backward, `again`, finds the kept.
  template <typename Body>
  void stored_chunks(bool again, at::Tensor& room, const Body& body) const {
    const int64_t capacity = kept.defined() ? kept.numel() : 0;
    chunks(pitch * sizeof(float), PairTile::kRows, [&](Chunk& c) {
      const int64_t first = (c.g0 * M + c.m0) * pitch, size = c.g() * c.m() * pitch;
      c.kept = first + size <= capacity;
      c.dots = c.kept ? view(kept.narrow(0, first, size), c) : scratch(room, c, at::kFloat);
      c.scores.dots = c.dots.data_ptr<float>();
      if (!(c.kept && again)) product(c.dots, c.x, c.y.mT(), false);
      if (c.kept && !again) {  // an output of the op: its padding is not read, but defined
        kept.narrow(0, first, size).view({-1, pitch}).narrow(1, N, pitch - N).zero_();
      }
      body(c);
    });
  }

  // A chunk's [g, m, N] in `room`, which grows to the largest chunk.
  at::Tensor scratch(at::Tensor& room, const Chunk& c, at::ScalarType type) const {
    const int64_t size = c.g() * c.m() * pitch;
    if (!room.defined() || room.numel() < size) room = at::empty({size}, floats().dtype(type));
    return view(room, c);
  }

  // A chunk's [g, m, N] in a buffer whose rows are `pitch` long.
  at::Tensor view(const at::Tensor& room, const Chunk& c) const {
    return room.as_strided({c.g(), c.m(), N}, {c.m() * pitch, pitch, 1});
  }

  FactRows fact_rows_x() const {
    FactRows a{};
    a.L = M, a.scale = scale.const_data_ptr<float>(), a.mate = positives, a.id = ids_x;
    a.scale_stride[0] = scale.stride(0), a.scale_stride[1] = scale.stride(1);
    return a;
  }
  FactRows fact_rows_y() const {
    FactRows a{};
    a.L = N, a.id = ids_y;
    return a;
  }

 private:
  static Indices moved(const Indices& t, int64_t g, int64_t i) {
    if (!t.data) return t;
    return {t.data + g * t.stride[0] + i * t.stride[1], {t.stride[0], t.stride[1]}};
  }
};

// A number near max |w|, [1], without which fp16 would flush w to zero; undefined for other types.
at::Tensor peak_of(const Call& call, std::initializer_list<at::Tensor> weights) {
  if (call.x.raw.scalar_type() != at::kHalf || call.empty()) return {};
  const auto most = [](const at::Tensor& t) { return t.nan_to_num(0.0, 0.0, 0.0).abs().amax(); };
  at::Tensor sum = at::zeros({}, call.floats());
  for (const at::Tensor& w : weights) sum = sum + most(w).to(at::kFloat);
  const at::Tensor peak = sum * most(call.scale);
  return at::where(peak > 0.0, peak, at::ones({1}, call.floats()));
}

// What the backward needs to know of the rows of x or of y.
Facts facts_of(const Call& call, FactRows a, at::Tensor& hold) {
  a.G = call.G, a.padded = padded_rows(a.L);
  hold = at::empty({kFacts, a.G, a.padded}, call.floats());
  a.facts = hold.data_ptr<float>();
  run(fact_rows(), a.G * a.padded, a, call.x.raw);
  return {a.facts, {a.G * a.padded, a.padded}};
}

struct Backward {
  const Call& call;
  std::vector<bool> needs;  // x, y, scale and, of sigmoid_loss, bias
  at::Tensor peak;
  Facts x, y;
  at::Tensor hold_x, hold_y;

  std::vector<at::Tensor> run() const {
    at::Tensor dx, dy, sums;
    if (call.empty()) {
      sums = at::zeros({call.kernels.sums, call.G, call.M}, call.floats());
      if (needs[0]) dx = call.x.wide().zero_();
      if (needs[1]) dy = call.y.wide().zero_();
    } else if (call.fused()) {
      fused(dx, dy, sums);
    } else {
      stored(dx, dy, sums);
    }
    std::vector<at::Tensor> grads;
    if (needs[0]) grads.push_back(call.x.grad(dx, peak));
    if (needs[1]) grads.push_back(call.y.grad(dy, peak));
    for (size_t k = 2; k < needs.size(); ++k) {
      if (!needs[k]) continue;
      const at::Tensor sum = sums[k - 2];  // results of an op share no memory
      grads.push_back(peak.defined() ? sum * peak : k > 2 ? sum.clone() : sum);
    }
    return grads;
  }

 private:
  bool any_sums() const { return needs[2] || (needs.size() > 3 && needs[3]); }

  void fused(at::Tensor& dx, at::Tensor& dy, at::Tensor& sums) const {
    const Kernel& k = call.kernels.fused_bwd;
    const at::Tensor& on = call.x.raw;
    FusedBackward p{
        call.G, call.D, 0, {}, call.ids_x.data != nullptr, call.ignore, floats_of(call.bias)};
    at::Tensor out[2], part;
    int64_t blocks[2] = {0, 0};
    for (int i = 0; i < 2; ++i) {
      PairSide& a = p.side[i];
      const Rows& r = i ? call.y : call.x;
      a.t = strided(r.t), a.facts = i ? y : x, a.rows = r.t.size(1);
      const int64_t cols = i ? call.M : call.N;
      a.splits = call.splits(k, call.G, a.rows, cols);
      if (needs[i]) {
        out[i] = at::empty({a.splits, call.G, a.rows, call.D}, call.floats());
        a.out = out[i].data_ptr<float>();
      }
      if (i == 0 && any_sums()) {
        part = at::empty({a.splits, call.kernels.sums, call.G, a.rows}, call.floats());
        a.sums = part.data_ptr<float>();
      }
      if (a.out || a.sums) blocks[i] = call.G * tiles(a.rows, k.rows) * a.splits;
    }
    p.first = blocks[0];
    launch(k.function, blocks[0] + blocks[1], k.threads, k.smem, p, on);
    const auto total = [](const at::Tensor& t) { return t.size(0) == 1 ? t[0] : t.sum(0); };
    if (needs[0]) dx = total(out[0]);
    if (needs[1]) dy = total(out[1]);
    if (part.defined()) sums = total(part);
  }

  void stored(at::Tensor& dx, at::Tensor& dy, at::Tensor& sums) const {
    const bool products = needs[0] || needs[1], narrow = call.x.raw.scalar_type() != at::kFloat;
    const Kernel& k = call.kernels.stored_bwd;
    at::Tensor room[2];  // fp32, narrow
    if (needs[0]) dx = call.x.wide();
    if (needs[1]) dy = call.y.wide();
    if (any_sums()) sums = at::empty({call.kernels.sums, call.G, call.M}, call.floats());
    call.stored_chunks(true, room[0], [&](const Chunk& c) {
      const bool apart = products && (narrow || c.kept);  // another backward may read the kept
      const at::Tensor w = apart ? call.scratch(room[narrow], c, call.x.raw.scalar_type()) : c.dots;
      const int64_t parts = tiles(call.N, k.cols);
      const at::Tensor part = at::empty({parts, call.kernels.sums, c.g(), c.m()}, call.floats());
      const auto moved = [&](const Facts& f, int64_t first) {
        return Facts{f.data + c.g0 * f.stride[1] + first, {f.stride[0], f.stride[1]}};
      };
      const StoredBackward p{c.scores, moved(x, c.m0), moved(y, 0),
                             products ? w.data_ptr() : nullptr, part.data_ptr<float>()};
      const int64_t blocks = c.g() * tiles(c.m(), k.rows) * parts;
      launch(k.function, blocks, k.threads, k.smem, p, call.x.raw);
      if (any_sums()) sum_of(part, c.rows(sums));
      if (needs[0]) product(dx.narrow(0, c.g0, c.g()).narrow(1, c.m0, c.m()), w, c.y, false);
      if (needs[1]) product(dy.narrow(0, c.g0, c.g()), w.mT(), c.x, c.m0 > 0);
    });
  }
};

// forward(chunk, part_x, part_y) after each launch of the forward; parts as in PairForward.
template <typename Merge>
void forward(const Call& call, int64_t stats, bool want_x, bool want_y, const Merge& merge) {
  const bool fused = call.fused();
  const Kernel& k = fused ? call.kernels.fused_fwd : call.kernels.stored_fwd;
  const auto body = [&](const Chunk& c) {
    const int64_t splits =
        fused ? call.splits(k, c.g(), c.m(), call.N) : tiles(tiles(call.N, k.cols), kWalk);
    at::Tensor part_x, part_y;
    PairForward p{c.scores, {}, {}, call.D, splits, nullptr, nullptr};
    if (fused) p.x = strided(c.x), p.y = strided(c.y);
    if (want_x) {
      part_x = at::empty({splits, stats, c.g(), c.m()}, call.floats());
      p.part_x = part_x.data_ptr<float>();
    }
    if (want_y) {
      part_y = at::empty({tiles(c.m(), k.rows), stats, c.g(), call.N}, call.floats());
      p.part_y = part_y.data_ptr<float>();
    }
    launch(k.function, c.g() * tiles(c.m(), k.rows) * splits, k.threads, k.smem, p, call.x.raw);
    merge(c, part_x, part_y);
  };
  // A row's share of the parts of its tile, where a row of products is not kept.
  const int64_t bytes = want_y ? tiles(call.N * stats * int64_t{sizeof(float)}, k.rows) : 1;
  at::Tensor room;
  fused ? call.chunks(bytes, k.rows, body) : call.stored_chunks(false, room, body);
}

// Merges the parts of a chunk into the statistics [6, G, L], whose row `first` of problem g0 is the
// first.
void merge(const at::Tensor& part, const at::Tensor& stats, int64_t g0, int64_t first, bool join) {
  const int64_t G = part.size(2), L = part.size(3);
  const int64_t stride[] = {stats.stride(0), stats.stride(1)};
  double* to = stats.data_ptr<double>() + g0 * stride[1] + first;
  const Merge a{part.data_ptr<float>(), part.size(0), G, L, to, {stride[0], stride[1]}, join};
  run(merge_parts(part.size(0), G * L), G * L, a, part);
}

void set_bias(Call& call, const at::Tensor& logit_bias) {
  call.bias = contiguous_float(logit_bias);
  FMM_CHECK(call.bias.numel() == 1 && call.bias.device() == call.x.raw.device(), "logit_bias");
}

}  // namespace

int64_t pair_workspace(int64_t bytes) { return std::exchange(workspace, bytes); }

std::tuple<at::Tensor, at::Tensor> contrastive_loss_fwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
    const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y, bool ignore,
    bool normalize, bool want_x, bool want_y, const OptTensor& dots) {
  const Plain plain;
  const Call call(contrastive_kernels, x, y, logit_scale, positives, ids_x, ids_y, ignore,
                  normalize, dots);
  want_x = want_x && !call.empty(), want_y = want_y && !call.empty();
  const auto stats = [&](int64_t rows, bool written) {
    at::Tensor t = at::empty({6, call.G, rows}, call.floats().dtype(at::kDouble));
    if (!written) t.zero_().narrow(0, 0, 2).fill_(-kInf);
    return t;
  };
  at::Tensor stats_x = stats(call.M, want_x), stats_y = stats(call.N, want_y);
  if (!(want_x || want_y)) return {stats_x, stats_y};
  forward(call, kPartStats, want_x, want_y,
          [&](const Chunk& c, const at::Tensor& part_x, const at::Tensor& part_y) {
            if (want_x) merge(part_x, stats_x, c.g0, c.m0, false);
            if (want_y) merge(part_y, stats_y, c.g0, 0, c.m0 > 0);
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
  const Call call(contrastive_kernels, x, y, logit_scale, positives, ids_x, ids_y, ignore,
                  normalize, dots);
  const at::Tensor cx = contiguous_double(coef_x), cy = contiguous_double(coef_y);
  check_shape(cx, {5, call.G, call.M}, "coef_x");
  check_shape(cy, {5, call.G, call.N}, "coef_y");
  Backward backward{call, std::vector<bool>(needs.begin(), needs.end()),
                    peak_of(call, {cx[1], cy[1]})};
  FactRows a = call.fact_rows_x(), b = call.fact_rows_y();
  a.peak = b.peak = floats_of(backward.peak);
  a.coef = cx.const_data_ptr<double>(), b.coef = cy.const_data_ptr<double>();
  backward.x = facts_of(call, a, backward.hold_x);
  backward.y = facts_of(call, b, backward.hold_y);
  return backward.run();
}

at::Tensor contrastive_rows(const at::Tensor& stats, const OptTensor& dloss, double smoothing) {
  return fmm::contrastive_rows(stats, dloss, smoothing, [&](const ContrastiveRows& a) {
    run(loss_rows(), a.rows, a, stats);
  });
}

at::Tensor sigmoid_loss_fwd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,
                            const at::Tensor& logit_bias, const OptTensor& positives,
                            const OptTensor& ids_x, const OptTensor& ids_y, bool normalize,
                            const OptTensor& dots) {
  const Plain plain;
  Call call(sigmoid_kernels, x, y, logit_scale, positives, ids_x, ids_y, false, normalize, dots);
  set_bias(call, logit_bias);
  if (call.empty()) return at::zeros({call.G, call.M}, call.floats());
  at::Tensor loss = at::empty({call.G, call.M}, call.floats());
  forward(call, 1, true, false, [&](const Chunk& c, const at::Tensor& part, const at::Tensor&) {
    sum_of(part.select(1, 0), c.rows(loss));
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
  Call call(sigmoid_kernels, x, y, logit_scale, positives, ids_x, ids_y, false, normalize, dots);
  set_bias(call, logit_bias);
  const at::Tensor weight = contiguous_float(dloss);
  check_shape(weight, {call.G, call.M}, "dloss");
  Backward backward{call, std::vector<bool>(needs.begin(), needs.end()), peak_of(call, {weight})};
  FactRows a = call.fact_rows_x();
  a.weight = weight.const_data_ptr<float>(), a.peak = floats_of(backward.peak);
  backward.x = facts_of(call, a, backward.hold_x);
  backward.y = facts_of(call, call.fact_rows_y(), backward.hold_y);
  return backward.run();
}

}  // namespace fmm::cuda
