// co_attention and bi_attention on CUDA tensors: allocates results, fills Params, launches.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "../common/launch.h"
#include "../ops.h"
#include "attention_kernels.h"
#include "strided.h"

namespace fmm::cuda {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Queries `q` of a look at keys and values of b.
Pair make_pair(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptTensor& mask,
               const OptTensor& bias, at::Tensor& hold, std::optional<double> clamp, double scale,
               const char* name) {
  FMM_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, name, ": expected 4 dimensions");
  Pair p;
  const int64_t B = q.size(0), H = q.size(1), N = k.size(2);
  p.a.rows = q.size(2), p.b.rows = N, p.width = q.size(3);
  p.b.width_v = p.a.width_o = v.size(3);
  check_shape(k, {B, H, N, p.width}, name);
  check_shape(v, {B, H, N, v.size(3)}, name);
  for (const at::Tensor& t : {k, v}) {
    FMM_CHECK(t.scalar_type() == q.scalar_type() && t.device() == q.device(), name,
              ": dtype or device");
  }
  FMM_CHECK(p.width <= 256 && v.size(3) <= 256, name, ": widths above 256");
  for (int64_t rows : {p.a.rows, p.b.rows}) FMM_CHECK(rows < (1 << 30), name, ": too long");
  p.a.qk = strided(q), p.b.qk = strided(k), p.b.v = strided(v);
  p.b.keep = key_mask(mask, {B, N}, name);
  p.bias = bias4(bias, {B, H, p.a.rows, N}, hold);
  p.scale = static_cast<float>(scale);
  p.clamp = clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::infinity();
  p.plain = !clamp && !bias && scale > 0.0;
  return p;
}

int width_of(const Attention& all) {
  int64_t widest = 1;
  for (const Pair& p : all.pair) {
    widest = std::max({widest, p.width, p.a.width_o, p.b.width_v, p.b.width_o, p.a.width_v});
  }
  return padded_width(widest);
}

at::Tensor output(const at::Tensor& like, int64_t rows, int64_t width) {
  return at::empty({like.size(0), like.size(1), rows, width}, like.options());
}
at::Tensor lse_of(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(1), like.size(2)}, like.options().dtype(at::kDouble));
}

int64_t tiles_of(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }

// A block a tile of rows of `a` and share of its walk, of both pairs.
int64_t row_programs(Attention& all, int rows) {
  const auto blocks = [&](const Pair& p) {
    return all.B * all.H * tiles_of(p.a.rows, rows) * p.chunks;
  };
  all.first = blocks(all.pair[0]);
  return all.first + blocks(all.pair[1]);
}

// Blocks for which a multiprocessor has shared memory.
int blocks_by_memory(const Kernel& k, const at::Tensor& on) {
  constexpr int kReserved = 1024;  // bytes a block
  return shared_of_multiprocessor(on) / (k.smem + kReserved);
}

// The resident regime's kernel and problem, or an empty kernel where neither stream is short
// enough. pair[0].b becomes the resident stream.
struct Regime {
  Kernel kernel;
  Resident problem{};

