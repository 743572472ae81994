// bi_attention: every score tile is computed once and feeds both softmaxes, forward and backward.
// Rows of the longer stream (x here) are dealt to tasks; what belongs to the shorter stream (y) is
// accumulated per task and merged in order. Products: 3 forward, 7 backward.
#include "../bi_attention.h"

#include <algorithm>
#include <utility>

#include "columns.h"
#include "kernels.h"
#include "schedule.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// The same problem with the streams exchanged.
BiAttention exchanged(BiAttention a) {
  std::swap(a.M, a.N);
  std::swap(a.Dv_x, a.Dv_y);
  std::swap(a.qk_x, a.qk_y);
  std::swap(a.v_x, a.v_y);
  std::swap(a.mask_x, a.mask_y);
  std::swap(a.o_x, a.o_y);
  std::swap(a.lse_x, a.lse_y);
  return a;
}

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

struct TileShape {
  int64_t b, h, bh, m0, n0;
  int rows, cols, nv;
};

// What forward and backward share: sizes, masks, scores of one tile.
class Tiles {
 protected:
  Tiles(const BiAttention& a, bool swapped, ParallelFor parallel)
      : a_(a),
        parallel_(parallel),
        swapped_(swapped),
        planes_(a.B * a.H),
        tiles_(ceil_div(a.N, kBlock)),
        rule_(score_rule(a.scale, a.clamp, a.bias, swapped)) {}

  struct Common {
    TileMask mask;
    Transfer transfer;
    float *s, *bias, *drop_row, *drop_column, *passed;
  };

  void make_common(Common& w, Arena& arena, bool backward) const {
    w.s = arena.take<float>(kBlock * kBlock);
    w.bias = a_.bias.data ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.drop_row = a_.dropout.on ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.drop_column = a_.dropout.on ? arena.take<float>(kBlock * kBlock) : nullptr;
    w.passed = backward && a_.clamp != kInf ? arena.take<float>(kBlock * kBlock) : nullptr;
  }

  // Mask, bias and dropout of a tile whose raw products are in w.s; scores are left in w.s.
  void prepare_tile(Common& w, const TileShape& t) const {
    fill_mask(w.mask, a_.mask_y, a_.mask_x, t.b, t.m0, t.n0, t.cols);
    if (w.bias) load_bias(w.bias, rule_, t.b, t.h, t.m0, t.n0, t.rows, t.cols);
    if (w.drop_row) {
      dropout_tile(w.drop_row, a_.dropout, t.bh, swapped_ ? 1 : 0, swapped_, t.m0, t.n0, t.rows,
                   t.cols);
      dropout_tile(w.drop_column, a_.dropout, t.bh, swapped_ ? 0 : 1, swapped_, t.m0, t.n0, t.rows,
                   t.cols);
    }
    apply_rule(w.s, rule_, w.bias, t.rows, t.nv, w.passed);
  }

  const BiAttention& a_;
  ParallelFor parallel_;
  bool swapped_;
  int64_t planes_, tiles_;
  ScoreRule rule_;
  Chunks deal_;
};

// Column softmax of one plane and chunk: reference, sum, unnormalised output.
struct Columns {
  float *reference, *sum, *acc;
  static int64_t size(int64_t N, int64_t width) { return N * (width + 2); }
  static Columns at(float* p, int64_t N) { return {p, p + N, p + 2 * N}; }
};

template <class U>
class Forward : Tiles {
 public:
  Forward(const BiAttention& a, bool swapped, ParallelFor parallel) : Tiles(a, swapped, parallel) {
    width_x_ = round_up(a.Dv_x, kLanes);
    width_y_ = round_up(a.Dv_y, kLanes);
    each_ = Columns::size(a.N, width_x_);
    deal_ = chunk_rows(planes_, a.M, each_ * 4);
    kt_ = bt_units<U>(kBlock, a.D);
    vy_ = b_units<U>(kBlock, a.Dv_y);
    vx_ = b_units<U>(kBlock, a.Dv_x);
    stay_ = tiles_ * (kt_ + vy_) * 4 <= kKeepBytes;
    super_ = super_rows(stay_, 4 * (units<U>(a.D) + width_x_ + width_y_));
  }

