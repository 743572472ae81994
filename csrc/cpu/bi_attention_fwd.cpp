// bi_attention forward: 3 products, one exp for both softmaxes where their references allow.
#include "bi_attention_tiles.h"

namespace fmm::cpu::FMM_ISA {
namespace {

// Column softmax of one plane and chunk: reference, sum (both in whole vectors), unnormalised
// output.
struct Columns {
  float *reference, *sum, *acc;
  static int64_t size(int64_t N, int64_t width) { return 2 * round_up(N, kLanes) + N * width; }
  static Columns at(float* p, int64_t N) {
    const int64_t each = round_up(N, kLanes);
    return {p, p + each, p + 2 * each};
  }
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
    q_ = is_a_operand<U>(a.qk_x, a.D) ? 0 : a_units<U>(kBlock, a.D);
    vy_ = is_b_operand<U>(a.v_y, a.Dv_y, a.mask_y) ? 0 : b_units<U>(kBlock, a.Dv_y);
    vx_ = is_b_operand<U>(a.v_x, a.Dv_x, a.mask_x) ? 0 : b_units<U>(kBlock, a.Dv_x);
    stay_ = tiles_ * (kt_ + vy_) * 4 <= kKeepBytes;
    super_ = super_rows(4 * (tiles_ * (kt_ + vy_) + each_),
                        4 * (units<U>(a.D) + units<U>(a.Dv_x) + width_y_));
  }