  template <typename Pick>
  Regime(const Attention& all, const at::Tensor& on, const Pick& pick) {
    const int64_t M = all.pair[0].a.rows, N = all.pair[0].b.rows;
    if (all.B * all.H == 0 || M == 0 || N == 0) return;
    kernel = pick(dtype_of(on), width_of(all), std::min(M, N));
    if (kernel.function == nullptr || kernel.smem > max_shared(on)) {
      kernel = {};
      return;
    }
    problem.all = all;
    if (M < N) std::swap(problem.all.pair[0], problem.all.pair[1]);
    const int64_t tiles = tiles_of(problem.all.pair[0].a.rows, kernel.rows);
    problem.chunk = tiles_of(tiles, chunks_wanted(on)) * kernel.rows;
    problem.chunks = tiles_of(problem.all.pair[0].a.rows, problem.chunk);
  }
  // At most one block a multiprocessor in all, but one a head, and none of few rows: every further
  // block of a head writes and reads its share of b's results. Where heads alone occupy the device,
  // as many blocks a head as leave the least of it idle in the last round, if that is an eighth
  // less.
  int64_t chunks_wanted(const at::Tensor& on) const {
    constexpr int64_t kFewRows = 128;
    constexpr int64_t kStart = 3;  // tiles that a block's start and end are worth, about
    const int64_t heads = problem.all.B * problem.all.H, rows = problem.all.pair[0].a.rows;
    const int64_t most = std::max(rows / kFewRows, int64_t{1});
    if (heads < multiprocessors(on)) return std::min(multiprocessors(on) / heads, most);
    const int64_t blocks = std::min(blocks_by_memory(kernel, on), kernel.blocks);
    const int64_t slots = multiprocessors(on) * blocks, tiles = tiles_of(rows, kernel.rows);
    int64_t best = 1;
    const auto cost = [&](int64_t n) {
      return tiles_of(heads * n, slots) * (tiles_of(tiles, n) + kStart);
    };
    for (int64_t n = 2; n <= std::min(most, int64_t{4}); ++n) {
      if (cost(n) < cost(best)) best = n;
    }
    return 8 * cost(best) < 7 * cost(1) ? best : 1;
  }
  int64_t blocks() const { return problem.all.B * problem.all.H * problem.chunks; }
};

// o and lse of pair[0].b from the shares of its chunks.
void merge_shares(const Resident& r, const at::Tensor& on) {
  const Kernel k = merge(dtype_of(on));
  const int64_t blocks = r.all.B * r.all.H * tiles_of(r.all.pair[0].b.rows, k.rows);
  launch(k.function, blocks, k.threads, k.smem, r, on);
}

// Gradients of pair[0].b, likewise.
void sum_shares(const Resident& r, const at::Tensor& on) {
  const Kernel k = sum_chunks(dtype_of(on));
  const Pair& p = r.all.pair[0];
  const auto blocks = [&](int64_t width) { return tiles_of(p.b.rows * width, k.rows); };
  const int64_t all = r.all.B * r.all.H * (blocks(p.width) + blocks(p.b.width_v));
  launch(k.function, all, k.threads, k.smem, r, on);
}

// Room for the shares of one stream's results, `width` numbers a token.
struct Shares {
  at::Tensor part, lse;

  template <typename Chunked>  // Pair or Resident
  Shares(Chunked& p, int64_t tokens, int64_t width, const at::Tensor& on)
      : part(at::empty({tokens, width}, on.options().dtype(at::kFloat))),
        lse(at::empty({tokens}, on.options().dtype(at::kDouble))) {
    p.part = part.data_ptr<float>(), p.part_lse = lse.data_ptr<double>();
  }
};

// One launch, and `join` of the chunks' shares of `width` numbers a resident token.
template <typename Join>
void launch_resident(Regime& r, int64_t width, const at::Tensor& on, const Join& join) {
  Resident& p = r.problem;
  std::optional<Shares> shares;
  if (p.chunks > 1) shares.emplace(p, r.blocks() * p.all.pair[0].b.rows, width, on);
  launch(r.kernel.function, r.blocks(), r.kernel.threads, r.kernel.smem, p, on);
  if (p.chunks > 1) join(p, on);
}

