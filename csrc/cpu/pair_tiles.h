// The loop that both pair losses share: strips of x against strips of y in stages. In stage t strip
// p of x meets strip (p + t) mod S of y, so every strip has one owner at a time: no locks, no
// partial sums, the same order of additions with any number of threads.
#pragma once

#include <algorithm>

#include "../pair_loss.h"
#include "columns.h"
#include "kept_dots.h"

namespace fmm::cpu::FMM_ISA {

constexpr int64_t kStrips = 16;
constexpr int64_t kBlock64 = kBlock;

struct Match {
  int16_t i, j;
  bool positive;  // else outside the denominator
  float dot;      // raw product
};

// One tile of raw products and what the loss functor needs to know about it.
struct PairTile {
  int64_t g, m0, n0;
  int rows, cols, nv;
  float *dots, *s;  // products; scores, a functor's own, where products may be if nobody keeps them
  TileMask mask;
  Match* match;
  int matches;
  alignas(64) float scale[kBlock];
};

class PairShape {
 public:
  explicit PairShape(const PairLoss& a)
      : a_(a), tiles_x_(ceil_div(a.M, kBlock)), tiles_y_(ceil_div(a.N, kBlock)) {
    const int64_t wanted = a.G > 0 ? ceil_div(kStrips, a.G) : 1;
    strips_ = std::max<int64_t>(1, std::min(wanted, std::min(tiles_x_, tiles_y_)));
  }

 protected:
  struct Range {
    int64_t begin, end;
  };
  Range strip(int64_t p, int64_t tiles, int64_t rows) const {
    return {p * tiles / strips_ * kBlock, std::min(rows, (p + 1) * tiles / strips_ * kBlock)};
  }

  // 1 / norm of every row of t.
  void inverse_norms(float* out, const Tensor4& t, int64_t rows, ParallelFor parallel) const {
    parallel(a_.G * rows, [&](int64_t begin, int64_t end) {
      float* row = Arena::local().take<float>(a_.D);
      for (int64_t r = begin; r < end; ++r) {
        read_row(row, rows_of(t, r / rows, 0, r % rows), 0, a_.D);
        const float norm = std::sqrt(dot_product(row, row, a_.D));
        out[r] = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
      }
    });
  }

  void find_matches(PairTile& t) const {
    t.matches = 0;
    auto add = [&](int i, int64_t j, bool positive) {
      t.match[t.matches++] = {static_cast<int16_t>(i), static_cast<int16_t>(j), positive,
                              t.dots[i * kBlock + j]};
    };
    for (int i = 0; i < t.rows; ++i) {
      const int64_t own = a_.positives.data ? a_.positives.at(t.g, t.m0 + i) - t.n0 : -1;
      const bool here = own >= 0 && own < t.cols;
      if (here) add(i, own, true);
      if (!a_.ids_x.data) continue;
      const int64_t id = a_.ids_x.at(t.g, t.m0 + i);
      for (int j = 0; j < t.cols; ++j) {
        if (a_.ids_y.at(t.g, t.n0 + j) == id && !(here && j == own)) add(i, j, !a_.ignore);
      }
    }
  }

  const PairLoss& a_;
  int64_t tiles_x_, tiles_y_, strips_;
};

// Op: `void tile(PairTile&, scratch)`; a backward also fills `ds` (times scale) for the products.
template <class U, class Op>
class PairLoop : PairShape {
 public:
  // dx, dy: outputs of a backward, nullptr where not needed (both in a forward).
  PairLoop(const PairLoss& a, Op& op, void* dx, void* dy, ParallelFor parallel)
      : PairShape(a), kept_(a), op_(op), dx_(dx), dy_(dy), parallel_(parallel) {
    width_ = round_up(a.D, kLanes);
    const int64_t rows_x = std::min(kBlock64, a.M), rows_y = std::min(kBlock64, a.N);
    a_block_ = a_units<U>(rows_x, a.D), bx_ = b_units<U>(rows_x, a.D);
    bt_ = bt_units<U>(rows_y, a.D), by_ = b_units<U>(rows_y, a.D);
  }

  void run() {
    SharedArena shared;
    Arena& arena = *shared;
    inv_x_ = inv_y_ = nullptr;
    if (a_.normalize) {
      inv_x_ = arena.take<float>(a_.G * a_.M);
      inv_y_ = arena.take<float>(a_.G * a_.N);
      inverse_norms(inv_x_, a_.x, a_.M, parallel_);
      inverse_norms(inv_y_, a_.y, a_.N, parallel_);
    }
    pack(arena);
    acc_x_ = accumulator(arena, dx_, a_.G * a_.M);
    acc_y_ = accumulator(arena, dy_, a_.G * a_.N);
    for (int64_t stage = 0; stage < strips_; ++stage) {
      parallel_(a_.G * strips_, [&](int64_t begin, int64_t end) {
        Work w;
        make_work(w, Arena::local());
        for (int64_t t = begin; t < end; ++t) {
          const int64_t p = t % strips_;
          block(w, t / strips_, p, (p + stage) % strips_, stage > 0);
        }
      });
    }
    finish(dx_, acc_x_, a_.x, inv_x_, a_.M);
    finish(dy_, acc_y_, a_.y, inv_y_, a_.N);
  }

