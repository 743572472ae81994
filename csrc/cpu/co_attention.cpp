// co_attention: two independent directions, each a row softmax over its own score matrix; the tasks
// of both are dealt in one go. Products per direction: 2 forward, 5 backward.
#include "../co_attention.h"

#include <algorithm>
#include <initializer_list>

#include "attention.h"
#include "kernels.h"
#include "schedule.h"
#include "softmax.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// One direction's sizes and the scores of one tile.
class Side {
 protected:
  Side(const CoAttention& a, int direction)
      : a_(a),
        s_(a.side[direction]),
        direction_(direction),
        planes_(a.B * a.H),
        tiles_(ceil_div(s_.N, kBlock)),
        width_(round_up(s_.D, kLanes)),
        width_v_(round_up(s_.Dv, kLanes)),
        rule_(score_rule(s_.scale, kInf, s_.bias, false)) {}

  struct Common {
    TileMask mask;
    Ahead ahead;
    float *s, *bias, *drop;
  };

  void make_common(Common& w, Arena& arena) const {
    w.s = arena.take<float>(kBlock * kBlock);
    w.bias = s_.bias.data ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.drop = a_.dropout.on ? arena.take<float>(kBlock * kBlock) : nullptr;
  }

  void prepare_tile(Common& w, const TileShape& t) const {
    fill_mask(w.mask, s_.mask, {}, t.b, t.m0, t.n0, t.cols);
    if (w.bias) load_bias(w.bias, rule_, t.b, t.h, t.m0, t.n0, t.rows, t.cols);
    if (w.drop) {
      dropout_tile(w.drop, a_.dropout, t.bh, direction_, false, t.m0, t.n0, t.rows, t.cols);
    }
    apply_rule(w.s, rule_, w.bias, t.rows, t.nv);
    blank_tail(w.s, t.rows, t.cols);
  }

  // What is read after the rows before m0 of a plane: the rows from there, or the next plane.
  // `rows` are tensors of the queries with their widths, beside q itself.
  struct Source {
    const Tensor4& t;
    int64_t width;
  };
  void look_ahead(Ahead& ahead, int64_t bh, int64_t m0, std::initializer_list<Source> rows) const {
    ahead.clear();
    if (m0 >= s_.M) {
      m0 = 0;
      if (++bh == planes_) return;
      const int64_t n = std::min<int64_t>(s_.N, 2 * kBlock);
      ahead.add(s_.k, bh / a_.H, bh % a_.H, 0, n, s_.D);
      ahead.add(s_.v, bh / a_.H, bh % a_.H, 0, n, s_.Dv);
    }
    const int64_t n = std::min<int64_t>(s_.M - m0, kBlock);
    ahead.add(s_.q, bh / a_.H, bh % a_.H, m0, n, s_.D);
    for (const Source& x : rows) ahead.add(x.t, bh / a_.H, bh % a_.H, m0, n, x.width);
  }
  // The column tile at n0, to be packed.
  void look_at_columns(Ahead& ahead, int64_t bh, int64_t n0) const {
    const int64_t n = std::min<int64_t>(s_.N - n0, kBlock);
    ahead.clear();
    ahead.add(s_.k, bh / a_.H, bh % a_.H, n0, n, s_.D);
    ahead.add(s_.v, bh / a_.H, bh % a_.H, n0, n, s_.Dv);
  }
  // Whether what is read next from memory is a block of rows, at the column tile at n0.
  bool next_is_rows(int64_t n0, bool columns_stay) const {
    return columns_stay ? n0 == 0 : n0 + kBlock >= s_.N;
  }

  const CoAttention& a_;
  const AttentionSide& s_;
  int direction_;
  int64_t planes_, tiles_, width_, width_v_;
  ScoreRule rule_;
};