// Divides walks that are longer than every block's would be if all were even, and puts the longer
// ones first: the device would wait for them.
void share_walks(Attention& all, const Kernel& k, const at::Tensor& on) {
  constexpr int64_t kLeast = 1024;  // tokens of a share: fewer are not worth a further launch
  constexpr int64_t kBlocks = 2;    // that a multiprocessor runs at once
  constexpr int64_t kWhole = 128;   // of all tiles and statistics
  int64_t walked = 0;
  for (const Pair& p : all.pair) walked += tiles_of(p.a.rows, k.rows) * p.b.rows;
  walked *= all.B * all.H;
  const int64_t even = std::max(walked / (kBlocks * multiprocessors(on)), kLeast);
  for (Pair& p : all.pair) {
    const int64_t wanted = std::max((p.b.rows + even / 2) / even, int64_t{1});
    p.chunk = std::max(tiles_of(tiles_of(p.b.rows, kWhole), wanted), int64_t{1}) * kWhole;
    p.chunks = std::max(tiles_of(p.b.rows, p.chunk), int64_t{1});
  }
  if (all.pair[0].chunk < all.pair[1].chunk) std::swap(all.pair[0], all.pair[1]);
}

// The tallest tile of pick(height) whose blocks occupy half of the device before they share walks,
// unless it spreads, and of which a multiprocessor runs eight warps at once; the lowest if no
// stream has more rows.
template <typename Pick>
Kernel pick_rows(Attention& all, const at::Tensor& on, const Pick& pick) {
  const Kernel low = pick(0);
  const int64_t rows = std::max(all.pair[0].a.rows, all.pair[1].a.rows);
  for (int height = kHighest; height > 0 && rows > low.rows; --height) {
    const Kernel tall = pick(height);
    if (tall.function == nullptr || tall.smem > max_shared(on)) continue;
    const int threads = blocks_by_memory(tall, on) * tall.threads;
    const bool busy = 2 * row_programs(all, tall.rows) >= multiprocessors(on);
    if (threads >= 256 && (busy || tall.spreads)) return tall;
  }
  return low;
}

// Launches `blocks` blocks on the rows of both pairs. Shares of results are width(pair) numbers a
// token, and joined.
template <typename Width, typename Join>
void launch_rows(Attention& all, const Kernel& k, int64_t blocks, const at::Tensor& on,
                 const Width& width, const Join& join) {
  std::vector<Shares> shares;
  for (Pair& p : all.pair) {
    const int64_t tokens = all.B * all.H * p.chunks * p.a.rows;
    if (p.chunks > 1) shares.emplace_back(p, tokens, width(p), on);
  }
  launch(k.function, blocks, k.threads, k.smem, all, on);
  for (const Pair& p : all.pair) {
    if (p.chunks == 1) continue;
    Resident r{all, p.chunks, p.chunk, p.part, p.part_lse};
    r.all.pair[0] = p, r.all.pair[0].b = p.a;
    join(r, on);
  }
}

// The same with the better tile of pick(height), and walks shared.
template <typename Pick, typename Width, typename Join>
void walk_rows(Attention all, const at::Tensor& on, const Pick& pick, const Width& width,
               const Join& join) {
  const Kernel k = pick_rows(all, on, pick);
  share_walks(all, k, on);
  launch_rows(all, k, row_programs(all, k.rows), on, width, join);
}

void launch_fwd(const Attention& all, const at::Tensor& on) {
  const auto pick = [&](int height) { return attend_fwd(dtype_of(on), width_of(all), height); };
  const auto width = [](const Pair& p) { return p.a.width_o; };
  walk_rows(all, on, pick, width, merge_shares);
}

Attention bi(const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,
             const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y,
             const OptTensor& bias, at::Tensor& hold, std::optional<double> clamp, double scale,
             double dropout_p, const OptTensor& seed) {
  Attention all;
  all.B = qk_x.size(0), all.H = qk_x.size(1);
  Pair p = make_pair(qk_x, qk_y, v_y, mask_y, bias, hold, clamp, scale, "bi_attention");
  check_shape(v_x, {all.B, all.H, p.a.rows, v_x.size(3)}, "v_x");
  FMM_CHECK(v_x.scalar_type() == qk_x.scalar_type() && v_x.size(3) <= 256, "v_x");
  p.a.v = strided(v_x), p.a.width_v = p.b.width_o = v_x.size(3);
  p.a.keep = key_mask(mask_x, {all.B, p.a.rows}, "mask_x");
  all.pair[0] = p;
  all.dropout = dropout(seed, dropout_p);
  return all;
}