  void run() {
    const bool split = deal_.chunks > 1;
    float* partial = split ? Arena::shared().take<float>(planes_ * deal_.chunks * each_) : nullptr;
    parallel_(planes_ * deal_.chunks, [&](int64_t begin, int64_t end) {
      Arena& arena = Arena::local();
      Work w;
      make_work(w, arena);
      float* own = split ? nullptr : arena.take<float>(each_);
      for (int64_t t = begin; t < end; ++t) {
        const Columns c = Columns::at(split ? partial + t * each_ : own, a_.N);
        task(w, t / deal_.chunks, t % deal_.chunks, c);
        if (!split) finish_columns(t, c, 0, a_.N);
      }
    });
    if (!split) return;
    parallel_(planes_ * tiles_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) merge_columns(partial, t / tiles_, t % tiles_ * kBlock);
    });
  }

 private:
  struct Work : Common {
    U *q, *vx, *kt, *vy, *scratch;
    float *o, *reference, *sum;
    PTile<U> row, column;
    alignas(64) float column_top[kBlock], column_ref[kBlock], column_sum[kBlock];
    float row_top[kBlock];
  };

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena, false);
    const int64_t slots = stay_ ? tiles_ : 1;
    w.q = arena.take<U>(a_units<U>(super_, a_.D));
    w.vx = arena.take<U>(super_ / kBlock * vx_);
    w.kt = arena.take<U>(slots * kt_);
    w.vy = arena.take<U>(slots * vy_);
    const int64_t widest = std::max(a_.D, std::max(a_.Dv_x, a_.Dv_y));
    w.scratch = arena.take<U>(scratch_units<U>(widest));
    w.o = arena.take<float>(super_ * width_y_);
    w.reference = arena.take<float>(super_);
    w.sum = arena.take<float>(super_);
    w.row = PTile<U>::make(arena, true, false);
    w.column = PTile<U>::make(arena, false, true);
  }

  void task(Work& w, int64_t bh, int64_t chunk, const Columns& c) const {
    const int64_t begin = chunk * deal_.chunk_rows;
    const int64_t end = std::min(a_.M, begin + deal_.chunk_rows);
    std::fill(c.reference, c.reference + a_.N, -kInf);
    std::fill(c.sum, c.sum + a_.N, 0.0f);
    std::fill(c.acc, c.acc + a_.N * width_x_, 0.0f);
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0);
      pack_a(w.q, rows_of(a_.qk_x, t.b, t.h, m0), rows, a_.D);
      for (int64_t r = 0; r < rows; r += kBlock) {
        pack_b(w.vx + r / kBlock * vx_, w.scratch, rows_of(a_.v_x, t.b, t.h, m0 + r, a_.mask_x),
               std::min<int64_t>(kBlock, rows - r), a_.Dv_x);
      }
      std::fill(w.reference, w.reference + rows, -kInf);
      std::fill(w.sum, w.sum + rows, 0.0f);
      std::fill(w.o, w.o + rows * width_y_, 0.0f);
      for (int64_t n0 = 0; n0 < a_.N; n0 += kBlock) {
        const int64_t slot = stay_ ? n0 / kBlock : 0;
        U *kt = w.kt + slot * kt_, *vy = w.vy + slot * vy_;
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, a_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || m0 == begin) {
          pack_b_transposed(kt, w.scratch, rows_of(a_.qk_y, t.b, t.h, n0), t.cols, a_.D);
          pack_b(vy, w.scratch, rows_of(a_.v_y, t.b, t.h, n0, a_.mask_y), t.cols, a_.Dv_y);
        }
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, kt, vy, c);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = bh * a_.M + m0 + i;
        finish_row(static_cast<char*>(a_.o_x) + row * a_.Dv_y * size_of(a_.qk_x.dtype),
                   a_.lse_x + row, w.o + i * width_y_, w.reference[i], w.sum[i], a_.qk_x.dtype,
                   a_.Dv_y, rule_.unit);
      }
    }
  }

  void tile(Work& w, const TileShape& t, int64_t r, const U* kt, const U* vy,
            const Columns& c) const {
    scores(w.q + r * units<U>(a_.D), kt, t.rows, t.cols, a_.D, w.s);
    prepare_tile(w, t);
    float *reference = w.reference + r, *sum = w.sum + r, *o = w.o + r * width_y_;
    const bool masked = !w.mask.full || w.mask.row;
    (masked ? maxima<true> : maxima<false>)(w.s, w.mask, t.rows, t.nv, w.row_top, w.column_top);
    for (int i = 0; i < t.rows; ++i) {
      raise(w.row_top[i], reference[i], sum[i], o + i * width_y_, width_y_, rule_.unit);
    }
    float* acc = c.acc + t.n0 * width_x_;
    for (int j = 0; j < t.cols; ++j) {
      float& ref = c.reference[t.n0 + j];
      raise(w.column_top[j], ref, c.sum[t.n0 + j], acc + j * width_x_, width_x_, rule_.unit);
      w.column_ref[j] = finite_reference(ref);
    }
    std::fill(w.column_ref + t.cols, w.column_ref + kBlock, kInf);
    if (masked) {
      probabilities<true, false>(w, t, reference, sum);
    } else {
      w.transfer.prepare(rule_.unit, reference, w.column_ref, t.rows, t.cols);
      w.transfer.ok ? probabilities<false, true>(w, t, reference, sum)
                    : probabilities<false, false>(w, t, reference, sum);
    }
    for (int j = 0; j < t.cols; ++j) c.sum[t.n0 + j] += w.column_sum[j];
    times_rows(w.row, t.rows, t.cols, vy, t.cols, vectors(a_.Dv_y), o, width_y_);
    times_columns(w.column, t.rows, t.cols, w.vx + r / kBlock * vx_, t.rows, vectors(a_.Dv_x), acc,
                  width_x_);
  }

  template <bool kMasked, bool kOneExp>
  void probabilities(Work& w, const TileShape& t, const float* reference, float* sums) const {
    std::fill(w.column_sum, w.column_sum + kBlock, 0.0f);
    const Vec exponent = splat(rule_.unit.exponent);
    for (int i = 0; i < t.rows; ++i) {
      const float* s = w.s + i * kBlock;
      const bool kept = !kMasked || w.mask.row_kept(i);
      const Vec ref = splat(finite_reference(reference[i]));
      const Vec carry = splat(kOneExp ? w.transfer.row[i] : 0.0f);
      Vec total{};
      for (int v = 0; v < t.nv; ++v) {
        const int at = v * kLanes;
        const Vec x = load(s + at);
        Vec p = exp2((x - ref) * exponent), q;
        if constexpr (kOneExp) {
          q = p * (carry * load(w.transfer.column + at));
        } else {
          q = kept ? exp2((x - load(w.column_ref + at)) * exponent) : Vec{};
        }
        if constexpr (kMasked) p = select(w.mask.columns(v), p, Vec{});
        total += p;
        store(w.column_sum + at, load(w.column_sum + at) + q);
        if (w.drop_row) {
          p *= load(w.drop_row + i * kBlock + at);
          q *= load(w.drop_column + i * kBlock + at);
        }
        w.row.put_rm(i, v, p);
        w.column.put_tr(i, v, q);
      }
      sums[i] += sum(total);
    }
  }

  // Columns n0.. of a plane: chunks 1.. are added to chunk 0 in order, then written.
  void merge_columns(float* partial, int64_t bh, int64_t n0) const {
    const Columns into = Columns::at(partial + bh * deal_.chunks * each_, a_.N);
    const int64_t n1 = std::min(a_.N, n0 + kBlock);
    for (int64_t k = 1; k < deal_.chunks; ++k) {
      const Columns from = Columns::at(partial + (bh * deal_.chunks + k) * each_, a_.N);
      for (int64_t n = n0; n < n1; ++n) {
        const float top =
            from.reference[n] > into.reference[n] ? from.reference[n] : into.reference[n];
        const float finite = finite_reference(top), e = rule_.unit.exponent;
        const float f = exp2((into.reference[n] - finite) * e);
        const float g = exp2((from.reference[n] - finite) * e);
        float *a = into.acc + n * width_x_, *b = from.acc + n * width_x_;
        into.sum[n] = into.sum[n] * f + from.sum[n] * g;
        into.reference[n] = top;
        for (int64_t j = 0; j < width_x_; ++j) a[j] = a[j] * f + b[j] * g;
      }
    }
    finish_columns(bh, into, n0, n1);
  }

  void finish_columns(int64_t bh, const Columns& c, int64_t n0, int64_t n1) const {
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t row = bh * a_.N + n;
      finish_row(static_cast<char*>(a_.o_y) + row * a_.Dv_x * size_of(a_.qk_x.dtype),
                 a_.lse_y + row, c.acc + n * width_x_, c.reference[n], c.sum[n], a_.qk_x.dtype,
                 a_.Dv_x, rule_.unit);
    }
  }

  int64_t width_x_, width_y_, each_, kt_, vy_, vx_, super_;
  bool stay_;
};

