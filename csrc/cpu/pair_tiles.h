// The loop that both pair losses share: strips of x against strips of y in stages. In stage t strip
// p of x meets strip (p + t) mod S of y, so every strip has one owner at a time: no locks, no
// partial sums, the same order of additions with any number of threads.
#pragma once

#include <algorithm>

#include "../pair_loss.h"
#include "columns.h"

namespace fmm::cpu::FMM_ISA {

constexpr int64_t kStrips = 16;

struct Match {
  int16_t i, j;
  bool positive;  // else outside the denominator
  float dot;      // raw product
};

// One tile of raw products s and what the loss functor needs to know about it.
struct PairTile {
  int64_t g, m0, n0;
  int rows, cols, nv;
  float* s;
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
                              t.s[i * kBlock + j]};
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
      : PairShape(a), op_(op), dx_(dx), dy_(dy), parallel_(parallel) {
    width_ = round_up(a.D, kLanes);
    bt_ = bt_units<U>(kBlock, a.D);
    b_ = b_units<U>(kBlock, a.D);
    const int64_t fit = (int64_t{1} << 20) / (4 * width_ * kBlock);
    super_ = kBlock * std::clamp<int64_t>(fit, 1, 4);
  }

  void run() {
    Arena& arena = Arena::shared();
    inv_x_ = inv_y_ = nullptr;
    if (a_.normalize) {
      inv_x_ = arena.take<float>(a_.G * a_.M);
      inv_y_ = arena.take<float>(a_.G * a_.N);
      inverse_norms(inv_x_, a_.x, a_.M, parallel_);
      inverse_norms(inv_y_, a_.y, a_.N, parallel_);
    }
    acc_x_ = accumulator(arena, dx_, a_.G * a_.M);
    acc_y_ = accumulator(arena, dy_, a_.G * a_.N);
    for (int64_t stage = 0; stage < strips_; ++stage) {
      parallel_(a_.G * strips_, [&](int64_t begin, int64_t end) {
        Work w;
        make_work(w, Arena::local());
        for (int64_t t = begin; t < end; ++t) {
          const int64_t p = t % strips_;
          block(w, t / strips_, p, (p + stage) % strips_);
        }
      });
    }
    finish(dx_, acc_x_, a_.x, inv_x_, a_.M);
    finish(dy_, acc_y_, a_.y, inv_y_, a_.N);
  }

 private:
  struct Work {
    U *x, *x_b, *yt, *y_b, *scratch;
    PTile<U> ds;
    PairTile tile;
    typename Op::Scratch op;
  };

  void make_work(Work& w, Arena& arena) const {
    w.x = arena.take<U>(a_units<U>(super_, a_.D));
    w.x_b = dy_ ? arena.take<U>(super_ / kBlock * b_) : nullptr;
    w.yt = arena.take<U>(bt_);
    w.y_b = dx_ ? arena.take<U>(b_) : nullptr;
    w.scratch = arena.take<U>(scratch_units<U>(a_.D));
    w.ds = PTile<U>::make(arena, Op::kBackward, Op::kBackward);
    w.tile.s = arena.take<float>(kBlock * kBlock);
    w.tile.match = arena.take<Match>(kBlock * kBlock);
    w.op.make(arena);
  }

  // fp32 sums of a gradient: in its own memory where layout allows, zeroed.
  float* accumulator(Arena& arena, void* out, int64_t rows) const {
    if (!out) return nullptr;
    const bool own = a_.x.dtype == DType::kFloat && a_.D % kLanes == 0;
    float* acc = own ? static_cast<float*>(out) : arena.take<float>(rows * width_);
    parallel_(rows, [&](int64_t begin, int64_t end) {
      std::fill(acc + begin * width_, acc + end * width_, 0.0f);
    });
    return acc;
  }

  RowSource source(const Tensor4& t, const float* inv, int64_t g, int64_t row, int64_t rows) const {
    RowSource r = rows_of(t, g, 0, row);
    r.factor = inv ? inv + g * rows + row : nullptr;
    return r;
  }

  void block(Work& w, int64_t g, int64_t p, int64_t q) const {
    const Range xs = strip(p, tiles_x_, a_.M), ys = strip(q, tiles_y_, a_.N);
    PairTile& t = w.tile;
    t.g = g;
    for (int64_t m0 = xs.begin; m0 < xs.end; m0 += super_) {
      const int64_t rows = std::min(super_, xs.end - m0);
      pack_a(w.x, source(a_.x, inv_x_, g, m0, a_.M), rows, a_.D);
      for (int64_t r = 0; w.x_b && r < rows; r += kBlock) {
        pack_b(w.x_b + r / kBlock * b_, w.scratch, source(a_.x, inv_x_, g, m0 + r, a_.M),
               std::min<int64_t>(kBlock, rows - r), a_.D);
      }
      for (t.n0 = ys.begin; t.n0 < ys.end; t.n0 += kBlock) {
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, ys.end - t.n0));
        t.nv = vectors(t.cols);
        const RowSource y = source(a_.y, inv_y_, g, t.n0, a_.N);
        pack_b_transposed(w.yt, w.scratch, y, t.cols, a_.D);
        if (w.y_b) pack_b(w.y_b, w.scratch, y, t.cols, a_.D);
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          one_tile(w, r);
        }
      }
    }
  }

  void one_tile(Work& w, int64_t r) const {
    PairTile& t = w.tile;
    scores(w.x + r * units<U>(a_.D), w.yt, t.rows, t.cols, a_.D, t.s);
    fill_mask(t.mask, {}, {}, 0, t.m0, t.n0, t.cols);
    for (int i = 0; i < t.rows; ++i) t.scale[i] = a_.row_scale(t.g, t.m0 + i);
    find_matches(t);
    op_.tile(t, w.op, w.ds);
    if constexpr (Op::kBackward) {
      if (dx_) {
        times_rows(w.ds, t.rows, t.cols, w.y_b, t.cols, vectors(a_.D),
                   acc_x_ + (t.g * a_.M + t.m0) * width_, width_);
      }
      if (dy_) {
        times_columns(w.ds, t.rows, t.cols, w.x_b + r / kBlock * b_, t.rows, vectors(a_.D),
                      acc_y_ + (t.g * a_.N + t.n0) * width_, width_);
      }
    }
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

  Op& op_;
  void *dx_, *dy_;
  ParallelFor parallel_;
  float *inv_x_, *inv_y_, *acc_x_, *acc_y_;
  int64_t width_, bt_, b_, super_;
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
