// bi_attention backward: 7 products.
#include "bi_attention_tiles.h"

namespace fmm::cpu::FMM_ISA {
namespace {

BiAttentionGrad exchanged(BiAttentionGrad g) {
  std::swap(g.do_x, g.do_y);
  std::swap(g.o_x, g.o_y);
  std::swap(g.lse_x, g.lse_y);
  std::swap(g.dlse_x, g.dlse_y);
  std::swap(g.dqk_x, g.dqk_y);
  std::swap(g.dv_x, g.dv_y);
  std::swap(g.dbias_stride[2], g.dbias_stride[3]);
  return g;
}

template <class U>
class Backward : Tiles {
 public:
  Backward(const BiAttention& a, const BiAttentionGrad& g, bool swapped, ParallelFor parallel)
      : Tiles(a, swapped, parallel),
        g_(g),
        bias_{g.dbias, g.dbias_stride},
        group_{a.H, bias_.planes_b(a.B), std::max(heads_, bias_.planes_h(a.H))},
        sums_{g.dqk_y,      g.dv_y,  nullptr,
              a.qk_x.dtype, a.N,     a.D,
              a.Dv_y,       a.scale, std::max<int64_t>(a.N, 1)} {
    width_ = round_up(a.D, kLanes);
    width_x_ = round_up(a.Dv_x, kLanes);
    width_y_ = round_up(a.Dv_y, kLanes);
    want_ds_ = g.dqk_x || g.dqk_y || g.dbias;
    from_tiles_x_ = summed_ || a.N <= kBlock;
    from_tiles_y_ = a.M <= kBlock;
    if (bias_.of_columns() && group_.size() == heads_) std::swap(sums_.db, bias_.data);
    deal_ = chunk_rows(planes_, a.M, sums_.size() * 4);
    if (bias_.rows_shared()) deal_ = {1, round_up(std::max<int64_t>(a.M, 1), kBlock)};
    columns_.init(a, g, want_ds_);
    q_ = is_a_operand<U>(a.qk_x, a.D) ? 0 : a_units<U>(kBlock, a.D);
    do_ = !want_ds_ || is_a_operand<U>(g.do_x, a.Dv_y) ? 0 : a_units<U>(kBlock, a.Dv_y);
    v_ = !want_ds_ || is_a_operand<U>(a.v_x, a.Dv_x, a.mask_x) ? 0 : a_units<U>(kBlock, a.Dv_x);
    qb_ = !g.dqk_y || is_b_operand<U>(a.qk_x, a.D) ? 0 : b_units<U>(kBlock, a.D);
    dob_ = !g.dv_y || is_b_operand<U>(g.do_x, a.Dv_y) ? 0 : b_units<U>(kBlock, a.Dv_y);
    stay_ = tiles_ * columns_.size() * 4 <= kKeepBytes;
    const int64_t packed = 2 * units<U>(a.D) + units<U>(a.Dv_x) + 2 * units<U>(a.Dv_y);
    super_ = summed_ ? kBlock
                     : super_rows(4 * (tiles_ * columns_.size() + sums_.size()),
                                  4 * (packed + width_ + width_x_));
  }

  void run() {
    const bool split = deal_.chunks > 1;
    SharedArena shared;
    float* partial = split ? (*shared).take<float>(planes_ * deal_.chunks * sums_.size()) : nullptr;
    const int64_t groups = planes_ / group_.size();
    parallel_(groups * deal_.chunks, [&](int64_t begin, int64_t end) {
      Arena& arena = Arena::local();
      Work w;
      make_work(w, arena);
      float* own = split ? nullptr : arena.take<float>(sums_.size());
      for (int64_t t = begin; t < end; ++t) {
        const int64_t group = t / deal_.chunks, chunk = t % deal_.chunks;
        for (int64_t k = 0; k < group_.size(); ++k) {
          const int64_t bh = group_.plane(group, k);
          float* acc = split ? partial + (bh * deal_.chunks + chunk) * sums_.size() : own;
          task(w, bh, chunk, acc);
          if (!split) sums_.write(acc, bh, 0, a_.N);
        }
      }
    });
    if (!split) return;
    parallel_(planes_ * tiles_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t bh = t / tiles_;
        float* first = partial + bh * deal_.chunks * sums_.size();
        sums_.merge(first, deal_.chunks, bh, t % tiles_ * kBlock);
      }
    });
  }