template <class U>
class Backward : Tiles {
 public:
  Backward(const BiAttention& a, const BiAttentionGrad& g, bool swapped, ParallelFor parallel)
      : Tiles(a, swapped, parallel), g_(g) {
    width_ = round_up(a.D, kLanes);
    width_x_ = round_up(a.Dv_x, kLanes);
    width_y_ = round_up(a.Dv_y, kLanes);
    want_ds_ = g.dqk_x || g.dqk_y || g.dbias;
    each_ = a.N * ((g.dqk_y ? width_ : 0) + (g.dv_y ? width_y_ : 0));
    // A bias shared by several planes or rows is summed by one task, in order.
    const bool row_shared = g.dbias && g.dbias_stride[2] == 0;
    share_b_ = g.dbias && g.dbias_stride[0] == 0 ? a.B : 1;
    share_h_ = g.dbias && g.dbias_stride[1] == 0 ? a.H : 1;
    deal_ = row_shared ? chunk_rows(kTasks, a.M, each_ * 4) : chunk_rows(planes_, a.M, each_ * 4);
    if (row_shared) deal_ = {1, round_up(std::max<int64_t>(a.M, 1), kBlock)};
    columns_.init(a, g, want_ds_);
    stay_ = tiles_ * columns_.size() * 4 <= kKeepBytes;
    super_ = super_rows(stay_, 4 * (2 * width_ + 3 * width_x_ + 2 * width_y_));
  }

