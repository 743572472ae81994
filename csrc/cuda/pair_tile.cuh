// A tile of scores of a pair loss in the accumulators' layout (mma.cuh): where it lies, its matches
// as bits, sums over rows (a lane's quad) and over columns (a warp).
#pragma once

#include "mma.cuh"
#include "pair_loss.h"
#include "softmax.cuh"
#include "tuning.h"

namespace fmm::cuda {

// A lane's first row and column.
struct LaneAt {
  int g, row, col;

  __device__ int row_of(int m, int i) const { return row + 16 * m + i / 2 * 8; }
  __device__ int col_of(int n, int i) const { return col + 8 * n + i % 2; }
  // Whether all of the warp's entries are inside.
  template <int kMT, int kNT>
  __device__ bool whole(const Scores& s) const {
    const int lane = threadIdx.x % 32;
    return row - lane / 4 + 16 * kMT <= s.M && col - lane % 4 * 2 + 8 * kNT <= s.N;
  }
};

// Rows m0 on and the part of the columns that a block walks, tiles [begin, end). `parts` run
// fastest, then tiles of rows, then problems.
template <typename S>
struct BlockAt {
  int g, tile_m, part, m0, begin, end;

  __device__ BlockAt(int64_t block, int64_t rows, int64_t cols, int64_t parts) {
    const int64_t tiles_m = ceil_div(rows, S::kRows), tiles_n = ceil_div(cols, S::kCols);
    part = static_cast<int>(block % parts), tile_m = static_cast<int>(block / parts % tiles_m);
    g = static_cast<int>(block / (parts * tiles_m)), m0 = tile_m * S::kRows;
    begin = static_cast<int>(tiles_n * part / parts);
    end = static_cast<int>(tiles_n * (part + 1) / parts);
  }
  __device__ LaneAt lane(int n0) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {g, m0 + warp * 16 * S::kMT + lane / 4, n0 + lane % 4 * 2};
  }
};

// Stored products, 0 outside.
template <int kMT, int kNT>
__device__ inline void load_dots(float (&x)[kMT][kNT][4], const Scores& s, const LaneAt& at) {
  const float* from = s.dots + (at.g * s.M + at.row) * s.pitch + at.col;
  if (at.whole<kMT, kNT>(s)) {
#pragma unroll
    for (int k = 0; k < 2 * kMT; ++k, from += 8 * s.pitch) {
      unroll<kNT>([&](auto n) {
        const float2 v = *reinterpret_cast<const float2*>(from + 8 * n);
        x[k / 2][n][k % 2 * 2] = v.x, x[k / 2][n][k % 2 * 2 + 1] = v.y;
      });
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k, from += 8 * s.pitch) {
    const int m = k / 2, i = k % 2 * 2;
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      const int col = at.col_of(n, 0);
      float2 v = make_float2(0.0f, 0.0f);
      if (at.row_of(m, i) < s.M && col < s.N) v = *reinterpret_cast<const float2*>(from + 8 * n);
      x[m][n][i] = v.x, x[m][n][i + 1] = col + 1 < s.N ? v.y : 0.0f;
    }
  }
}

__device__ inline int64_t index_at(const Indices& t, int64_t g, int64_t i) {
  return t.data[g * t.stride[0] + i * t.stride[1]];
}

// Factors and matches of a lane's rows; 0 and none outside.
template <int kMT>
struct ScoreRows {
  float scale[kMT][2];
  int mate[kMT][2];

  ScoreRows() = default;
  __device__ ScoreRows(const Scores& s, const LaneAt& at) {
#pragma unroll
    for (int k = 0; k < 2 * kMT; ++k) {
      const int row = at.row_of(k / 2, k % 2 * 2);
      scale[k / 2][k % 2] = 0.0f, mate[k / 2][k % 2] = -1;
      if (row < s.M) {
        scale[k / 2][k % 2] = s.scale[at.g * s.scale_stride[0] + row * s.scale_stride[1]];
        if (s.positives.data) {
          const int64_t target = index_at(s.positives, at.g, row);
          if (target < s.N) mate[k / 2][k % 2] = static_cast<int>(target);
        }
      }
    }
  }
};

// One bit an accumulator of a lane, n * 4 + i of word m.
template <int kMT>
struct PairBits {
  uint32_t word[kMT];
  __device__ bool has(int m, int n, int i) const { return word[m] >> (n * 4 + i) & 1; }
  // The same unknown to the compiler, which then selects by them anew in place of keeping a tile of
  // what it selected before.
  __device__ PairBits anew() const {
    PairBits same;
#pragma unroll
    for (int m = 0; m < kMT; ++m) same.word[m] = kept_register(word[m]);
    return same;
  }
};

// Which entries of the tile are targets, and which are outside the denominator or the matrix. False
// where the warp has neither; the bits are then not written.
template <int kMT, int kNT>
__device__ inline bool find_matches(PairBits<kMT>& pos, PairBits<kMT>& out, const Scores& s,
                                    const ScoreRows<kMT>& rows, const LaneAt& at) {
  static_assert(kNT * 4 <= 32);
  const int n0 = at.col - threadIdx.x % 4 * 2;
  const bool all = s.ids_x.data || at.row_of(kMT - 1, 2) >= s.M || n0 + 8 * kNT > s.N;
  bool look = all;
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k) {
    const int mate = rows.mate[k / 2][k % 2];
    look = look || (mate >= n0 && mate < n0 + 8 * kNT);
  }
  if (!__any_sync(~0u, look)) return false;