 private:
  // A packed column tile: bt for products over the width, b for products over the columns.
  struct ColumnTile {
    int64_t kt = 0, vt = 0, dot = 0, k = 0, d_o = 0;  // units
    void init(const BiAttention& a, const BiAttentionGrad& g, bool want_ds) {
      kt = bt_units<U>(kBlock, a.D);
      vt = want_ds ? bt_units<U>(kBlock, a.Dv_y) : 0;
      dot = want_ds ? bt_units<U>(kBlock, a.Dv_x) : 0;
      const bool here_k = is_b_operand<U>(a.qk_y, a.D);
      const bool here_d_o = is_b_operand<U>(g.do_y, a.Dv_x);
      k = g.dqk_x && !here_k ? b_units<U>(kBlock, a.D) : 0;
      d_o = g.dv_x && !here_d_o ? b_units<U>(kBlock, a.Dv_x) : 0;
    }
    int64_t size() const { return kt + vt + dot + k + d_o; }
  };

  struct Work : Common {
    U *q, *d_o, *v, *q_b, *do_b, *column, *scratch, *pairs;  // of x: A operands, then B operands
    float *dq, *dv;                                          // of the rows at hand
    float *chunk_dq, *chunk_dv;  // sums over heads are kept for the whole chunk
    float *all_s, *all_dpr;      // tiles of the rows at hand, with sum_heads
    float *dpr, *dpc, *delta_x, *delta_y;
    float *lse_x, *low_x, *lse_y, *low_y;  // in scores, high and low
    PTile<U> p_row, p_column, ds;
    alignas(64) float column_lse[kBlock], column_low[kBlock], column_delta[kBlock];
    alignas(64) float column_ds[kBlock];
  };

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena, true);
    const int64_t blocks = super_ / kBlock;
    const int64_t widest = std::max(a_.D, std::max(a_.Dv_x, a_.Dv_y));
    w.q = arena.take<U>(blocks * q_);
    w.d_o = arena.take<U>(blocks * do_);
    w.v = arena.take<U>(blocks * v_);
    w.q_b = arena.take<U>(blocks * qb_);
    w.do_b = arena.take<U>(blocks * dob_);
    w.column = arena.take<U>((stay_ ? tiles_ : 1) * columns_.size());
    w.scratch = arena.take<U>(scratch_units<U>(widest));
    w.pairs = arena.take<U>(row_deltas_units<U>(std::max(a_.Dv_x, a_.Dv_y)));
    const int64_t rows = summed_ ? deal_.chunk_rows : super_;
    w.chunk_dq = arena.take<float>(rows * width_);
    w.chunk_dv = one_dx() ? w.chunk_dq : arena.take<float>(rows * width_x_);
    w.all_s = summed_ ? arena.take<float>(tiles_ * kBlock * kBlock) : w.s;
    w.all_dpr = arena.take<float>((summed_ ? tiles_ : 1) * kBlock * kBlock);
    w.dpr = w.all_dpr;
    w.dpc = arena.take<float>(kBlock * kBlock);
    w.lse_x = arena.take<float>(super_);
    w.low_x = arena.take<float>(super_);
    w.delta_x = arena.take<float>(super_);
    w.lse_y = arena.take<float>(a_.N);
    w.low_y = arena.take<float>(a_.N);
    w.delta_y = arena.take<float>(a_.N);
    w.p_row = PTile<U>::make(arena, false, true);
    w.p_column = PTile<U>::make(arena, true, false);
    w.ds = PTile<U>::make(arena, true, true);
  }

  void pack_columns(Work& w, const TileShape& t, U* column) const {
    const RowSource k = rows_of(a_.qk_y, t.b, t.h, t.n0);
    const RowSource v = rows_of(a_.v_y, t.b, t.h, t.n0, a_.mask_y);
    const RowSource d_o = rows_of(g_.do_y, t.b, t.h, t.n0);
    pack_b_transposed(column, w.scratch, k, t.cols, a_.D);
    column += columns_.kt;
    if (columns_.vt) pack_b_transposed(column, w.scratch, v, t.cols, a_.Dv_y);
    column += columns_.vt;
    if (columns_.dot) pack_b_transposed(column, w.scratch, d_o, t.cols, a_.Dv_x);
    column += columns_.dot;
    if (columns_.k) pack_b(column, w.scratch, k, t.cols, a_.D);
    column += columns_.k;
    if (columns_.d_o) pack_b(column, w.scratch, d_o, t.cols, a_.Dv_x);
  }

  void pack_rows(Work& w, const TileShape& t, int64_t m0, int64_t rows) const {
    const RowSource q = rows_of(a_.qk_x, t.b, t.h, m0);
    const RowSource d_o = rows_of(g_.do_x, t.b, t.h, m0);
    if (q_) pack_a(w.q, q, rows, a_.D);
    if (do_) pack_a(w.d_o, d_o, rows, a_.Dv_y);
    if (v_) pack_a(w.v, rows_of(a_.v_x, t.b, t.h, m0, a_.mask_x), rows, a_.Dv_x);
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, rows - r), block = r / kBlock;
      if (qb_) {
        const RowSource from = rows_of(a_.qk_x, t.b, t.h, m0 + r);
        pack_b(w.q_b + block * qb_, w.scratch, from, n, a_.D);
      }
      if (dob_) {
        const RowSource from = rows_of(g_.do_x, t.b, t.h, m0 + r);
        pack_b(w.do_b + block * dob_, w.scratch, from, n, a_.Dv_y);
      }
    }
    const RowSource o = rows_of(g_.o_x, t.b, t.h, m0);
    const int64_t row = t.bh * a_.M + m0;
    for (int64_t i = 0; i < rows; ++i) {
      const Lse2 lse = split_lse(g_.lse_x[row + i], rule_.unit);
      w.lse_x[i] = lse.high, w.low_x[i] = lse.low;
      w.delta_x[i] = -g_.dlse_x[row + i];
    }
    if (!from_tiles_x_) {
      row_deltas(w.delta_x, d_o, o, g_.dlse_x + row, rows, a_.Dv_y, w.pairs, w.scratch);
    }
    if (a_.N > 0 || !first_head(t)) return;
    std::fill(w.dq, w.dq + rows * width_, 0.0f);
    std::fill(w.dv, w.dv + rows * width_x_, 0.0f);
  }

  // x is queries, keys and values in one tensor, whose gradient is one sum.
  bool one_dx() const { return summed_ && g_.dqk_x && g_.dqk_x == g_.dv_x; }

  void task(Work& w, int64_t bh, int64_t chunk, float* acc) const {
    const int64_t begin = chunk * deal_.chunk_rows;
    const int64_t end = std::min(a_.M, begin + deal_.chunk_rows);
    sums_.clear(acc, begin >= end);
    const DType dtype = a_.qk_x.dtype;
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    const RowSource d_o = rows_of(g_.do_y, t.b, t.h, 0), o = rows_of(g_.o_y, t.b, t.h, 0);
    for (int64_t n = 0; n < a_.N; ++n) {
      const Lse2 lse = split_lse(g_.lse_y[bh * a_.N + n], rule_.unit);
      w.lse_y[n] = lse.high, w.low_y[n] = lse.low;
      w.delta_y[n] = -g_.dlse_y[bh * a_.N + n];
    }
    if (!from_tiles_y_) {
      row_deltas(w.delta_y, d_o, o, g_.dlse_y + bh * a_.N, a_.N, a_.Dv_x, w.pairs, w.scratch);
    }
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0), at = summed_ ? m0 - begin : 0;
      w.dq = w.chunk_dq + at * width_, w.dv = w.chunk_dv + at * width_x_;
      pack_rows(w, t, m0, rows);
      look_ahead(w.ahead, bh, m0 + super_,
                 {{a_.qk_x, a_.D},
                  {a_.v_x, a_.Dv_x},
                  {g_.do_x, a_.Dv_y},
                  {g_.o_x, from_tiles_x_ ? 0 : a_.Dv_y}},
                 {{a_.qk_y, a_.D},
                  {a_.v_y, a_.Dv_y},
                  {g_.do_y, a_.Dv_x},
                  {g_.o_y, from_tiles_y_ ? 0 : a_.Dv_x}});
      auto columns = [&](int64_t n0, bool pack) {
        U* column = w.column + (stay_ ? n0 / kBlock : 0) * columns_.size();
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, a_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || pack) pack_columns(w, t, column);
        return column;
      };
      if (summed_) {
        t.m0 = m0, t.rows = static_cast<int>(rows);
        for (int64_t n0 = 0; n0 < a_.N; n0 += kBlock) {
          const U* column = columns(n0, m0 == begin);
          products(w, t, 0, column);
          if (want_ds_) add_deltas(rule_.unit, w.mask, t, delta_rows(w, 0));
        }
      }
      for (int64_t n0 = 0; n0 < a_.N; n0 += kBlock) {
        const U* column = columns(n0, !summed_ && m0 == begin);
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, column, acc, t.m0 == begin);
        }
      }
      if (!last_head(t)) continue;
      const int64_t row = row_of_x(t, m0);
      write_rows(g_.dqk_x, dtype, w.dq, row, rows, a_.D, width_, a_.scale);
      if (!one_dx()) write_rows(g_.dv_x, dtype, w.dv, row, rows, a_.Dv_x, width_x_, 1.0f);
    }
  }

  // Scores and products with the values of a tile.
  void products(Work& w, const TileShape& t, int64_t r, const U* column) const {
    if (summed_) {
      const int64_t at = t.n0 / kBlock * kBlock * kBlock;
      w.s = w.all_s + at, w.dpr = w.all_dpr + at;
    }
    const AOperand<U> q =
        q_ ? packed_a(w.q + r * units<U>(a_.D), a_.D) : a_operand<U>(a_.qk_x, t.b, t.h, t.m0);
    scores(q, 0, column, t.rows, t.cols, a_.D, w.s, &w.ahead);
    if (want_ds_) {
      const AOperand<U> d_o = do_ ? packed_a(w.d_o + r * units<U>(a_.Dv_y), a_.Dv_y)
                                  : a_operand<U>(g_.do_x, t.b, t.h, t.m0);
      scores(d_o, 0, column + columns_.kt, t.rows, t.cols, a_.Dv_y, w.dpr, &w.ahead);
    }
    load_tile(w, t);
    apply(w, t);
  }

  DeltaRows delta_rows(const Work& w, int64_t r) const {
    return {w.s, w.dpr, w.drop_row, w.lse_x + r, w.low_x + r, w.delta_x + r};
  }

  // delta_y of a tile with all rows: p * dp over them.
  void add_column_deltas(Work& w, const TileShape& t) const {
    const Vec exponent = splat(rule_.unit.exponent);
    for (int i = 0; i < t.rows; ++i) {
      if (!w.mask.row_kept(i)) continue;
      for (int v = 0; v < t.nv; ++v) {
        const int at = v * kLanes, here = i * kBlock + at;
        const Vec less = load(w.s + here) - load(w.column_lse + at) - load(w.column_low + at);
        Vec p = exp2(less * exponent);
        if (w.drop_column) p *= load(w.drop_column + here);
        store(w.column_delta + at, load(w.column_delta + at) + p * load(w.dpc + here));
      }
    }
  }

  // `first`: of the rows that meet these columns, whose sums it starts.
  void tile(Work& w, const TileShape& t, int64_t r, const U* column, float* acc, bool first) const {
    const U *dot = column + columns_.kt + columns_.vt, *k = dot + columns_.dot,
            *d_o = k + columns_.k;
    if (!summed_) {
      products(w, t, r, column);
    } else {
      const int64_t at = t.n0 / kBlock * kBlock * kBlock;
      w.s = w.all_s + at, w.dpr = w.all_dpr + at;
      load_tile(w, t);
    }
    if (want_ds_) {
      const AOperand<U> v = v_ ? packed_a(w.v + r * units<U>(a_.Dv_x), a_.Dv_x)
                               : a_operand<U>(a_.v_x, t.b, t.h, t.m0);
      scores(v, 0, dot, t.rows, t.cols, a_.Dv_x, w.dpc, &w.ahead);
    }
    std::copy(w.lse_y + t.n0, w.lse_y + t.n0 + t.cols, w.column_lse);
    std::fill(w.column_lse + t.cols, w.column_lse + kBlock, kInf);
    std::copy(w.low_y + t.n0, w.low_y + t.n0 + t.cols, w.column_low);
    std::fill(w.column_low + t.cols, w.column_low + kBlock, 0.0f);
    std::copy(w.delta_y + t.n0, w.delta_y + t.n0 + t.cols, w.column_delta);
    std::fill(w.column_delta + t.cols, w.column_delta + kBlock, 0.0f);
    if (want_ds_ && from_tiles_x_ && !summed_) {
      add_deltas(rule_.unit, w.mask, t, delta_rows(w, r));
    }
    if (want_ds_ && from_tiles_y_) add_column_deltas(w, t);
    if (!w.mask.all_kept || w.mask.row) {
      gradients<true, false>(w, t, r);
    } else {
      w.transfer.prepare(rule_.unit, w.lse_x + r, w.column_lse, t.rows, t.cols, w.low_x + r,
                         w.column_low);
      w.transfer.ok ? gradients<false, true>(w, t, r) : gradients<false, false>(w, t, r);
    }
    const int64_t block = r / kBlock;
    const bool add = t.n0 > 0 || !first_head(t);
    float *dv_y = sums_.at_v(acc, t.n0), *dk_y = sums_.at_k(acc, t.n0);
    if (sums_.db) {
      float* db = sums_.at_b(acc, t.n0);
      for (int j = 0; j < t.cols; ++j) db[j] += w.column_ds[j];
    }
    if (g_.dv_y) {
      const BOperand<U> b =
          dob_ ? packed_b(w.do_b + block * dob_, t.rows) : b_operand<U>(g_.do_x, t.b, t.h, t.m0);
      times_columns(w.p_row, t.rows, t.cols, b, vectors(a_.Dv_y), dv_y, width_y_, !first, &w.ahead);
    }
    if (g_.dv_x) {
      const BOperand<U> b =
          columns_.d_o ? packed_b(d_o, t.cols) : b_operand<U>(g_.do_y, t.b, t.h, t.n0);
      times_rows(w.p_column, t.rows, t.cols, b, vectors(a_.Dv_x), w.dv + r * width_x_, width_x_,
                 add, &w.ahead);
    }
    if (g_.dqk_x) {
      const BOperand<U> b =
          columns_.k ? packed_b(k, t.cols) : b_operand<U>(a_.qk_y, t.b, t.h, t.n0);
      times_rows(w.ds, t.rows, t.cols, b, vectors(a_.D), w.dq + r * width_, width_, add || one_dx(),
                 &w.ahead);
    }
    if (g_.dqk_y) {
      const BOperand<U> b =
          qb_ ? packed_b(w.q_b + block * qb_, t.rows) : b_operand<U>(a_.qk_x, t.b, t.h, t.m0);
      times_columns(w.ds, t.rows, t.cols, b, vectors(a_.D), dk_y, width_, !first, &w.ahead);
    }
  }

  template <bool kMasked, bool kOneExp>
  void gradients(Work& w, const TileShape& t, int64_t r) const {
    const Vec exponent = splat(rule_.unit.exponent);
    std::fill(w.column_ds, w.column_ds + kBlock, 0.0f);
    // Copies: after a store the compiler would load them again.
    const PTile<U> p_row = w.p_row, p_column = w.p_column, to_ds = w.ds;
    const float *s = w.s, *dpr = w.dpr, *dpc = w.dpc, *passed = w.passed;
    const float *drop_row = w.drop_row, *drop_column = w.drop_column;
    const bool want_ds = want_ds_, want_bias = bias_.data, want_columns = sums_.db;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; i += 2) {
      const int count = std::min(2, rows - i);
      bool kept[2];
      Vec lse[2], low[2], delta[2], carry[2], shared[2] = {};
      for (int k = 0; k < 2; ++k) {
        kept[k] = k < count && (!kMasked || w.mask.row_kept(i + k));
        lse[k] = splat(w.lse_x[r + i + k]), low[k] = splat(w.low_x[r + i + k]);
        delta[k] = splat(w.delta_x[r + i + k]);
        carry[k] = splat(kOneExp ? w.transfer.row[i + k] : 0.0f);
      }
      for (int v = 0; v < nv; ++v) {
        const int at = v * kLanes;
        Vec p[2], q[2], ds[2] = {};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int here = (i + k) * kBlock + at;
          const Vec x = load(s + here);
          p[k] = exp2((x - lse[k] - low[k]) * exponent);
          if constexpr (kOneExp) {
            q[k] = p[k] * (carry[k] * load(w.transfer.column + at));
          } else {
            const Vec less = x - load(w.column_lse + at) - load(w.column_low + at);
            q[k] = kept[k] ? exp2(less * exponent) : Vec{};
          }
          if constexpr (kMasked) p[k] = select(w.mask.columns(v), p[k], Vec{});
          if (want_ds) {
            Vec dp = load(dpr + here), dq = load(dpc + here);
            if (drop_row) {
              dp *= load(drop_row + here);
              dq *= load(drop_column + here);
            }
            ds[k] = p[k] * (dp - delta[k]) + q[k] * (dq - load(w.column_delta + at));
            if (want_bias && k < count) bias_.add(t, i + k, v, ds[k], shared[k]);
          }
          if (drop_row) {
            p[k] *= load(drop_row + here);
            q[k] *= load(drop_column + here);
          }
        }
        if (count < 2) p[1] = q[1] = ds[1] = Vec{};
        if (want_ds) {
          if (want_columns) store(w.column_ds + at, load(w.column_ds + at) + (ds[0] + ds[1]));
          if (passed) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
              const IVec stopped = load(passed + (i + k) * kBlock + at) == Vec{};
              ds[k] = select(stopped, Vec{}, ds[k]);
            }
          }
          to_ds.template put<true, true>(i, v, ds[0], ds[1]);
        }
        p_row.template put<false, true>(i, v, p[0], p[1]);
        p_column.template put<true, false>(i, v, q[0], q[1]);
      }
    }
  }

  const BiAttentionGrad& g_;
  BiasGrad bias_;
  Group group_;
  ColumnGrads sums_;
  int64_t width_, width_x_, width_y_, super_;
  int64_t q_, do_, v_, qb_, dob_;  // units packed a block; 0: products read the tensor itself
  ColumnTile columns_;
  bool stay_, want_ds_;
  // Deltas come from the one tile that a row or column has, see add_deltas; or o_x is the sum over
  // heads and not at hand.
  bool from_tiles_x_, from_tiles_y_;
};

}  // namespace

void bi_attention_bwd(const BiAttention& a, const BiAttentionGrad& g, ParallelFor parallel) {
  const bool swap = a.N > a.M && !a.sum_heads;
  const BiAttentionGrad grad = swap ? exchanged(g) : g;
  launch<Backward>(swap ? exchanged(a) : a, swap, parallel, grad);
}

}  // namespace fmm::cpu::FMM_ISA