 private:
  // Tiles a side of a patch. Their ds wait in the second-level cache (a third of a MiB) until all
  // are there: then a block of dx or dy, which is not, is visited once for three products.
  static constexpr int kPatch = 3;

  struct Work {
    PTile<U> ds[kPatch][kPatch];  // by tile of x, tile of y
    PairTile tile;
    typename Op::Scratch op;
  };

  void make_work(Work& w, Arena& arena) const {
    for (int64_t i = 0; i < std::min<int64_t>(kPatch, tiles_x_); ++i) {
      for (int64_t j = 0; j < std::min<int64_t>(kPatch, tiles_y_); ++j) {
        w.ds[i][j] = PTile<U>::make(arena, Op::kBackward, Op::kBackward);
      }
    }
    w.tile.s = arena.take<float>(kBlock * kBlock);
    w.tile.match = arena.take<Match>(kBlock * kBlock);
    w.op.make(arena);
  }

  // Every block of rows once, in the forms that the products read: O((M + N) * D).
  void pack(Arena& arena) {
    const bool in_place = !inv_x_ && a_.x.stride[0] % kPerUnit<U> == 0 &&
                          readable_everywhere<U>(rows_of(a_.x, 0, 0, 0), a_.D);
    xa_ = in_place ? nullptr : arena.take<U>(a_.G * tiles_x_ * a_block_);
    xb_ = dy_ ? arena.take<U>(a_.G * tiles_x_ * bx_) : nullptr;
    yt_ = arena.take<U>(a_.G * tiles_y_ * bt_);
    yb_ = dx_ ? arena.take<U>(a_.G * tiles_y_ * by_) : nullptr;
    pack_blocks(a_.x, inv_x_, a_.M, xa_, nullptr, xb_, bx_);
    pack_blocks(a_.y, inv_y_, a_.N, nullptr, yt_, yb_, by_);
  }

  void pack_blocks(const Tensor4& t, const float* inv, int64_t rows, U* as_a, U* as_bt, U* as_b,
                   int64_t b) const {
    const int64_t tiles = ceil_div(rows, kBlock);
    parallel_(a_.G * tiles, [&](int64_t begin, int64_t end) {
      U* scratch = Arena::local().take<U>(scratch_units<U>(a_.D));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i / tiles, row = i % tiles * kBlock, n = std::min(kBlock64, rows - row);
        RowSource src = rows_of(t, g, 0, row);
        src.factor = inv ? inv + g * rows + row : nullptr;
        if (as_a) pack_a(as_a + i * a_block_, src, n, a_.D);
        if (as_bt) pack_b_transposed(as_bt + i * bt_, scratch, src, n, a_.D);
        if (as_b) pack_b(as_b + i * b, scratch, src, n, a_.D);
      }
    });
  }

  // fp32 sums of a gradient: in its own memory where layout allows. Stage 0 sets every block.
  float* accumulator(Arena& arena, void* out, int64_t rows) const {
    if (!out) return nullptr;
    const bool own = a_.x.dtype == DType::kFloat && a_.D % kLanes == 0;
    float* acc = own ? static_cast<float*>(out) : arena.take<float>(rows * width_);
    if (a_.M == 0 || a_.N == 0) std::fill(acc, acc + rows * width_, 0.0f);
    return acc;
  }

  // Strip p of x against strip q of y; `add`: to what their gradients hold.
  void block(Work& w, int64_t g, int64_t p, int64_t q, bool add) const {
    const Range xs = strip(p, tiles_x_, a_.M), ys = strip(q, tiles_y_, a_.N);
    constexpr int64_t kStep = kPatch * kBlock64;
    for (int64_t n = ys.begin; n < ys.end; n += kStep) {
      for (int64_t m = xs.begin; m < xs.end; m += kStep) {
        const Range part_x{m, std::min(m + kStep, xs.end)}, part_y{n, std::min(n + kStep, ys.end)};
        patch(w, g, part_x, part_y);
        if (Op::kBackward && dx_) {
          add_products<true>(w, acc_x_ + g * a_.M * width_, part_x, yb_ + g * tiles_y_ * by_, by_,
                             part_y, add || n > ys.begin);
        }
        if (Op::kBackward && dy_) {
          add_products<false>(w, acc_y_ + g * a_.N * width_, part_y, xb_ + g * tiles_x_ * bx_, bx_,
                              part_x, add || m > xs.begin);
        }
      }
    }
  }