// x looks at y in pair[0], y at x in pair[1].
Attention co(const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,
             const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y,
             const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias_xy,
             const OptTensor& bias_yx, at::Tensor (&hold)[2], double scale_x, double scale_y,
             double dropout_p, const OptTensor& seed) {
  Attention all;
  all.B = q_x.size(0), all.H = q_x.size(1);
  const char* name = "co_attention";
  all.pair[0] = make_pair(q_x, k_y, v_y, mask_y, bias_xy, hold[0], {}, scale_x, name);
  all.pair[1] = make_pair(q_y, k_x, v_x, mask_x, bias_yx, hold[1], {}, scale_y, name);
  all.pair[1].drop_a = 1, all.pair[1].drop_b = 0;
  all.dropout = dropout(seed, dropout_p);
  return all;
}

// What the backward reads of a stream whose tokens were queries; keeps converted copies.
struct Upstream {
  at::Tensor lse, dlse, stats, far;

  Upstream(Stream& s, const at::Tensor& d_o, const at::Tensor& o, const at::Tensor& lse_in,
           const OptTensor& dlse_in, const char* name) {
    const int64_t B = d_o.size(0), H = d_o.size(1);
    check_shape(d_o, {B, H, s.rows, s.width_o}, name);
    check_shape(o, d_o.sizes(), name);
    for (const OptTensor& t : {OptTensor(lse_in), dlse_in}) check_shape(t, {B, H, s.rows}, name);
    FMM_CHECK(d_o.scalar_type() == o.scalar_type(), name, ": dtype");
    lse = contiguous_double(lse_in);
    if (dlse_in) dlse = contiguous_float(*dlse_in), s.dlse = dlse.const_data_ptr<float>();
    s.d_o = strided(d_o), s.o_in = strided(o), s.lse = lse.data_ptr<double>();
    const at::TensorOptions floats = lse.options().dtype(at::kFloat);
    s.stats.padded = (s.rows + kStatRows - 1) / kStatRows * kStatRows;
    stats = at::empty({kStats, B * H, s.stats.padded}, floats);
    far = at::empty({B * H, s.stats.padded / 16}, floats);
    s.stats.data = stats.data_ptr<float>(), s.stats.far = far.data_ptr<float>();
  }
  // dlse, 0 where the query has no key.
  at::Tensor reaching() const {
    const at::Tensor none = at::zeros({}, lse.options().dtype(at::kFloat));
    return dlse.defined() ? at::where(lse == -kInf, none, dlse) : none.expand(lse.sizes());
  }
};

// Statistics of the queries of both pairs.
void launch_delta(Attention& all, const at::Tensor& on) {
  const Kernel k = delta(dtype_of(on));
  const auto blocks = [&](int i) { return all.B * all.H * all.pair[i].a.stats.padded / k.rows; };
  all.first = blocks(0);
  launch(k.function, all.first + blocks(1), k.threads, k.smem, all, on);
}

// Numbers a token that a block of the backward leaves as its share.
int64_t bwd_width(const Pair& p) { return p.width + p.a.width_v; }

// One launch of the backward for the rows of either pair's `a` that want gradients.
void launch_owner(Attention all, Softmax which, const at::Tensor& on) {
  for (Pair& p : all.pair) {
    if (!p.a.dqk && !p.a.dv) p.a.rows = 0;  // no programs
  }
  const auto pick = [&](int height) {
    return owner_bwd(dtype_of(on), width_of(all), which, height);
  };
  walk_rows(all, on, pick, bwd_width, sum_shares);
}