  void run() {
    const bool split = deal_.chunks > 1;
    float* partial = split ? Arena::shared().take<float>(planes_ * deal_.chunks * each_) : nullptr;
    const int64_t groups = planes_ / (share_b_ * share_h_);
    parallel_(groups * deal_.chunks, [&](int64_t begin, int64_t end) {
      Arena& arena = Arena::local();
      Work w;
      make_work(w, arena);
      float* own = split ? nullptr : arena.take<float>(each_);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t group = t / deal_.chunks, chunk = t % deal_.chunks;
        for (int64_t k = 0; k < share_b_ * share_h_; ++k) {
          const int64_t bh = plane_of(group, k);
          float* acc = split ? partial + (bh * deal_.chunks + chunk) * each_ : own;
          task(w, bh, chunk, acc);
          if (!split) finish_columns(bh, acc, 0, a_.N);
        }
      }
    });
    if (!split) return;
    parallel_(planes_ * tiles_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) merge_columns(partial, t / tiles_, t % tiles_ * kBlock);
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
      k = g.dqk_x ? b_units<U>(kBlock, a.D) : 0;
      d_o = g.dv_x ? b_units<U>(kBlock, a.Dv_x) : 0;
    }
    int64_t size() const { return kt + vt + dot + k + d_o; }
  };

  struct Work : Common {
    U *q, *d_o, *v, *q_b, *do_b, *column, *scratch;  // of x: A operands, then B operands
    float *dq, *dv, *dpr, *dpc, *delta_x, *delta_y, *floats;
    float *lse_x, *low_x, *lse_y, *low_y;  // in scores, high and low
    PTile<U> p_row, p_column, ds;
    alignas(64) float column_lse[kBlock], column_low[kBlock], column_delta[kBlock];
  };

  int64_t plane_of(int64_t group, int64_t k) const {
    const int64_t groups_h = a_.H / share_h_;
    const int64_t b = group / groups_h * share_b_ + k / share_h_;
    const int64_t h = group % groups_h * share_h_ + k % share_h_;
    return b * a_.H + h;
  }

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena, true);
    const int64_t blocks = super_ / kBlock;
    const int64_t widest = std::max(a_.D, std::max(a_.Dv_x, a_.Dv_y));
    w.q = arena.take<U>(a_units<U>(super_, a_.D));
    w.d_o = arena.take<U>(a_units<U>(super_, a_.Dv_y));
    w.v = arena.take<U>(a_units<U>(super_, a_.Dv_x));
    w.q_b = arena.take<U>(blocks * b_units<U>(kBlock, a_.D));
    w.do_b = arena.take<U>(blocks * b_units<U>(kBlock, a_.Dv_y));
    w.column = arena.take<U>((stay_ ? tiles_ : 1) * columns_.size());
    w.scratch = arena.take<U>(scratch_units<U>(widest));
    w.floats = arena.take<float>(2 * widest);
    w.dq = arena.take<float>(super_ * width_);
    w.dv = arena.take<float>(super_ * width_x_);
    w.dpr = arena.take<float>(kBlock * kBlock);
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
    pack_a(w.q, q, rows, a_.D);
    if (want_ds_) {
      pack_a(w.d_o, d_o, rows, a_.Dv_y);
      pack_a(w.v, rows_of(a_.v_x, t.b, t.h, m0, a_.mask_x), rows, a_.Dv_x);
    }
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, rows - r), block = r / kBlock;
      if (g_.dqk_y) {
        pack_b(w.q_b + block * b_units<U>(kBlock, a_.D), w.scratch,
               rows_of(a_.qk_x, t.b, t.h, m0 + r), n, a_.D);
      }
      if (g_.dv_y) {
        pack_b(w.do_b + block * b_units<U>(kBlock, a_.Dv_y), w.scratch,
               rows_of(g_.do_x, t.b, t.h, m0 + r), n, a_.Dv_y);
      }
    }
    const RowSource o = rows_of(g_.o_x, t.b, t.h, m0);
    const int64_t row = t.bh * a_.M + m0;
    for (int64_t i = 0; i < rows; ++i) {
      const Lse2 lse = split_lse(g_.lse_x[row + i], rule_.unit);
      w.lse_x[i] = lse.high, w.low_x[i] = lse.low;
      w.delta_x[i] = row_delta(d_o, o, g_.dlse_x + row, i, a_.Dv_y, w.floats);
    }
    std::fill(w.dq, w.dq + rows * width_, 0.0f);
    std::fill(w.dv, w.dv + rows * width_x_, 0.0f);
  }

  void task(Work& w, int64_t bh, int64_t chunk, float* acc) const {
    const int64_t begin = chunk * deal_.chunk_rows;
    const int64_t end = std::min(a_.M, begin + deal_.chunk_rows);
    std::fill(acc, acc + each_, 0.0f);
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    const RowSource d_o = rows_of(g_.do_y, t.b, t.h, 0), o = rows_of(g_.o_y, t.b, t.h, 0);
    for (int64_t n = 0; n < a_.N; ++n) {
      const Lse2 lse = split_lse(g_.lse_y[bh * a_.N + n], rule_.unit);
      w.lse_y[n] = lse.high, w.low_y[n] = lse.low;
      w.delta_y[n] = row_delta(d_o, o, g_.dlse_y + bh * a_.N, n, a_.Dv_x, w.floats);
    }
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0);
      pack_rows(w, t, m0, rows);
      for (int64_t n0 = 0; n0 < a_.N; n0 += kBlock) {
        U* column = w.column + (stay_ ? n0 / kBlock : 0) * columns_.size();
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, a_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || m0 == begin) pack_columns(w, t, column);
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, column, acc);
        }
      }
      write_rows(g_.dqk_x, w.dq, bh * a_.M + m0, rows, a_.D, width_, a_.scale);
      write_rows(g_.dv_x, w.dv, bh * a_.M + m0, rows, a_.Dv_x, width_x_, 1.0f);
    }
  }

  void tile(Work& w, const TileShape& t, int64_t r, const U* column, float* acc) const {
    const U *kt = column, *vt = kt + columns_.kt, *dot = vt + columns_.vt, *k = dot + columns_.dot,
            *d_o = k + columns_.k;
    scores(w.q + r * units<U>(a_.D), kt, t.rows, t.cols, a_.D, w.s);
    if (want_ds_) {
      scores(w.d_o + r * units<U>(a_.Dv_y), vt, t.rows, t.cols, a_.Dv_y, w.dpr);
      scores(w.v + r * units<U>(a_.Dv_x), dot, t.rows, t.cols, a_.Dv_x, w.dpc);
    }
    prepare_tile(w, t);
    std::copy(w.lse_y + t.n0, w.lse_y + t.n0 + t.cols, w.column_lse);
    std::fill(w.column_lse + t.cols, w.column_lse + kBlock, kInf);
    std::copy(w.low_y + t.n0, w.low_y + t.n0 + t.cols, w.column_low);
    std::fill(w.column_low + t.cols, w.column_low + kBlock, 0.0f);
    std::copy(w.delta_y + t.n0, w.delta_y + t.n0 + t.cols, w.column_delta);
    std::fill(w.column_delta + t.cols, w.column_delta + kBlock, 0.0f);
    if (!w.mask.full || w.mask.row) {
      gradients<true, false>(w, t, r);
    } else {
      w.transfer.prepare(rule_.unit, w.lse_x + r, w.column_lse, t.rows, t.cols, w.low_x + r,
                         w.column_low);
      w.transfer.ok ? gradients<false, true>(w, t, r) : gradients<false, false>(w, t, r);
    }
    const int64_t block = r / kBlock;
    float* dv_y = acc + t.n0 * width_y_;
    float* dk_y = acc + (g_.dv_y ? a_.N * width_y_ : 0) + t.n0 * width_;
    if (g_.dv_y) {
      times_columns(w.p_row, t.rows, t.cols, w.do_b + block * b_units<U>(kBlock, a_.Dv_y), t.rows,
                    vectors(a_.Dv_y), dv_y, width_y_);
    }
    if (g_.dv_x) {
      times_rows(w.p_column, t.rows, t.cols, d_o, t.cols, vectors(a_.Dv_x), w.dv + r * width_x_,
                 width_x_);
    }
    if (g_.dqk_x) {
      times_rows(w.ds, t.rows, t.cols, k, t.cols, vectors(a_.D), w.dq + r * width_, width_);
    }
    if (g_.dqk_y) {
      times_columns(w.ds, t.rows, t.cols, w.q_b + block * b_units<U>(kBlock, a_.D), t.rows,
                    vectors(a_.D), dk_y, width_);
    }
  }

  template <bool kMasked, bool kOneExp>
  void gradients(Work& w, const TileShape& t, int64_t r) const {
    const Vec exponent = splat(rule_.unit.exponent);
    for (int i = 0; i < t.rows; ++i) {
      const int row = i * kBlock;
      const bool kept = !kMasked || w.mask.row_kept(i);
      const Vec row_lse = splat(w.lse_x[r + i]), row_low = splat(w.low_x[r + i]);
      Vec shared{};
      const Vec row_delta = splat(w.delta_x[r + i]);
      const Vec carry = splat(kOneExp ? w.transfer.row[i] : 0.0f);
      for (int v = 0; v < t.nv; ++v) {
        const int at = v * kLanes;
        const Vec x = load(w.s + row + at);
        Vec p = exp2((x - row_lse - row_low) * exponent), q;
        if constexpr (kOneExp) {
          q = p * (carry * load(w.transfer.column + at));
        } else {
          const Vec less = x - load(w.column_lse + at) - load(w.column_low + at);
          q = kept ? exp2(less * exponent) : Vec{};
        }
        if constexpr (kMasked) p = select(w.mask.columns(v), p, Vec{});
        if (want_ds_) {
          Vec dp = load(w.dpr + row + at), dq = load(w.dpc + row + at);
          if (w.drop_row) {
            dp *= load(w.drop_row + row + at);
            dq *= load(w.drop_column + row + at);
          }
          Vec ds = p * (dp - row_delta) + q * (dq - load(w.column_delta + at));
          if (g_.dbias) add_dbias(t, i, v, ds, shared);
          if (w.passed) ds = load(w.passed + row + at) == Vec{} ? Vec{} : ds;
          w.ds.put_rm(i, v, ds);
          if (PTile<U>::kTwo) w.ds.put_tr(i, v, ds);
        }
        if (w.drop_row) {
          p *= load(w.drop_row + row + at);
          q *= load(w.drop_column + row + at);
        }
        w.p_row.put_tr(i, v, p);
        w.p_column.put_rm(i, v, q);
      }
    }
  }

  // ds of row i, vector v into dbias; where columns share an element, into `shared` until row's
  // end.
  FMM_INLINE void add_dbias(const TileShape& t, int i, int v, Vec ds, Vec& shared) const {
    if (g_.dbias_stride[3] == 0) {
      shared += ds;  // zero past the end
      if (v + 1 == t.nv) *dbias_at(t, i) += sum(shared);
      return;
    }
    float* out = dbias_at(t, i);
    const int end = std::min(t.cols, (v + 1) * kLanes);
    for (int j = v * kLanes; j < end; ++j) out[j * g_.dbias_stride[3]] += ds[j - v * kLanes];
  }

  FMM_INLINE float* dbias_at(const TileShape& t, int i) const {
    return g_.dbias + t.b * g_.dbias_stride[0] + t.h * g_.dbias_stride[1] +
           (t.m0 + i) * g_.dbias_stride[2] + t.n0 * g_.dbias_stride[3];
  }

  void write_rows(void* out, const float* acc, int64_t row, int64_t rows, int64_t width, int64_t ld,
                  float factor) const {
    if (!out) return;
    const DType dtype = a_.qk_x.dtype;
    auto* o = static_cast<char*>(out) + row * width * size_of(dtype);
    for (int64_t i = 0; i < rows; ++i) {
      store_row(o + i * width * size_of(dtype), acc + i * ld, dtype, factor, width);
    }
  }

  void merge_columns(float* partial, int64_t bh, int64_t n0) const {
    float* into = partial + bh * deal_.chunks * each_;
    const int64_t n1 = std::min(a_.N, n0 + kBlock), split = g_.dv_y ? a_.N * width_y_ : 0;
    for (int64_t k = 1; k < deal_.chunks; ++k) {
      const float* from = into + k * each_;
      if (g_.dv_y) {
        for (int64_t j = n0 * width_y_; j < n1 * width_y_; ++j) into[j] += from[j];
      }
      if (g_.dqk_y) {
        for (int64_t j = split + n0 * width_; j < split + n1 * width_; ++j) into[j] += from[j];
      }
    }
    finish_columns(bh, into, n0, n1);
  }

  void finish_columns(int64_t bh, const float* acc, int64_t n0, int64_t n1) const {
    const float* dk = acc + (g_.dv_y ? a_.N * width_y_ : 0);
    write_rows(g_.dv_y, acc + n0 * width_y_, bh * a_.N + n0, n1 - n0, a_.Dv_y, width_y_, 1.0f);
    write_rows(g_.dqk_y, dk + n0 * width_, bh * a_.N + n0, n1 - n0, a_.D, width_, a_.scale);
  }

  const BiAttentionGrad& g_;
  int64_t width_, width_x_, width_y_, each_, super_, share_b_, share_h_;
  ColumnTile columns_;
  bool stay_, want_ds_;
};

// Runs `Pass` with the longer stream as rows, in bf16 products where the machine has them.
template <template <class> class Pass, class... Args>
void launch(const BiAttention& a, bool swapped, ParallelFor parallel, Args&&... args) {
#if defined(__AVX512BF16__)
  if (a.qk_x.dtype == DType::kBFloat16) {
    Pass<Bf2>(a, args..., swapped, parallel).run();
    return;
  }
#endif
  Pass<float>(a, args..., swapped, parallel).run();
}

}  // namespace

void bi_attention_fwd(const BiAttention& a, ParallelFor parallel) {
  const bool swap = a.N > a.M;
  launch<Forward>(swap ? exchanged(a) : a, swap, parallel);
}

void bi_attention_bwd(const BiAttention& a, const BiAttentionGrad& g, ParallelFor parallel) {
  const bool swap = a.N > a.M;
  const BiAttentionGrad grad = swap ? exchanged(g) : g;
  launch<Backward>(swap ? exchanged(a) : a, swap, parallel, grad);
}

}  // namespace fmm::cpu::FMM_ISA
