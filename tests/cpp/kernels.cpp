// Runs every CPU kernel on ragged problems in exactly sized heap buffers, for the sanitizers, and
// compares forwards with a naive double loop. Built and run per instruction set by `make sanitize`.
#include "../../csrc/cpu/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/vec.h"

namespace ops = fmm::cpu::FMM_ISA;
using fmm::DType;
using fmm::Tensor4;

namespace {

std::mt19937 rng(1);

void two_threads(int64_t n, const fmm::Body& body) {
  if (n <= 0) return;
  std::thread other([&] { body(n / 2, n); });
  if (n / 2 > 0) body(0, n / 2);
  other.join();
}

// A tensor of exactly as many bytes as it has elements, and its values in double.
struct Data {
  std::vector<char> bytes;
  std::vector<double> value;
  Tensor4 view;

  Data(int64_t B, int64_t H, int64_t rows, int64_t width, DType dtype)
      : bytes(B * H * rows * width * ops::size_of(dtype)), value(B * H * rows * width) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < value.size(); ++i) {
      const float f = normal(rng);
      ops::store_row(bytes.data() + i * ops::size_of(dtype), &f, dtype, 1.0f, 1);
      float back;
      ops::load_row(&back, bytes.data() + i * ops::size_of(dtype), dtype, 1, 1);
      value[i] = back;
    }
    view = {bytes.data(), dtype, {H * rows * width, rows * width, width, 1}};
  }
};

int failures = 0;

void expect_close(const char* what, const std::vector<char>& got, DType dtype,
                  const std::vector<double>& want) {
  const double tolerance = dtype == DType::kFloat ? 2e-5 : dtype == DType::kHalf ? 1e-2 : 6e-2;
  for (size_t i = 0; i < want.size(); ++i) {
    float f;
    ops::load_row(&f, got.data() + i * ops::size_of(dtype), dtype, 1, 1);
    if (!(std::abs(f - want[i]) <= tolerance * (1.0 + std::abs(want[i])))) {
      std::printf("%s[%zu]: expected %g, got %g\n", what, i, want[i], f);
      ++failures;
      return;
    }
  }
}

// softmax(scale * q k^T) v of one plane; keys where keep.
void naive(const double* q, const double* k, const double* v, const std::vector<char>& keep,
           int64_t M, int64_t N, int64_t D, int64_t Dv, double scale, double* o) {
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> p(N);
    double total = 0.0;
    for (int64_t n = 0; n < N; ++n) {
      double s = 0.0;
      for (int64_t d = 0; d < D; ++d) s += q[m * D + d] * k[n * D + d];
      p[n] = keep[n] ? std::exp(s * scale) : 0.0;
      total += p[n];
    }
    for (int64_t j = 0; j < Dv; ++j) {
      double sum = 0.0;
      for (int64_t n = 0; n < N; ++n) sum += p[n] * v[n * Dv + j];
      o[m * Dv + j] = total > 0.0 ? sum / total : 0.0;
    }
  }
}

std::vector<char> random_mask(int64_t n, bool on) {
  std::vector<char> keep(n, 1);
  if (on) {
    for (auto& k : keep) k = rng() % 4 != 0;
  }
  return keep;
}

