// A tile of scores of a pair loss in the accumulators' layout (mma.cuh): where it lies, its matches
// as bits, its reductions over rows (a lane's quad) and over columns (the block).
#pragma once

#include "../common/switch.h"
#include "pair_loss.h"
#include "softmax.cuh"
#include "tuning.h"

namespace fmm::cuda {

using PairAcc = float[PairTile::kMT][PairTile::kNT][4];
constexpr int kPairMT = PairTile::kMT, kPairNT = PairTile::kNT;
static_assert(kPairNT == 8);  // fold_columns halves 16 columns of a lane to 2

// One bit an accumulator of a lane, n * 4 + i of word m.
static_assert(kPairNT * 4 <= 32);
struct PairBits {
  uint32_t word[kPairMT];
  __device__ bool has(int m, int n, int i) const { return word[m] >> (n * 4 + i) & 1; }
};

// A block's tile, and the first rows and columns of a lane.
struct PairPlace {
  int64_t g, tile_m, tile_n;
  int row, col;

  __device__ explicit PairPlace(const Scores& s) {
    const int64_t tiles_n = ceil_div(s.N, PairTile::kCols),
                  tiles_m = ceil_div(s.M, PairTile::kRows);
    tile_n = blockIdx.x % tiles_n, tile_m = blockIdx.x / tiles_n % tiles_m;
    g = blockIdx.x / (tiles_n * tiles_m);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = static_cast<int>(tile_m) * PairTile::kRows + warp * 16 * kPairMT + lane / 4;
    col = static_cast<int>(tile_n) * PairTile::kCols + lane % 4 * 2;
  }
  __device__ int row_of(int m, int i) const { return row + 16 * m + i / 2 * 8; }
  __device__ int col_of(int n, int i) const { return col + 8 * n + i % 2; }
};

// body(m, n, i) for each accumulator.
template <typename Body>
__device__ inline void each(const Body& body) {
#pragma unroll
  for (int m = 0; m < kPairMT; ++m) {
#pragma unroll
    for (int n = 0; n < kPairNT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(m, n, i);
    }
  }
}

// Raw products, 0 outside.
__device__ inline void load_dots(PairAcc& x, const Scores& s, const PairPlace& at) {
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int m = k / 2, i = k % 2 * 2, row = at.row_of(m, i);
    const float* from = s.dots + (at.g * s.M + row) * s.pitch;
#pragma unroll
    for (int n = 0; n < kPairNT; ++n) {
      const int col = at.col_of(n, 0);
      float2 v = make_float2(0.0f, 0.0f);
      if (row < s.M && col < s.N) v = *reinterpret_cast<const float2*>(from + col);
      x[m][n][i] = v.x, x[m][n][i + 1] = col + 1 < s.N ? v.y : 0.0f;
    }
  }
}

// Factors of a lane's rows, 0 outside.
__device__ inline void load_scale(float (&scale)[kPairMT][2], const Scores& s,
                                  const PairPlace& at) {
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int row = at.row_of(k / 2, k % 2 * 2);
    const int64_t from = at.g * s.scale_stride[0] + row * s.scale_stride[1];
    scale[k / 2][k % 2] = row < s.M ? s.scale[from] : 0.0f;
  }
}

__device__ inline int64_t index_at(const Indices& t, int64_t g, int64_t i) {
  return t.data[g * t.stride[0] + i * t.stride[1]];
}

// pos: targets. out: outside the denominator, or outside the matrix.
__device__ inline void find_matches(PairBits& pos, PairBits& out, const Scores& s,
                                    const PairPlace& at) {
  const int m0 = static_cast<int>(at.tile_m) * PairTile::kRows;
  const int n0 = static_cast<int>(at.tile_n) * PairTile::kCols;
  int64_t target[kPairMT][2], id[kPairMT][2];
  bool look = m0 + PairTile::kRows > s.M || n0 + PairTile::kCols > s.N || s.ids_x.data;
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int m = k / 2, row = at.row_of(m, k % 2 * 2);
    const bool in = row < s.M;
    target[m][k % 2] = in && s.positives.data ? index_at(s.positives, at.g, row) : -1;
    id[m][k % 2] = in && s.ids_x.data ? index_at(s.ids_x, at.g, row) : 0;
    look = look || (target[m][k % 2] >= n0 && target[m][k % 2] < n0 + PairTile::kCols);
  }
#pragma unroll
  for (int m = 0; m < kPairMT; ++m) pos.word[m] = out.word[m] = 0;
  if (!__any_sync(~0u, look)) return;