template <class U>
class Forward : Side {
 public:
  Forward(const CoAttention& a, int direction) : Side(a, direction) {
    deal_ = chunk_rows(planes_, s_.M, 0);
    kt_ = bt_units<U>(kBlock, s_.D);
    q_ = is_a_operand<U>(s_.q, s_.D) ? 0 : a_units<U>(kBlock, s_.D);
    v_ = is_b_operand<U>(s_.v, s_.Dv, s_.mask) ? 0 : b_units<U>(kBlock, s_.Dv);
    stay_ = tiles_ * (kt_ + v_) * 4 <= kKeepBytes;
    super_ = super_rows(4 * tiles_ * (kt_ + v_), 4 * (units<U>(s_.D) + width_v_));
  }

  int64_t tasks() const { return planes_ * deal_.chunks; }

  // Tasks [begin, end) on this thread.
  void run(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    Work w;
    make_work(w, Arena::local());
    for (int64_t t = begin; t < end; ++t) {
      task(w, t / deal_.chunks, t % deal_.chunks, t == begin || t % deal_.chunks == 0);
    }
  }

 private:
  struct Work : Common {
    U *q, *kt, *v, *scratch;
    float *o, *reference, *sum;
    PTile<U> p;
    float top[kBlock];
  };

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena);
    const int64_t slots = stay_ ? tiles_ : 1;
    w.q = arena.take<U>(super_ / kBlock * q_);
    w.kt = arena.take<U>(slots * kt_);
    w.v = arena.take<U>(slots * v_);
    w.scratch = arena.take<U>(scratch_units<U>(std::max(s_.D, s_.Dv)));
    w.o = arena.take<float>(super_ * width_v_);
    w.reference = arena.take<float>(super_);
    w.sum = arena.take<float>(super_);
    w.p = PTile<U>::make(arena, true, false);
  }

  // `fresh`: this thread has not packed the plane's columns yet.
  void task(Work& w, int64_t bh, int64_t chunk, bool fresh) const {
    const int64_t begin = chunk * deal_.chunk_rows;
    const int64_t end = std::min(s_.M, begin + deal_.chunk_rows);
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0);
      if (q_) pack_a(w.q, rows_of(s_.q, t.b, t.h, m0), rows, s_.D);
      std::fill(w.reference, w.reference + rows, -kInf);
      std::fill(w.sum, w.sum + rows, 0.0f);
      if (s_.N == 0) std::fill(w.o, w.o + rows * width_v_, 0.0f);  // else by the first columns
      for (int64_t n0 = 0; n0 < s_.N; n0 += kBlock) {
        if (next_is_rows(n0, stay_)) {
          look_ahead(w.ahead, bh, m0 + super_, {});
        } else if (!stay_) {
          look_at_columns(w.ahead, bh, n0 + kBlock);
        }
        const int64_t slot = stay_ ? n0 / kBlock : 0;
        U *kt = w.kt + slot * kt_, *v = w.v + slot * v_;
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, s_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || (fresh && m0 == begin)) {
          pack_b_transposed(kt, w.scratch, rows_of(s_.k, t.b, t.h, n0, s_.mask), t.cols, s_.D);
          if (v_) pack_b(v, w.scratch, rows_of(s_.v, t.b, t.h, n0, s_.mask), t.cols, s_.Dv);
        }
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, kt, v);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = bh * s_.M + m0 + i;
        finish_row(static_cast<char*>(s_.o) + row * s_.Dv * size_of(s_.q.dtype), s_.lse + row,
                   w.o + i * width_v_, w.reference[i], w.sum[i], s_.q.dtype, s_.Dv, rule_.unit);
      }
    }
  }

  void tile(Work& w, const TileShape& t, int64_t r, const U* kt, const U* v) const {
    const AOperand<U> q =
        q_ ? packed_a(w.q + r * units<U>(s_.D), s_.D) : a_operand<U>(s_.q, t.b, t.h, t.m0);
    scores(q, 0, kt, t.rows, t.cols, s_.D, w.s, &w.ahead);
    prepare_tile(w, t);
    float *reference = w.reference + r, *sums = w.sum + r, *o = w.o + r * width_v_;
    w.mask.all_kept ? softmax<false>(w, t, reference, sums, o)
                    : softmax<true>(w, t, reference, sums, o);
    const BOperand<U> b = v_ ? packed_b(v, t.cols) : b_operand<U>(s_.v, t.b, t.h, t.n0);
    times_rows(w.p, t.rows, t.cols, b, vectors(s_.Dv), o, width_v_, t.n0 > 0, &w.ahead);
  }

  template <bool kMasked>
  void softmax(Work& w, const TileShape& t, float* reference, float* sums, float* o) const {
    const Vec exponent = splat(rule_.unit.exponent);
    const PTile<U> to = w.p;  // copies: after a store the compiler would load them again
    const float* drop = w.drop;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; ++i) {
      const float* s = w.s + i * kBlock;
      Vec top = splat(-kInf);
      for (int v = 0; v < nv; ++v) {
        const Vec x = load(s + v * kLanes);
        top = max_skip_nan(kMasked ? select(w.mask.columns(v), x, splat(-kInf)) : x, top);
      }
      raise(max(top), reference[i], sums[i], o + i * width_v_, width_v_, rule_.unit);
      const Vec ref = splat(finite_reference(reference[i]));
      Vec total{};
      for (int v = 0; v < nv; ++v) {
        Vec p = exp2((load(s + v * kLanes) - ref) * exponent);
        if constexpr (kMasked) p = select(w.mask.columns(v), p, Vec{});
        total += p;
        if (drop) p *= load(drop + i * kBlock + v * kLanes);
        to.put_rm(i, v, p);
      }
      sums[i] += sum(total);
    }
  }

  Chunks deal_;
  int64_t q_, kt_, v_;  // units packed a block; 0: products read the tensor itself
  int64_t super_;
  bool stay_;
};

