// What the two attentions' backwards share: a tile's place, gradients of keys' side accumulated per
// task and merged in order, and the gradient of a bias.
#pragma once

#include <algorithm>

#include "softmax.h"

namespace fmm::cpu::FMM_ISA {

// A tile of plane (b, h): rows m0.., columns n0.., nv vectors wide.
struct TileShape {
  int64_t b, h, bh, m0, n0;
  int rows, cols, nv;
};

// What a row's delta is made of: scores, products with the values, dropout factors (nullptr: none),
// lse in two parts; and where it accumulates.
struct DeltaRows {
  const float *s, *dp, *drop, *lse, *low;
  float* delta;
};

// delta = rowsum(p * dp) of the rows of a tile. It cancels against dp exactly where one key takes
// all of a row, as rowsum(d_o * o), which is summed in another order, does not.
inline void add_deltas(const Unit& unit, const TileMask& mask, const TileShape& t,
                       const DeltaRows& a) {
  const Vec exponent = splat(unit.exponent);
  for (int i = 0; i < t.rows; ++i) {
    const Vec lse = splat(a.lse[i]), low = splat(a.low[i]);
    Vec total{};
    for (int v = 0; v < t.nv; ++v) {
      const int at = i * kBlock + v * kLanes;
      Vec p = exp2((load(a.s + at) - lse - low) * exponent);
      if (a.drop) p *= load(a.drop + at);
      total += select(mask.columns(v), p * load(a.dp + at), Vec{});
    }
    a.delta[i] += sum(total);
  }
}

// `rows` rows of fp32 sums, times factor, to rows row.. of a contiguous output, if there is one.
inline void write_rows(void* out, DType dtype, const float* acc, int64_t row, int64_t rows,
                       int64_t width, int64_t ld, float factor) {
  if (!out) return;
  auto* o = static_cast<char*>(out) + row * width * size_of(dtype);
  for (int64_t i = 0; i < rows; ++i) {
    store_row(o + i * width * size_of(dtype), acc + i * ld, dtype, factor, width);
  }
}

// Sums [held][Dv] of dv, then [held][D] of dk, then [held] of a bias that is one row, of one plane
// and chunk; any may be absent. All N columns are held, or a block at a time.
struct ColumnGrads {
  void *dk, *dv;
  float* db;
  DType dtype;
  int64_t N, D, Dv;
  float scale;
  int64_t held;

  int64_t ld_k() const { return round_up(D, kLanes); }
  int64_t ld_v() const { return round_up(Dv, kLanes); }
  int64_t size() const { return held * ((dk ? ld_k() : 0) + (dv ? ld_v() : 0) + (db ? 1 : 0)); }
  float* at_v(float* acc, int64_t n) const { return acc + n % held * ld_v(); }
  float* at_k(float* acc, int64_t n) const {
    return acc + (dv ? held * ld_v() : 0) + n % held * ld_k();
  }
  float* at_b(float* acc, int64_t n) const { return acc + size() - held + n % held; }

  // Zeroes what is only ever added to: the first product of a task sets dk and dv, if it has one.
  void clear(float* acc, bool all) const {
    if (all) std::fill(acc, acc + size(), 0.0f);
    if (db) std::fill(at_b(acc, 0), at_b(acc, 0) + held, 0.0f);
  }

  void write(float* acc, int64_t bh, int64_t n0, int64_t n1) const {
    write_rows(dv, dtype, at_v(acc, n0), bh * N + n0, n1 - n0, Dv, ld_v(), 1.0f);
    write_rows(dk, dtype, at_k(acc, n0), bh * N + n0, n1 - n0, D, ld_k(), scale);
    if (db) std::copy(at_b(acc, n0), at_b(acc, n0) + (n1 - n0), db + bh * N + n0);
  }

  // Columns n0..n0 + kBlock of a plane: chunks 1.. are added to the first in order, then written.
  void merge(float* first, int64_t chunks, int64_t bh, int64_t n0) const {
    const int64_t n1 = std::min(N, n0 + kBlock);
    for (int64_t k = 1; k < chunks; ++k) {
      float* from = first + k * size();
      if (dv) add(at_v(first, n0), at_v(from, n0), (n1 - n0) * ld_v());
      if (dk) add(at_k(first, n0), at_k(from, n0), (n1 - n0) * ld_k());
      if (db) add(at_b(first, n0), at_b(from, n0), n1 - n0);
    }
    write(first, bh, n0, n1);
  }

 private:
  static void add(float* into, const float* from, int64_t n) {
    for (int64_t j = 0; j < n; ++j) into[j] += from[j];
  }
};

// Sums of ds in the shape of a bias, stride 0 where it broadcasts. Planes and rows that share an
// element are visited by one task, in order.
struct BiasGrad {
  float* data;
  const int64_t (&stride)[4];

  bool rows_shared() const { return data && stride[2] == 0; }
  // One element a column, and a plane of its own for every (b, h).
  bool of_columns() const { return rows_shared() && stride[3] != 0; }
  int64_t planes_b(int64_t B) const { return data && stride[0] == 0 ? B : 1; }
  int64_t planes_h(int64_t H) const { return data && stride[1] == 0 ? H : 1; }

  // ds of row i, vector v; where columns share an element, into `shared` until the row's end.
  FMM_INLINE void add(const TileShape& t, int i, int v, Vec ds, Vec& shared) const {
    float* out =
        data + t.b * stride[0] + t.h * stride[1] + (t.m0 + i) * stride[2] + t.n0 * stride[3];
    if (stride[3] == 0) {
      shared += ds;  // zero past the end
      if (v + 1 == t.nv) *out += sum(shared);
      return;
    }
    const int end = std::min(t.cols, (v + 1) * kLanes);
    for (int j = v * kLanes; j < end; ++j) out[j * stride[3]] += ds[j - v * kLanes];
  }
};

// Planes dealt to one task: those of a batch and heads that share a bias, else one.
struct Group {
  int64_t H, share_b, share_h;

  int64_t size() const { return share_b * share_h; }
  int64_t plane(int64_t group, int64_t k) const {
    const int64_t groups_h = H / share_h;
    const int64_t b = group / groups_h * share_b + k / share_h;
    return b * H + group % groups_h * share_h + k % share_h;
  }
};

}  // namespace fmm::cpu::FMM_ISA