// The gradient of a bias. Where it is constant over the keys of a softmax, ds of that softmax sums
// to dlse, and no rounding of o enters; the kernel adds the others.
at::Tensor launch_dbias(const Attention& all, const at::Tensor& bias, bool both,
                        const Upstream& rows, const Upstream& cols, const at::Tensor& on) {
  BiasGrad g{all, nullptr, {1, 1, 1, 1}};
  for (int64_t d = 0; d < bias.dim(); ++d) g.sizes[4 - bias.dim() + d] = bias.size(d);
  const bool kernel_rows = g.sizes[3] != 1, kernel_cols = both && g.sizes[2] != 1;
  at::Tensor db;
  if (kernel_rows || kernel_cols) {
    const Kernel k = dbias(dtype_of(on), width_of(all),
                           kernel_rows && kernel_cols ? Softmax::kBoth
                           : kernel_rows              ? Softmax::kRow
                                                      : Softmax::kColumn);
    db = at::empty(g.sizes, bias.options().dtype(at::kFloat));
    g.db = db.data_ptr<float>();
    const int64_t tiles =
        ((g.sizes[2] + k.rows - 1) / k.rows) * ((g.sizes[3] + k.cols - 1) / k.cols);
    launch(k.function, g.sizes[0] * g.sizes[1] * tiles, k.threads, k.smem, g, on);
  } else {
    db = at::zeros(g.sizes, bias.options().dtype(at::kFloat));
  }
  if (!kernel_rows) db += rows.reaching().unsqueeze(3).sum_to_size(g.sizes);
  if (both && !kernel_cols) db += cols.reaching().unsqueeze(2).sum_to_size(g.sizes);
  return db.view(bias.sizes()).to(bias.scalar_type());
}

// Gradients in the order of the op's inputs, only those that are needed.
struct Results {
  std::vector<at::Tensor> grads;

  void* next(bool need, const at::Tensor& like) {
    if (!need) return nullptr;
    grads.push_back(at::empty(like.sizes(), like.options()));
    return grads.back().data_ptr();
  }
};

}  // namespace

Four bi_attention_fwd(const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,
                      const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y,
                      const OptTensor& bias, std::optional<double> clamp, double scale,
                      double dropout_p, const OptTensor& seed) {
  at::Tensor hold;
  Attention all =
      bi(qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, hold, clamp, scale, dropout_p, seed);
  at::Tensor o_x = output(qk_x, qk_x.size(2), v_y.size(3)), lse_x = lse_of(qk_x);
  at::Tensor o_y = output(qk_x, qk_y.size(2), v_x.size(3)), lse_y = lse_of(qk_y);
  Pair& p = all.pair[0];
  p.a.o = o_x.data_ptr(), p.a.lse = lse_x.data_ptr<double>();
  p.b.o = o_y.data_ptr(), p.b.lse = lse_y.data_ptr<double>();
  all.pair[1] = swapped(p);
  Regime regime(all, qk_x, resident_fwd);
  if (regime.kernel.function) {
    launch_resident(regime, regime.problem.all.pair[0].b.width_o, qk_x, merge_shares);
  } else {
    launch_fwd(all, qk_x);
  }
  return {o_x, o_y, lse_x, lse_y};
}

Four co_attention_fwd(const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,
                      const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y,
                      const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias_xy,
                      const OptTensor& bias_yx, double scale_x, double scale_y, double dropout_p,
                      const OptTensor& seed) {
  at::Tensor hold[2];
  Attention all = co(q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, hold, scale_x,
                     scale_y, dropout_p, seed);
  Pair& x = all.pair[0];
  Pair& y = all.pair[1];
  at::Tensor o_x = output(q_x, q_x.size(2), v_y.size(3)), lse_x = lse_of(q_x);
  at::Tensor o_y = output(q_x, q_y.size(2), v_x.size(3)), lse_y = lse_of(q_y);
  x.a.o = o_x.data_ptr(), x.a.lse = lse_x.data_ptr<double>();
  y.a.o = o_y.data_ptr(), y.a.lse = lse_y.data_ptr<double>();
  launch_fwd(all, q_x);
  return {o_x, o_y, lse_x, lse_y};
}