template <class U>
class Backward : Side {
 public:
  Backward(const CoAttention& a, const CoAttentionGrad& g, int direction)
      : Side(a, direction),
        g_(g.side[direction]),
        bias_{g_.dbias, g_.dbias_stride},
        group_{a.H, bias_.planes_b(a.B), bias_.planes_h(a.H)} {
    want_ds_ = g_.dq || g_.dk || g_.dbias;
    near_ = s_.N <= kBlock;
    whole_ = s_.M > 0 && s_.M <= 4 * kBlock;
    const int64_t held = std::max<int64_t>(whole_ ? std::min<int64_t>(s_.N, kBlock) : s_.N, 1);
    sums_ = {g_.dk, g_.dv, nullptr, s_.q.dtype, s_.N, s_.D, s_.Dv, s_.scale, held};
    deal_ = chunk_rows(planes_, s_.M, sums_.size() * 4);
    if (whole_ || bias_.rows_shared()) {
      deal_ = {1, round_up(std::max<int64_t>(s_.M, 1), kBlock)};
    }
    kt_ = bt_units<U>(kBlock, s_.D);
    vt_ = want_ds_ ? bt_units<U>(kBlock, s_.Dv) : 0;
    k_ = !g_.dq || is_b_operand<U>(s_.k, s_.D, s_.mask) ? 0 : b_units<U>(kBlock, s_.D);
    q_ = is_a_operand<U>(s_.q, s_.D) ? 0 : a_units<U>(kBlock, s_.D);
    do_ = !want_ds_ || is_a_operand<U>(g_.d_o, s_.Dv) ? 0 : a_units<U>(kBlock, s_.Dv);
    qb_ = !g_.dk || is_b_operand<U>(s_.q, s_.D) ? 0 : b_units<U>(kBlock, s_.D);
    dob_ = !g_.dv || is_b_operand<U>(g_.d_o, s_.Dv) ? 0 : b_units<U>(kBlock, s_.Dv);
    stay_ = !whole_ && tiles_ * (kt_ + vt_ + k_) * 4 <= kKeepBytes;
    const int64_t packed = 2 * units<U>(s_.D) + 2 * units<U>(s_.Dv);
    super_ =
        whole_ ? deal_.chunk_rows
               : super_rows(4 * (tiles_ * (kt_ + vt_ + k_) + sums_.size()), 4 * (packed + width_));
  }