  void patch(Work& w, int64_t g, Range xs, Range ys) const {
    PairTile& t = w.tile;
    t.g = g;
    for (t.n0 = ys.begin; t.n0 < ys.end; t.n0 += kBlock) {
      t.cols = static_cast<int>(std::min(kBlock64, ys.end - t.n0));
      t.nv = vectors(t.cols);
      for (t.m0 = xs.begin; t.m0 < xs.end; t.m0 += kBlock) {
        t.rows = static_cast<int>(std::min(kBlock64, xs.end - t.m0));
        one_tile(w, w.ds[(t.m0 - xs.begin) / kBlock][(t.n0 - ys.begin) / kBlock]);
      }
    }
  }

  // Rows `own` of dx = ds . y (kX), or of dy = ds^T . x, over rows `other`, packed in
  // blocks of `size` units; or added to what they are.
  template <bool kX>
  void add_products(const Work& w, float* acc, Range own, const U* b, int64_t size, Range other,
                    bool add) const {
    for (int64_t r = own.begin; r < own.end; r += kBlock) {
      Term<U> terms[kPatch];
      int count = 0;
      for (int64_t k = other.begin; k < other.end; k += kBlock, ++count) {
        const int n = static_cast<int>(std::min(kBlock64, other.end - k));
        const int64_t i = (r - own.begin) / kBlock;
        const BOperand<U> rows = packed_b(b + k / kBlock * size, n);
        terms[count] =
            kX ? rows_term(w.ds[i][count], n, rows) : columns_term(w.ds[count][i], n, rows);
      }
      const int rows = static_cast<int>(std::min(kBlock64, own.end - r));
      gemm<U, kX>(rows, vectors(a_.D), terms, count, kX ? PTile<U>::kLdRm : PTile<U>::kLd,
                  acc + r * width_, width_, add, nullptr);
    }
  }

  void one_tile(Work& w, const PTile<U>& ds) const {
    PairTile& t = w.tile;
    const int64_t x = t.g * tiles_x_ + t.m0 / kBlock, y = t.g * tiles_y_ + t.n0 / kBlock;
    const U* rows =
        xa_ ? xa_ + x * a_block_ : static_cast<const U*>(at(a_.x, a_.x.offset(t.g, 0, t.m0)));
    const int64_t ld = xa_ ? units<U>(a_.D) : a_.x.stride[2] / kPerUnit<U>;
    float most = 0.0f;
    for (int i = 0; i < t.rows; ++i) {
      t.scale[i] = a_.row_scale(t.g, t.m0 + i);
      most = std::max(most, std::fabs(t.scale[i]));
    }
    float* const kept = kept_.at(x, t.n0 / kBlock);
    const bool multiples = kept && kept_.as_multiples();
    t.dots = kept && !multiples ? kept : t.s;
    bool ready = Op::kBackward && kept;
    if (ready && multiples) ready = KeptDots::get(kept, t.dots, t.rows, t.nv);
    if (!ready) scores<U>({rows, ld}, 0, yt_ + y * bt_, t.rows, t.cols, a_.D, t.dots);
    if (!Op::kBackward && multiples) KeptDots::put(kept, t.dots, t.rows, t.nv, most);
    fill_mask(t.mask, {}, {}, 0, t.m0, t.n0, t.cols);
    find_matches(t);
    op_.tile(t, w.op, ds);
  }

  // Through the normalisation, d = inv * (d - u <u, d>) with u the unit row, and into the output.
  void finish(void* out, float* acc, const Tensor4& t, const float* inv, int64_t rows) const {
    if (!out || (!inv && acc == out)) return;
    parallel_(a_.G * rows, [&](int64_t begin, int64_t end) {
      float* unit = Arena::local().take<float>(a_.D);
      for (int64_t r = begin; r < end; ++r) {
        float* d = acc + r * width_;
        if (inv) {
          RowSource src = rows_of(t, r / rows, 0, r % rows);
          src.factor = inv + r;
          read_row(unit, src, 0, a_.D);
          const float along = dot_product(unit, d, a_.D);
          for (int64_t j = 0; j < a_.D; ++j) d[j] = (d[j] - unit[j] * along) * inv[r];
        }
        if (acc != out) {
          store_row(static_cast<char*>(out) + r * a_.D * size_of(t.dtype), d, t.dtype, 1.0f, a_.D);
        }
      }
    });
  }

  KeptDots kept_;
  Op& op_;
  void *dx_, *dy_;
  ParallelFor parallel_;
  float *inv_x_, *inv_y_, *acc_x_, *acc_y_;
  U *xa_, *xb_, *yt_, *yb_;  // blocks of x and y: A operand, B operands; xa_ nullptr: x itself
  int64_t width_, a_block_, bt_, bx_, by_;  // units of a block
};

// Runs Op over all tiles, in bf16 products where the machine has them.
template <class Op>
void pair_loop(const PairLoss& a, Op& op, void* dx, void* dy, ParallelFor parallel) {
#if defined(__AVX512BF16__)
  if (a.x.dtype == DType::kBFloat16) {
    PairLoop<Bf2, Op>(a, op, dx, dy, parallel).run();
    return;
  }
#endif
  PairLoop<float, Op>(a, op, dx, dy, parallel).run();
}

}  // namespace fmm::cpu::FMM_ISA