std::vector<at::Tensor> bi_attention_bwd(
    const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,
    const OptTensor& dlse_y, const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,
    const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
    const at::Tensor& o_x, const at::Tensor& o_y, const at::Tensor& lse_x, const at::Tensor& lse_y,
    std::optional<double> clamp, double scale, double dropout_p, const OptTensor& seed,
    std::array<bool, 5> needs) {
  at::Tensor hold;
  Attention all =
      bi(qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, hold, clamp, scale, dropout_p, seed);
  Pair& p = all.pair[0];
  const Upstream x(p.a, do_x, o_x, lse_x, dlse_x, "do_x");
  const Upstream y(p.b, do_y, o_y, lse_y, dlse_y, "do_y");
  if (p.a.rows > 0) p.centre = p.a.lse, p.centre_stride = p.a.rows;
  Results out;
  p.a.dqk = out.next(needs[0], qk_x), p.b.dqk = out.next(needs[1], qk_y);
  p.a.dv = out.next(needs[2], v_x), p.b.dv = out.next(needs[3], v_y);
  all.pair[1] = swapped(p);
  launch_delta(all, qk_x);
  Regime regime(all, qk_x, resident_bwd);
  if (!regime.kernel.function) {
    launch_owner(all, Softmax::kBoth, qk_x);
  } else if (needs[0] || needs[1] || needs[2] || needs[3]) {
    Attention rows = regime.problem.all;
    rows.pair[0] = swapped(rows.pair[0]), rows.pair[1].a.rows = 0;
    rows.pair[0].chunks = regime.problem.chunks, rows.pair[0].chunk = regime.problem.chunk;
    rows.first = regime.blocks();
    launch_rows(rows, regime.kernel, rows.first, qk_x, bwd_width, sum_shares);
  }
  if (needs[4]) out.grads.push_back(launch_dbias(all, *bias, true, x, y, qk_x));
  return out.grads;
}

std::vector<at::Tensor> co_attention_bwd(
    const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,
    const OptTensor& dlse_y, const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,
    const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y, const OptTensor& mask_x,
    const OptTensor& mask_y, const OptTensor& bias_xy, const OptTensor& bias_yx,
    const at::Tensor& o_x, const at::Tensor& o_y, const at::Tensor& lse_x, const at::Tensor& lse_y,
    double scale_x, double scale_y, double dropout_p, const OptTensor& seed,
    std::array<bool, 8> needs) {
  at::Tensor hold[2];
  Attention all = co(q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, hold, scale_x,
                     scale_y, dropout_p, seed);
  Pair& x = all.pair[0];
  Pair& y = all.pair[1];
  const Upstream up_x(x.a, do_x, o_x, lse_x, dlse_x, "do_x");
  const Upstream up_y(y.a, do_y, o_y, lse_y, dlse_y, "do_y");
  Results out;
  x.a.dqk = out.next(needs[0], q_x), y.b.dqk = out.next(needs[1], k_x);
  y.b.dv = out.next(needs[2], v_x), y.a.dqk = out.next(needs[3], q_y);
  x.b.dqk = out.next(needs[4], k_y), x.b.dv = out.next(needs[5], v_y);
  launch_delta(all, q_x);
  launch_owner(all, Softmax::kRow, q_x);
  Attention keys = all;
  for (Pair& p : keys.pair) p = swapped(p);
  launch_owner(keys, Softmax::kColumn, q_x);
  if (needs[6]) out.grads.push_back(launch_dbias(all, *bias_xy, false, up_x, up_y, q_x));
  if (needs[7]) {
    std::swap(all.pair[0], all.pair[1]);
    out.grads.push_back(launch_dbias(all, *bias_yx, false, up_y, up_x, q_x));
  }
  return out.grads;
}

}  // namespace fmm::cuda