  int64_t tasks() const { return planes_ / group_.size() * deal_.chunks; }
  int64_t merges() const { return deal_.chunks > 1 ? planes_ * tiles_ : 0; }
  int64_t partial_size() const {
    return deal_.chunks > 1 ? planes_ * deal_.chunks * sums_.size() : 0;
  }

  void run(int64_t begin, int64_t end, float* partial) const {
    if (begin >= end) return;
    Arena& arena = Arena::local();
    Work w;
    make_work(w, arena);
    float* own = partial_size() ? nullptr : arena.take<float>(sums_.size());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t group = t / deal_.chunks, chunk = t % deal_.chunks;
      for (int64_t k = 0; k < group_.size(); ++k) {
        const int64_t bh = group_.plane(group, k);
        float* acc = own ? own : partial + (bh * deal_.chunks + chunk) * sums_.size();
        task(w, bh, chunk, acc);
        if (own && !whole_) sums_.write(acc, bh, 0, s_.N);
      }
    }
  }

  // Adds the chunks of one column block of one plane in order, and writes it.
  void merge(int64_t index, float* partial) const {
    const int64_t bh = index / tiles_;
    float* first = partial + bh * deal_.chunks * sums_.size();
    sums_.merge(first, deal_.chunks, bh, index % tiles_ * kBlock);
  }

 private:
  struct Work : Common {
    U *q, *d_o, *q_b, *do_b, *column, *scratch, *pairs;
    float *dq, *dp, *lse, *low, *delta;  // lse in scores, high and low
    PTile<U> p, ds;
  };

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena);
    const int64_t blocks = super_ / kBlock, widest = std::max(s_.D, s_.Dv);
    w.q = arena.take<U>(blocks * q_);
    w.d_o = arena.take<U>(blocks * do_);
    w.q_b = arena.take<U>(blocks * qb_);
    w.do_b = arena.take<U>(blocks * dob_);
    w.column = arena.take<U>((stay_ ? tiles_ : 1) * (kt_ + vt_ + k_));
    w.scratch = arena.take<U>(scratch_units<U>(widest));
    w.pairs = arena.take<U>(row_deltas_units<U>(s_.Dv));
    w.dq = arena.take<float>(super_ * width_);
    w.dp = arena.take<float>(kBlock * kBlock);
    w.lse = arena.take<float>(super_);
    w.low = arena.take<float>(super_);
    w.delta = arena.take<float>(super_);
    w.p = PTile<U>::make(arena, false, true);
    w.ds = PTile<U>::make(arena, true, true);
  }

  void pack_rows(Work& w, const TileShape& t, int64_t m0, int64_t rows) const {
    const RowSource q = rows_of(s_.q, t.b, t.h, m0), d_o = rows_of(g_.d_o, t.b, t.h, m0);
    const RowSource o = rows_of(g_.o, t.b, t.h, m0);
    if (q_) pack_a(w.q, q, rows, s_.D);
    if (do_) pack_a(w.d_o, d_o, rows, s_.Dv);
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, rows - r), block = r / kBlock;
      if (qb_) {
        const RowSource from = rows_of(s_.q, t.b, t.h, m0 + r);
        pack_b(w.q_b + block * qb_, w.scratch, from, n, s_.D);
      }
      if (dob_) {
        const RowSource from = rows_of(g_.d_o, t.b, t.h, m0 + r);
        pack_b(w.do_b + block * dob_, w.scratch, from, n, s_.Dv);
      }
    }
    const int64_t row = t.bh * s_.M + m0;
    for (int64_t i = 0; i < rows; ++i) {
      const Lse2 lse = split_lse(g_.lse[row + i], rule_.unit);
      w.lse[i] = lse.high, w.low[i] = lse.low;
      w.delta[i] = -g_.dlse[row + i];
    }
    if (!near_) row_deltas(w.delta, d_o, o, g_.dlse + row, rows, s_.Dv, w.pairs, w.scratch);
    if (s_.N == 0) std::fill(w.dq, w.dq + rows * width_, 0.0f);  // else by the first columns
  }

  void task(Work& w, int64_t bh, int64_t chunk, float* acc) const {
    const int64_t begin = chunk * deal_.chunk_rows;
    const int64_t end = std::min(s_.M, begin + deal_.chunk_rows);
    sums_.clear(acc, begin >= end);
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0);
      pack_rows(w, t, m0, rows);
      for (int64_t n0 = 0; n0 < s_.N; n0 += kBlock) {
        if (next_is_rows(n0, stay_)) {
          look_ahead(w.ahead, bh, m0 + super_, {{g_.d_o, s_.Dv}, {g_.o, near_ ? 0 : s_.Dv}});
        } else if (!stay_) {
          look_at_columns(w.ahead, bh, n0 + kBlock);
        }
        U* column = w.column + (stay_ ? n0 / kBlock : 0) * (kt_ + vt_ + k_);
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, s_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || m0 == begin) {
          const RowSource k = rows_of(s_.k, t.b, t.h, n0, s_.mask);
          const RowSource v = rows_of(s_.v, t.b, t.h, n0, s_.mask);
          pack_b_transposed(column, w.scratch, k, t.cols, s_.D);
          if (vt_) pack_b_transposed(column + kt_, w.scratch, v, t.cols, s_.Dv);
          if (k_) pack_b(column + kt_ + vt_, w.scratch, k, t.cols, s_.D);
        }
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, column, acc, t.m0 == begin);
        }
        if (whole_) sums_.write(acc, bh, n0, n0 + t.cols);
      }
      write_rows(g_.dq, s_.q.dtype, w.dq, bh * s_.M + m0, rows, s_.D, width_, s_.scale);
    }
  }

  // `first`: of the rows that meet these columns, whose sums it starts.
  void tile(Work& w, const TileShape& t, int64_t r, const U* column, float* acc, bool first) const {
    const AOperand<U> q =
        q_ ? packed_a(w.q + r * units<U>(s_.D), s_.D) : a_operand<U>(s_.q, t.b, t.h, t.m0);
    scores(q, 0, column, t.rows, t.cols, s_.D, w.s, &w.ahead);
    if (want_ds_) {
      const AOperand<U> d_o =
          do_ ? packed_a(w.d_o + r * units<U>(s_.Dv), s_.Dv) : a_operand<U>(g_.d_o, t.b, t.h, t.m0);
      scores(d_o, 0, column + kt_, t.rows, t.cols, s_.Dv, w.dp, &w.ahead);
    }
    prepare_tile(w, t);
    if (near_ && want_ds_) {
      add_deltas(rule_.unit, w.mask, t, {w.s, w.dp, w.drop, w.lse + r, w.low + r, w.delta + r});
    }
    w.mask.all_kept ? gradients<false>(w, t, r) : gradients<true>(w, t, r);
    const int64_t block = r / kBlock;
    if (g_.dv) {
      const BOperand<U> b =
          dob_ ? packed_b(w.do_b + block * dob_, t.rows) : b_operand<U>(g_.d_o, t.b, t.h, t.m0);
      times_columns(w.p, t.rows, t.cols, b, vectors(s_.Dv), sums_.at_v(acc, t.n0), width_v_, !first,
                    &w.ahead);
    }
    if (g_.dq) {
      const BOperand<U> b =
          k_ ? packed_b(column + kt_ + vt_, t.cols) : b_operand<U>(s_.k, t.b, t.h, t.n0);
      times_rows(w.ds, t.rows, t.cols, b, vectors(s_.D), w.dq + r * width_, width_, t.n0 > 0,
                 &w.ahead);
    }
    if (g_.dk) {
      const BOperand<U> b =
          qb_ ? packed_b(w.q_b + block * qb_, t.rows) : b_operand<U>(s_.q, t.b, t.h, t.m0);
      times_columns(w.ds, t.rows, t.cols, b, vectors(s_.D), sums_.at_k(acc, t.n0), width_, !first,
                    &w.ahead);
    }
  }

  template <bool kMasked>
  void gradients(Work& w, const TileShape& t, int64_t r) const {
    const Vec exponent = splat(rule_.unit.exponent);
    // Copies: after a store the compiler would load them again.
    const PTile<U> to_p = w.p, to_ds = w.ds;
    const float *s = w.s, *dps = w.dp, *drop = w.drop;
    const bool want_ds = want_ds_, want_bias = g_.dbias;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; i += 2) {
      const int count = std::min(2, rows - i);
      Vec lse[2], low[2], delta[2], shared[2] = {};
      for (int k = 0; k < 2; ++k) {
        lse[k] = splat(w.lse[r + i + k]), low[k] = splat(w.low[r + i + k]);
        delta[k] = splat(w.delta[r + i + k]);
      }
      for (int v = 0; v < nv; ++v) {
        Vec p[2], ds[2] = {};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int at = (i + k) * kBlock + v * kLanes;
          p[k] = exp2((load(s + at) - lse[k] - low[k]) * exponent);
          if constexpr (kMasked) p[k] = select(w.mask.columns(v), p[k], Vec{});
          if (want_ds) {
            Vec dp = load(dps + at);
            if (drop) dp *= load(drop + at);
            ds[k] = p[k] * (dp - delta[k]);
            if (want_bias && k < count) bias_.add(t, i + k, v, ds[k], shared[k]);
          }
          if (drop) p[k] *= load(drop + at);
        }
        if (count < 2) p[1] = ds[1] = Vec{};
        if (want_ds) to_ds.template put<true, true>(i, v, ds[0], ds[1]);
        to_p.template put<false, true>(i, v, p[0], p[1]);
      }
    }
  }

  const AttentionSideGrad& g_;
  BiasGrad bias_;
  Group group_;
  ColumnGrads sums_;
  Chunks deal_;
  int64_t q_, do_, qb_, dob_, kt_, vt_, k_;  // units packed a block; 0: not needed, or not packed
  int64_t super_;
  bool near_;   // all keys are in one tile, from which the deltas come
  bool whole_;  // all rows meet a column tile at once, so that its sums are done with
  bool stay_, want_ds_;
};