  void run() {
    const bool split = deal_.chunks > 1;
    SharedArena shared;
    float* partial = split ? (*shared).take<float>(planes_ * deal_.chunks * each_) : nullptr;
    parallel_(planes_ / heads_ * deal_.chunks, [&](int64_t begin, int64_t end) {
      Arena& arena = Arena::local();
      Work w;
      make_work(w, arena);
      float* own = split ? nullptr : arena.take<float>(each_);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t group = t / deal_.chunks, chunk = t % deal_.chunks;
        for (int64_t bh = group * heads_; bh < (group + 1) * heads_; ++bh) {
          float* acc = split ? partial + (bh * deal_.chunks + chunk) * each_ : own;
          const Columns c = Columns::at(acc, a_.N);
          task(w, bh, chunk, c);
          if (!split) finish_columns(bh, c, 0, a_.N);
        }
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
    float* total;  // [chunk_rows][width_y], over heads
    PTile<U> row, column;
    alignas(64) float column_top[kBlock], column_ref[kBlock], column_sum[kBlock];
    float row_top[kBlock];
  };

  void make_work(Work& w, Arena& arena) const {
    make_common(w, arena, false);
    const int64_t slots = stay_ ? tiles_ : 1;
    w.q = arena.take<U>(super_ / kBlock * q_);
    w.vx = arena.take<U>(super_ / kBlock * vx_);
    w.kt = arena.take<U>(slots * kt_);
    w.vy = arena.take<U>(slots * vy_);
    const int64_t widest = std::max(a_.D, std::max(a_.Dv_x, a_.Dv_y));
    w.scratch = arena.take<U>(scratch_units<U>(widest));
    w.o = arena.take<float>(super_ * width_y_);
    w.total = summed_ ? arena.take<float>(deal_.chunk_rows * width_y_) : nullptr;
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
    if (begin >= end) std::fill(c.acc, c.acc + a_.N * width_x_, 0.0f);  // else by the first rows
    TileShape t{};
    t.b = bh / a_.H, t.h = bh % a_.H, t.bh = bh;
    for (int64_t m0 = begin; m0 < end; m0 += super_) {
      const int64_t rows = std::min(super_, end - m0);
      if (q_) pack_a(w.q, rows_of(a_.qk_x, t.b, t.h, m0), rows, a_.D);
      for (int64_t r = 0; vx_ && r < rows; r += kBlock) {
        pack_b(w.vx + r / kBlock * vx_, w.scratch, rows_of(a_.v_x, t.b, t.h, m0 + r, a_.mask_x),
               std::min<int64_t>(kBlock, rows - r), a_.Dv_x);
      }
      std::fill(w.reference, w.reference + rows, -kInf);
      std::fill(w.sum, w.sum + rows, 0.0f);
      if (a_.N == 0) std::fill(w.o, w.o + rows * width_y_, 0.0f);  // else by the first columns
      look_ahead(w.ahead, bh, m0 + super_, {{a_.qk_x, a_.D}, {a_.v_x, a_.Dv_x}},
                 {{a_.qk_y, a_.D}, {a_.v_y, a_.Dv_y}});
      for (int64_t n0 = 0; n0 < a_.N; n0 += kBlock) {
        const int64_t slot = stay_ ? n0 / kBlock : 0;
        U *kt = w.kt + slot * kt_, *vy = w.vy + slot * vy_;
        t.n0 = n0;
        t.cols = static_cast<int>(std::min<int64_t>(kBlock, a_.N - n0));
        t.nv = vectors(t.cols);
        if (!stay_ || m0 == begin) {
          pack_b_transposed(kt, w.scratch, rows_of(a_.qk_y, t.b, t.h, n0), t.cols, a_.D);
          if (vy_) {
            pack_b(vy, w.scratch, rows_of(a_.v_y, t.b, t.h, n0, a_.mask_y), t.cols, a_.Dv_y);
          }
        }
        for (int64_t r = 0; r < rows; r += kBlock) {
          t.m0 = m0 + r;
          t.rows = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
          tile(w, t, r, kt, vy, c, t.m0 == begin);
        }
      }
      finish_rows(w, t, m0, rows, m0 - begin);
    }
  }

  // Rows m0.. of o_x and lse_x; `at` is their place in the chunk.
  void finish_rows(Work& w, const TileShape& t, int64_t m0, int64_t rows, int64_t at) const {
    const int64_t bytes = a_.Dv_y * size_of(a_.qk_x.dtype);
    for (int64_t i = 0; i < rows; ++i) {
      float* o = w.o + i * width_y_;
      void* out = static_cast<char*>(a_.o_x) + row_of_x(t, m0 + i) * bytes;
      double* lse = a_.lse_x + t.bh * a_.M + m0 + i;
      if (!summed_) {
        finish_row(out, lse, o, w.reference[i], w.sum[i], a_.qk_x.dtype, a_.Dv_y, rule_.unit);
        continue;
      }
      const float factor = w.sum[i] == 0.0f ? 0.0f : 1.0f / w.sum[i];
      float* total = w.total + (at + i) * width_y_;
      for (int64_t j = 0; j < width_y_; ++j) {
        total[j] = (first_head(t) ? 0.0f : total[j]) + o[j] * factor;
      }
      *lse = natural_lse(w.reference[i], w.sum[i], rule_.unit);
      if (last_head(t)) store_row(out, total, a_.qk_x.dtype, 1.0f, a_.Dv_y);
    }
  }

  // `first`: of the rows that meet these columns, whose sums it starts.
  void tile(Work& w, const TileShape& t, int64_t r, const U* kt, const U* vy, const Columns& c,
            bool first) const {
    const AOperand<U> q =
        q_ ? packed_a(w.q + r * units<U>(a_.D), a_.D) : a_operand<U>(a_.qk_x, t.b, t.h, t.m0);
    scores(q, 0, kt, t.rows, t.cols, a_.D, w.s, &w.ahead);
    load_tile(w, t);
    apply(w, t);
    float *reference = w.reference + r, *sum = w.sum + r, *o = w.o + r * width_y_;
    const bool masked = !w.mask.all_kept || w.mask.row;
    (masked ? maxima<true> : maxima<false>)(w.s, w.mask, t.rows, t.nv, w.row_top, w.column_top);
    raise_all(w.row_top, reference, sum, o, width_y_, t.rows, rule_.unit);
    float *column_reference = c.reference + t.n0, *acc = c.acc + t.n0 * width_x_;
    raise_all(w.column_top, column_reference, c.sum + t.n0, acc, width_x_, t.cols, rule_.unit);
    for (int j = 0; j < t.cols; ++j) w.column_ref[j] = finite_reference(column_reference[j]);
    std::fill(w.column_ref + t.cols, w.column_ref + kBlock, kInf);
    if (masked) {
      probabilities<true, false>(w, t, reference, sum);
    } else {
      w.transfer.prepare(rule_.unit, reference, w.column_ref, t.rows, t.cols);
      w.transfer.ok ? probabilities<false, true>(w, t, reference, sum)
                    : probabilities<false, false>(w, t, reference, sum);
    }
    for (int j = 0; j < t.cols; ++j) c.sum[t.n0 + j] += w.column_sum[j];
    const BOperand<U> v_y = vy_ ? packed_b(vy, t.cols) : b_operand<U>(a_.v_y, t.b, t.h, t.n0);
    const BOperand<U> v_x =
        vx_ ? packed_b(w.vx + r / kBlock * vx_, t.rows) : b_operand<U>(a_.v_x, t.b, t.h, t.m0);
    times_rows(w.row, t.rows, t.cols, v_y, vectors(a_.Dv_y), o, width_y_, t.n0 > 0, &w.ahead);
    times_columns(w.column, t.rows, t.cols, v_x, vectors(a_.Dv_x), acc, width_x_, !first, &w.ahead);
  }

  template <bool kMasked, bool kOneExp>
  void probabilities(Work& w, const TileShape& t, const float* reference, float* sums) const {
    std::fill(w.column_sum, w.column_sum + kBlock, 0.0f);
    const Vec exponent = splat(rule_.unit.exponent);
    // Copies: after a store the compiler would load them again.
    const PTile<U> to_row = w.row, to_column = w.column;
    const float *s = w.s, *drop_row = w.drop_row, *drop_column = w.drop_column;
    const int rows = t.rows, nv = t.nv;
    for (int i = 0; i < rows; i += 2) {
      const int count = std::min(2, rows - i);
      bool kept[2];
      Vec ref[2], carry[2], total[2] = {};
      for (int k = 0; k < 2; ++k) {
        kept[k] = k < count && (!kMasked || w.mask.row_kept(i + k));
        ref[k] = splat(finite_reference(reference[i + k]));
        carry[k] = splat(kOneExp ? w.transfer.row[i + k] : 0.0f);
      }
      for (int v = 0; v < nv; ++v) {
        const int at = v * kLanes;
        Vec p[2], q[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const Vec x = load(s + (i + k) * kBlock + at);
          p[k] = exp2((x - ref[k]) * exponent);
          if constexpr (kOneExp) {
            q[k] = p[k] * (carry[k] * load(w.transfer.column + at));
          } else {
            q[k] = kept[k] ? exp2((x - load(w.column_ref + at)) * exponent) : Vec{};
          }
          if constexpr (kMasked) p[k] = select(w.mask.columns(v), p[k], Vec{});
          total[k] += p[k];
        }
        if (count < 2) p[1] = q[1] = Vec{};
        store(w.column_sum + at, load(w.column_sum + at) + (q[0] + q[1]));
        if (drop_row) {
#pragma GCC unroll 2
          for (int k = 0; k < 2; ++k) {
            p[k] *= load(drop_row + (i + k) * kBlock + at);
            q[k] *= load(drop_column + (i + k) * kBlock + at);
          }
        }
        to_row.template put<true, false>(i, v, p[0], p[1]);
        to_column.template put<false, true>(i, v, q[0], q[1]);
      }
      for (int k = 0; k < count; ++k) sums[i + k] += sum(total[k]);
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

  int64_t width_x_, width_y_, each_, super_;
  int64_t q_, kt_, vy_, vx_;  // units packed a block; 0: products read the tensor itself
  bool stay_;
};

}  // namespace

void bi_attention_fwd(const BiAttention& a, ParallelFor parallel) {
  const bool swap = a.N > a.M && !a.sum_heads;
  launch<Forward>(swap ? exchanged(a) : a, swap, parallel);
}

}  // namespace fmm::cpu::FMM_ISA