void bi_attention(int64_t M, int64_t N, int64_t D, int64_t Dx, int64_t Dy, DType dtype, bool rich) {
  const int64_t H = 2;
  Data qx(1, H, M, D, dtype), qy(1, H, N, D, dtype), vx(1, H, M, Dx, dtype), vy(1, H, N, Dy, dtype);
  Data bias(1, 1, M, N, dtype), dox(1, H, M, Dy, dtype), doy(1, H, N, Dx, dtype);
  const auto keep_x = random_mask(M, rich), keep_y = random_mask(N, rich);
  std::vector<char> ox(H * M * Dy * ops::size_of(dtype)), oy(H * N * Dx * ops::size_of(dtype));
  std::vector<double> lx(H * M), ly(H * N);
  fmm::BiAttention a{};
  a.B = 1, a.H = H, a.M = M, a.N = N, a.D = D, a.Dv_x = Dx, a.Dv_y = Dy;
  a.qk_x = qx.view, a.qk_y = qy.view, a.v_x = vx.view, a.v_y = vy.view;
  a.scale = 1.0f / std::sqrt(static_cast<float>(D)), a.clamp = INFINITY;
  a.mask_x = {reinterpret_cast<const bool*>(keep_x.data()), {M, 1}};
  a.mask_y = {reinterpret_cast<const bool*>(keep_y.data()), {N, 1}};
  a.o_x = ox.data(), a.o_y = oy.data(), a.lse_x = lx.data(), a.lse_y = ly.data();
  ops::bi_attention_fwd(a, two_threads);
  std::vector<double> want_x(H * M * Dy), want_y(H * N * Dx);
  for (int64_t h = 0; h < H; ++h) {
    const double *x = &qx.value[h * M * D], *y = &qy.value[h * N * D];
    naive(x, y, &vy.value[h * N * Dy], keep_y, M, N, D, Dy, a.scale, &want_x[h * M * Dy]);
    naive(y, x, &vx.value[h * M * Dx], keep_x, N, M, D, Dx, a.scale, &want_y[h * N * Dx]);
  }
  expect_close("bi o_x", ox, dtype, want_x);
  expect_close("bi o_y", oy, dtype, want_y);
  if (rich) {
    a.bias = bias.view, a.bias.stride[1] = 0;
    a.clamp = 2.0f;
    a.dropout = {true, 7, 1u << 29, 8.0f / 7.0f};
    ops::bi_attention_fwd(a, two_threads);
  }
  std::vector<char> dqx(qx.bytes.size()), dqy(qy.bytes.size()), dvx(vx.bytes.size()),
      dvy(vy.bytes.size());
  std::vector<float> dbias(M * N), zx(H * M), zy(H * N);
  fmm::BiAttentionGrad g{};
  g.do_x = dox.view, g.do_y = doy.view;
  g.o_x = dox.view, g.o_x.data = ox.data(), g.o_y = doy.view, g.o_y.data = oy.data();
  g.lse_x = lx.data(), g.lse_y = ly.data(), g.dlse_x = zx.data(), g.dlse_y = zy.data();
  g.dqk_x = dqx.data(), g.dqk_y = dqy.data(), g.dv_x = dvx.data(), g.dv_y = dvy.data();
  if (rich) {
    g.dbias = dbias.data();
    g.dbias_stride[2] = N, g.dbias_stride[3] = 1;
  }
  ops::bi_attention_bwd(a, g, two_threads);

  fmm::CoAttention c{};
  c.B = 1, c.H = H, c.dropout = a.dropout;
  c.side[0] = {M,       N,      D,        Dy,      qx.view,   qy.view,
               vy.view, a.bias, a.mask_y, a.scale, ox.data(), lx.data()};
  c.side[1] = {N, M, D, Dx, qy.view, qx.view, vx.view, {}, a.mask_x, a.scale, oy.data(), ly.data()};
  ops::co_attention_fwd(c, two_threads);
  if (!rich) {
    expect_close("co o_x", ox, dtype, want_x);
    expect_close("co o_y", oy, dtype, want_y);
  }
  fmm::CoAttentionGrad cg{};
  std::vector<char> dkx(qx.bytes.size()), dky(qy.bytes.size());
  cg.side[0] = {g.do_x,      g.o_x,      lx.data(),  zx.data(),
                dqx.data(),  dky.data(), dvy.data(), rich ? dbias.data() : nullptr,
                {0, 0, N, 1}};
  cg.side[1] = {g.do_y,     g.o_y,      ly.data(), zy.data(),   dqy.data(),
                dkx.data(), dvx.data(), nullptr,   {0, 0, 0, 0}};
  ops::co_attention_bwd(c, cg, two_threads);
}

// bi_attention of one stream with all heads, whose outputs and gradients at x are summed.
void fusion_attention(int64_t M, int64_t N, int64_t D, int64_t Dv, DType dtype, bool rich) {
  const int64_t H = 3;
  Data x(1, 1, M, D, dtype), k(1, H, N, D, dtype), v(1, H, N, Dv, dtype);
  Data bias(1, H, 1, N, dtype), d_o(1, 1, M, Dv, dtype), dz(1, H, N, D, dtype);
  x.view.stride[1] = d_o.view.stride[1] = 0;
  const auto keep_x = random_mask(M, rich), keep_y = random_mask(N, rich);
  std::vector<char> o(M * Dv * ops::size_of(dtype)), z(k.bytes.size());
  std::vector<double> lx(H * M), ly(H * N);
  fmm::BiAttention a{};
  a.B = 1, a.H = H, a.M = M, a.N = N, a.D = a.Dv_x = D, a.Dv_y = Dv;
  a.qk_x = a.v_x = x.view, a.qk_y = k.view, a.v_y = v.view;
  a.scale = 1.0f / std::sqrt(static_cast<float>(D)), a.clamp = INFINITY, a.sum_heads = true;
  a.mask_x = {reinterpret_cast<const bool*>(keep_x.data()), {M, 1}};
  a.mask_y = {reinterpret_cast<const bool*>(keep_y.data()), {N, 1}};
  a.o_x = o.data(), a.o_y = z.data(), a.lse_x = lx.data(), a.lse_y = ly.data();
  ops::bi_attention_fwd(a, two_threads);
  std::vector<double> want_o(M * Dv), want_z(H * N * D), head(M * Dv);
  for (int64_t h = 0; h < H; ++h) {
    const double *q = x.value.data(), *kh = &k.value[h * N * D];
    naive(q, kh, &v.value[h * N * Dv], keep_y, M, N, D, Dv, a.scale, head.data());
    naive(kh, q, q, keep_x, N, M, D, D, a.scale, &want_z[h * N * D]);
    for (int64_t i = 0; i < M * Dv; ++i) want_o[i] += head[i];
  }
  expect_close("fusion o", o, dtype, want_o);
  expect_close("fusion z", z, dtype, want_z);
  if (rich) {
    a.bias = bias.view, a.bias.stride[2] = 0;
    a.dropout = {true, 7, 1u << 29, 8.0f / 7.0f};
  }
  a.scale = 1.0f;  // as the backward asks
  ops::bi_attention_fwd(a, two_threads);
  std::vector<char> dx(x.bytes.size()), dk(k.bytes.size()), dv(v.bytes.size());
  std::vector<float> dbias(H * N), zx(H * M), zy(H * N);
  fmm::BiAttentionGrad g{};
  g.do_x = d_o.view, g.do_y = dz.view, g.o_y = dz.view, g.o_y.data = z.data();
  g.lse_x = lx.data(), g.lse_y = ly.data(), g.dlse_x = zx.data(), g.dlse_y = zy.data();
  g.dqk_x = g.dv_x = dx.data(), g.dqk_y = dk.data(), g.dv_y = dv.data();
  if (rich) {
    g.dbias = dbias.data();
    g.dbias_stride[0] = H * N, g.dbias_stride[1] = N, g.dbias_stride[3] = 1;
  }
  ops::bi_attention_bwd(a, g, two_threads);
}