#pragma unroll
  for (int m = 0; m < kMT; ++m) pos.word[m] = out.word[m] = 0;
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k) {
    const uint32_t d = rows.mate[k / 2][k % 2] - at.col;
    if (d < 8 * kNT && d % 8 < 2) pos.word[k / 2] |= 1u << (d / 8 * 4 + k % 2 * 2 + d % 8);
  }
  if (!all) return true;
  int64_t id[kMT][2];
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k) {
    const int row = at.row_of(k / 2, k % 2 * 2);
    id[k / 2][k % 2] = s.ids_x.data && row < s.M ? index_at(s.ids_x, at.g, row) : 0;
  }
#pragma unroll 1  // rare; unrolled, it takes registers that others then lack
  for (int n = 0; n < kNT; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int col = at.col_of(n, c);
      const int64_t id_y = s.ids_x.data && col < s.N ? index_at(s.ids_y, at.g, col) : 0;
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        const int m = k / 2, h = k % 2;
        const bool outside = at.row_of(m, 2 * h) >= s.M || col >= s.N;
        const bool hit = rows.mate[m][h] == col, same = s.ids_x.data && id[m][h] == id_y;
        const bool is_pos = !outside && same && !s.ignore;
        const bool is_out = outside || (same && s.ignore && !hit);
        pos.word[m] |= uint32_t{is_pos} << (n * 4 + 2 * h + c);
        out.word[m] |= uint32_t{is_out} << (n * 4 + 2 * h + c);
      }
    }
  }
  return true;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// value(m, n, i) reduced over the lane's columns of half h of rows m.
template <int kNT, typename Op, typename Value>
__device__ inline float fold_row(int m, int h, const Op& op, const Value& value) {
  float v = op(value(m, 0, 2 * h), value(m, 0, 2 * h + 1));
#pragma unroll
  for (int n = 1; n < kNT; ++n) v = op(v, op(value(m, n, 2 * h), value(m, n, 2 * h + 1)));
  return v;
}

// A lane reduces kKeep of the entries it has with those of a neighbour and gives the others away,
// until the eight lanes of a column share the columns.
template <int kKeep, int kBit, int kAll, typename Op>
__device__ inline void share(float (&v)[kAll], const Op& op) {
  const bool upper = threadIdx.x & kBit;
#pragma unroll
  for (int j = 0; j < kKeep; ++j) {
    const float keep = upper ? v[kKeep + j] : v[j], give = upper ? v[j] : v[kKeep + j];
    v[j] = op(keep, __shfl_xor_sync(~0u, give, kBit));
  }
  if constexpr (kBit > 4) share<kKeep / 2, kBit / 2>(v, op);
}

// value(m, n, i) reduced over the warp's rows, to a warp's row of shared memory; lane l ends with
// the columns 2l and 2l + 1.
template <int kMT, int kNT, typename Op, typename Value>
__device__ inline void fold_columns(float* to, const Op& op, const Value& value) {
  static_assert(kNT == 8);
  float v[2 * kNT];
#pragma unroll
  for (int j = 0; j < 2 * kNT; ++j) {
    const int n = j / 2, c = j % 2;
    v[j] = op(value(0, n, c), value(0, n, c + 2));
#pragma unroll
    for (int m = 1; m < kMT; ++m) v[j] = op(v[j], op(value(m, n, c), value(m, n, c + 2)));
  }
  share<kNT, 16>(v, op);
  *reinterpret_cast<float2*>(to + threadIdx.x % 32 * 2) = make_float2(v[0], v[1]);
}

// w = value(m, n, i) inside.
template <typename T, int kMT, int kNT>
__device__ inline void store_w(void* w, const Scores& s, const LaneAt& at,
                               const float (&v)[kMT][kNT][4]) {
  T* to = static_cast<T*>(w) + (at.g * s.M + at.row) * s.pitch + at.col;
  const auto put = [&](int m, int n, int i) {
    const float* two = &v[m][n][i];
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack<T>(two[0], two[1]);
    } else {
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(two[0], two[1]);
    }
  };
  if (at.whole<kMT, kNT>(s)) {
#pragma unroll
    for (int k = 0; k < 2 * kMT; ++k, to += 8 * s.pitch) {
#pragma unroll
      for (int n = 0; n < kNT; ++n) put(k / 2, n, k % 2 * 2);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k, to += 8 * s.pitch) {
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      const int m = k / 2, i = k % 2 * 2;
      if (at.row_of(m, i) < s.M && at.col_of(n, 0) < s.N) put(m, n, i);
    }
  }
}

// The sum over a quad of each of a lane's rows, to part[row].
template <int kMT>
__device__ inline void store_sums(float* part, int64_t end, const LaneAt& at,
                                  const float (&r)[kMT][2]) {
#pragma unroll
  for (int k = 0; k < 2 * kMT; ++k) {
    const float sum = quad_sum(r[k / 2][k % 2]);
    const int row = at.row_of(k / 2, k % 2 * 2);
    if (threadIdx.x % 4 == 0 && row < end) part[row] = sum;
  }
}

}  // namespace fmm::cuda