// run(side, begin, end) over the tasks of both directions: every thread gets an equal share of
// each, for tasks of one direction may be larger than those of the other.
template <class F>
void both(ParallelFor parallel, int64_t tasks_x, int64_t tasks_y, const F& run) {
  const int64_t n = std::max(tasks_x, tasks_y);
  parallel(n, [&](int64_t begin, int64_t end) {
    run(0, begin * tasks_x / n, end * tasks_x / n);
    run(1, begin * tasks_y / n, end * tasks_y / n);
  });
}

template <class U>
void forward(const CoAttention& a, ParallelFor parallel) {
  const Forward<U> x(a, 0), y(a, 1);
  both(parallel, x.tasks(), y.tasks(),
       [&](int side, int64_t begin, int64_t end) { (side ? y : x).run(begin, end); });
}

template <class U>
void backward(const CoAttention& a, const CoAttentionGrad& g, ParallelFor parallel) {
  const Backward<U> x(a, g, 0), y(a, g, 1);
  SharedArena shared;
  float* partial_x = (*shared).take<float>(x.partial_size() + y.partial_size());
  float* partial_y = partial_x + x.partial_size();
  both(parallel, x.tasks(), y.tasks(), [&](int side, int64_t begin, int64_t end) {
    (side ? y : x).run(begin, end, side ? partial_y : partial_x);
  });
  both(parallel, x.merges(), y.merges(), [&](int side, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (side ? y : x).merge(i, side ? partial_y : partial_x);
  });
}

}  // namespace

void co_attention_fwd(const CoAttention& a, ParallelFor parallel) {
#if defined(__AVX512BF16__)
  if (a.side[0].q.dtype == DType::kBFloat16) return forward<Bf2>(a, parallel);
#endif
  forward<float>(a, parallel);
}

void co_attention_bwd(const CoAttention& a, const CoAttentionGrad& g, ParallelFor parallel) {
#if defined(__AVX512BF16__)
  if (a.side[0].q.dtype == DType::kBFloat16) return backward<Bf2>(a, g, parallel);
#endif
  backward<float>(a, g, parallel);
}

}  // namespace fmm::cpu::FMM_ISA