void losses(int64_t G, int64_t M, int64_t N, int64_t D, DType dtype, bool rich) {
  Data x(G, 1, M, D, dtype), y(G, 1, N, D, dtype);
  std::vector<int64_t> positives(M), ids_x(G * M), ids_y(G * N);
  for (int64_t i = 0; i < M; ++i) positives[i] = static_cast<int64_t>(rng() % N);
  for (auto& id : ids_x) id = rng() % 50;
  for (auto& id : ids_y) id = rng() % 50;
  std::vector<float> scale(rich ? G * M : 1, 0.7f), dscale(G * M), dbias(G * M), rows(G * M);
  fmm::PairLoss a{};
  a.G = G, a.M = M, a.N = N, a.D = D, a.x = x.view, a.y = y.view;
  a.scale = scale.data(), a.scale_per_row = rich, a.normalize = rich, a.ignore = false;
  a.positives = {positives.data(), {0, 1}};
  if (rich) a.ids_x = {ids_x.data(), {M, 1}}, a.ids_y = {ids_y.data(), {N, 1}};
  // Every second tile of products is kept, or every one.
  const int64_t tiles_x = (M + 95) / 96, tiles_y = (N + 95) / 96;
  a.dots_tiles = G * tiles_x * (rich ? tiles_y : (tiles_y + 1) / 2);
  std::vector<float> dots(a.dots_tiles * fmm::dots_tile_floats(dtype));
  a.dots = dots.data();
  std::vector<double> sx(6 * G * M), sy(6 * G * N), cx(5 * G * M, 0.5), cy(5 * G * N, 0.5);
  ops::contrastive_loss_fwd(a, {sx.data(), sy.data(), true, true}, two_threads);
  std::vector<char> dx(x.bytes.size()), dy(y.bytes.size());
  ops::contrastive_loss_bwd(a, {cx.data(), cy.data(), dx.data(), dy.data(), dscale.data()},
                            two_threads);
  ops::sigmoid_loss_fwd(a, {-1.0f, rows.data()}, two_threads);
  const std::vector<float> weight(G * M, 1.0f);
  ops::sigmoid_loss_bwd(
      a, {-1.0f, weight.data(), dx.data(), dy.data(), dscale.data(), dbias.data()}, two_threads);
  if (rich) return;
  std::vector<double> want(G * M);
  for (int64_t r = 0; r < G * M; ++r) {
    for (int64_t j = 0; j < N; ++j) {
      double s = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        s += x.value[r * D + d] * y.value[(r / M * N + j) * D + d];
      }
      s = s * 0.7f - 1.0;
      want[r] += std::log1p(std::exp(positives[r % M] == j ? -s : s));
    }
  }
  std::vector<char> got(rows.size() * sizeof(float));
  std::memcpy(got.data(), rows.data(), got.size());
  expect_close("sigmoid", got, DType::kFloat, want);
}

}  // namespace

int main() {
  int cases = 0;
  for (DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf}) {
    for (bool rich : {false, true}) {
      for (auto [M, N, D, Dx, Dy] : {std::array<int64_t, 5>{1, 1, 1, 1, 1},
                                     {5, 7, 3, 2, 9},
                                     {200, 97, 33, 20, 47},
                                     {31, 290, 64, 16, 80},
                                     {130, 21, 64, 64, 64},
                                     {100, 36, 256, 200, 130}}) {
        bi_attention(M, N, D, Dx, Dy, dtype, rich);
        fusion_attention(M, N, D, Dy, dtype, rich);
        ++cases;
      }
      for (auto [G, M, N, D] : {std::array<int64_t, 4>{1, 1, 1, 1},
                                {3, 49, 32, 20},
                                {1, 300, 211, 33},
                                {2, 97, 193, 130}}) {
        losses(G, M, N, D, dtype, rich);
        ++cases;
      }
    }
  }
  std::printf("%d passed, %d failed\n", cases - failures, failures);
  return failures ? 1 : 0;
}