#pragma unroll
  for (int n = 0; n < kPairNT; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int col = at.col_of(n, c);
      const int64_t id_y = s.ids_x.data && col < s.N ? index_at(s.ids_y, at.g, col) : 0;
#pragma unroll
      for (int k = 0; k < 2 * kPairMT; ++k) {
        const int m = k / 2, h = k % 2;
        const bool outside = at.row_of(m, 2 * h) >= s.M || col >= s.N;
        const bool hit = target[m][h] == col, same = s.ids_x.data && id[m][h] == id_y;
        const bool is_pos = !outside && (hit || (same && !s.ignore));
        const bool is_out = outside || (same && s.ignore && !hit);
        pos.word[m] |= uint32_t{is_pos} << (n * 4 + 2 * h + c);
        out.word[m] |= uint32_t{is_out} << (n * 4 + 2 * h + c);
      }
    }
  }
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Reduces value(m, n, i) over the columns: by lane's rows, the same in the four lanes of a quad.
template <typename Op, typename Value>
__device__ inline void fold_rows(float (&r)[kPairMT][2], const Op& op, const Value& value) {
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int m = k / 2, h = k % 2 * 2;
    float v = op(value(m, 0, h), value(m, 0, h + 1));
#pragma unroll
    for (int n = 1; n < kPairNT; ++n) v = op(v, op(value(m, n, h), value(m, n, h + 1)));
    v = op(v, __shfl_xor_sync(~0u, v, 1));
    r[m][k % 2] = op(v, __shfl_xor_sync(~0u, v, 2));
  }
}

// A lane reduces kKeep of the entries it has with those of its neighbour, and gives the others
// away.
template <int kKeep, typename Op>
__device__ inline void halve(float (&v)[2 * kPairNT], const Op& op) {
  const bool upper = threadIdx.x & 2 * kKeep;
#pragma unroll
  for (int j = 0; j < kKeep; ++j) {
    const float keep = upper ? v[kKeep + j] : v[j], give = upper ? v[j] : v[kKeep + j];
    v[j] = op(keep, __shfl_xor_sync(~0u, give, 2 * kKeep));
  }
}

using ColumnRoom = float[PairTile::kWarps][PairTile::kCols];

// Reduces value(m, n, i) over the rows of the block; thread t gets that of column t % kCols. In a
// warp each step halves the columns that a lane keeps, so that lane l ends with 2l and 2l + 1.
template <typename Op, typename Value>
__device__ inline float fold_columns(ColumnRoom& room, const Op& op, const Value& value) {
  const int lane = threadIdx.x % 32;
  float v[2 * kPairNT];
#pragma unroll
  for (int j = 0; j < 2 * kPairNT; ++j) {
    const int n = j / 2, c = j % 2;
    v[j] = op(value(0, n, c), value(0, n, c + 2));
#pragma unroll
    for (int m = 1; m < kPairMT; ++m) v[j] = op(v[j], op(value(m, n, c), value(m, n, c + 2)));
  }
  halve<8>(v, op);
  halve<4>(v, op);
  halve<2>(v, op);
  __syncthreads();  // orders the reads of an earlier call before these writes
  *reinterpret_cast<float2*>(&room[threadIdx.x / 32][2 * lane]) = make_float2(v[0], v[1]);
  __syncthreads();  // orders these writes before their reads
  const int col = threadIdx.x % PairTile::kCols;
  float r = room[0][col];
#pragma unroll
  for (int w = 1; w < PairTile::kWarps; ++w) r = op(r, room[w][col]);
  return r;
}

// Two adjacent elements of a row of w, the first inside.
template <typename T>
__device__ inline void store_pair(T* to, float a, float b) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(a, b);
  } else {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  }
}

// w = value(m, n, i) inside.
template <typename T, typename Value>
__device__ inline void store_w(void* w, const Scores& s, const PairPlace& at, const Value& value) {
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int m = k / 2, i = k % 2 * 2, row = at.row_of(m, i);
    T* to = static_cast<T*>(w) + (at.g * s.M + row) * s.pitch;
#pragma unroll
    for (int n = 0; n < kPairNT; ++n) {
      const int col = at.col_of(n, 0);
      if (row < s.M && col < s.N) store_pair<T>(to + col, value(m, n, i), value(m, n, i + 1));
    }
  }
}

// A value of each of a lane's rows to part[row], by one lane of the quad.
__device__ inline void store_rows(float* part, const Scores& s, const PairPlace& at,
                                  const float (&r)[kPairMT][2]) {
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
    const int row = at.row_of(k / 2, k % 2 * 2);
    if (row < s.M) part[row] = r[k / 2][k % 2];
  }
}

}  // namespace fmm::cuda
