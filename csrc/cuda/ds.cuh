// One tile of the backward: probabilities from lse, ds and the dropped-out probabilities, for the
// softmax over a row (b's tokens are keys), over a column (a's are keys), or both from one exp.
#pragma once

#include "softmax.cuh"
#include "sources.cuh"
#include "wgmma.cuh"

namespace fmm::cuda {

// Statistics of a lane's two rows of a. Those not kHeld for many tiles leave what is needed late in
// memory.
template <bool kHeld>
struct RowStats {
  float hi[2], lo[2], held[2], up[2];
  uint32_t kept;  // as keys: a bit a row; bit 2: the whole warp's
  float far;

  __device__ RowStats(const Stream& a, const Keep& keys, int head, int row0, int heads) {
    far = a.stats.far[head * (a.stats.padded >> 4) + (row0 >> 4)];
    const float* at = start(a, head, row0);
    const int64_t next = int64_t{heads} * a.stats.padded;  // statistic
    read(hi, at), read(lo, at += next), read(held, at += next), read(up, at += next);
    static_assert(kHi == 0 && kLo == 1 && kDelta == 2 && kUp == 3);
    kept = 7;
    if (keys.data || row0 + 16 > a.rows) {
      kept = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row0 + threadIdx.x % 32 / 4 + 8 * r;
        kept |= uint32_t{row < a.rows && keys.at(row)} << r;
      }
      kept |= uint32_t{__all_sync(~0u, kept == 3) != 0} << 2;
    }
  }
  // Where the lane's first row of the first statistic lies.
  static __device__ const float* start(const Stream& a, int head, int row0) {
    return a.stats.data + head * a.stats.padded + row0 + threadIdx.x % 32 / 4;
  }
  __device__ void delta(float (&x)[2], const Stream& a, int head, int row0, int heads) const {
    if constexpr (kHeld) {
      x[0] = held[0], x[1] = held[1];
    } else {
      read(x, start(a, head, row0) + int64_t{heads} * kDelta * a.stats.padded);
    }
  }
  __device__ bool keep(int r) const { return kept >> r & 1; }
  __device__ bool all() const { return kept >> 2; }
  static __device__ void read(float (&x)[2], const float* at) { x[0] = at[0], x[1] = at[8]; }
};

// Starts the copy of the statistics of rows [n0, n0 + kCols) to [kStats, kCols] floats.
template <int kCols, int kThreads>
__device__ inline void load_stats(uint32_t to, const Stream& b, int head, int n0, int heads) {
  static_assert(kStatRows % kCols == 0 && kStats * kCols / 4 <= kThreads);
  const int stat = threadIdx.x / (kCols / 4), at = threadIdx.x % (kCols / 4) * 4;
  if (stat >= kStats) return;
  const float* from = b.stats.data + (int64_t{heads} * stat + head) * b.stats.padded;
  cp_async16(to + threadIdx.x * 16, from + n0 + at, 16);
}

// s [16, 8 * kNT] of one warp into ds (before the clamp's gate) and pf_row, pf_col, which are the
// probabilities after dropout. `cols`: b's statistics in shared memory.
// By: how the warps multiply.
//   ds = p_row * (do_a @ v_b.T - delta_a) + p_col * (v_a @ do_b.T - delta_b)
// Where one key takes all of a softmax its o is v, and the difference 0: delta is a product of the
// same order, see delta_kernel, and nothing is added before the subtraction.
template <bool kRow, bool kCol, int kStatCols, typename By, typename T, int kNT, int kWidth,
          bool kHeld>
__device__ inline void ds_tile(float (&ds)[1][kNT][4], float (&pf_row)[1][kNT][4],
                               float (&pf_col)[1][kNT][4], uint64_t& passes, const Attention& all,
                               const Pair& p, int b, int h, const Tiles<T, kWidth>& ta,
                               const Tiles<T, kWidth>& tb, const Lanes<Tile<T, kWidth>>& lanes,
                               uint32_t cols, const RowStats<kHeld>& a, int local0, int row0,
                               int n0) {
  constexpr int kStride = kStatCols * sizeof(float);
  const int lane = threadIdx.x % 32;
  const int heads = static_cast<int>(all.B * all.H), head = b * static_cast<int>(all.H) + h;
  const float unit = unit_of(p);
  cols += lane % 4 * 8;
  // The products with v: of gradients of row results, of column results.
  float dp[1][kNT][4], delta_a[2];
  const auto start = [&](auto row) {
    By::start(dp, row ? ta.d_o : ta.v, local0, row ? tb.v : tb.d_o, lanes);
  };
  // Where warps multiply together the first of them goes on while probabilities are computed.
  constexpr std::bool_constant<kRow> first;
  By::start_scores(ds, ta.qk, local0, tb.qk, lanes);
  if constexpr (By::kTogether) start(first);
  By::template wait<1>(ds);
  passes = s_tile(ds[0], p, b, h, row0, n0);
  if constexpr (kRow) {
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      const int r = i % 4 / 2;
      pf_row[0][i / 4][i % 4] = exp2_fast(fmaf(ds[0][i / 4][i % 4], unit, -a.hi[r]) - a.lo[r]);
    }
  }
  float far = kRow && kCol ? 0.0f : kInf;
  if constexpr (kRow && kCol) {
    const float* far_b = p.b.stats.far + head * (p.b.stats.padded >> 4) + (n0 >> 4);
#pragma unroll
    for (int i = 0; i < kNT / 2; ++i) far = fmaxf(far, far_b[i]);
    far += a.far;
  }
  // p_col = p_row * 2^(lse of the row - lse of the column) is off by less than 2^-30 where p_row
  // underflows, if the two lie within 2^96.
  if (far <= 96.0f) {
    unroll<kNT>([&](auto n) {
      const float2 down = load_shared2<kDown * kStride + n * 32>(cols);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pf_col[0][n][i] = pf_row[0][n][i] * a.up[i / 2] * (i % 2 ? down.y : down.x);
      }
    });
  } else if constexpr (kCol) {
    unroll<kNT>([&](auto n) {
      const float2 hi = load_shared2<kHi * kStride + n * 32>(cols);
      const float2 lo = load_shared2<kLo * kStride + n * 32>(cols);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = fmaf(ds[0][n][i], unit, i % 2 ? -hi.y : -hi.x);
        pf_col[0][n][i] = exp2_fast(x - (i % 2 ? lo.y : lo.x));
      }
    });
  }

  uint64_t on;
  clear(ds);
  if constexpr (kRow) {
    const ColumnBits<kNT> kept(Keep(p.b.keep, b), n0, p.b.rows);
    if constexpr (!By::kTogether) start(std::true_type());
    a.delta(delta_a, p.a, head, row0, heads);
    By::template wait<0>(dp);
    if (all.dropout.on) {
      on = drop_bits<kNT>(all.dropout, p.drop_a, p.flip, head, row0, n0);
      drop_tile(dp[0], on, all.dropout.factor);
    }
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      const float less = dp[0][i / 4][i % 4] - delta_a[i % 4 / 2];
      ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] * less;
    }
    if (!kept.all) {
#pragma unroll
      for (int i = 0; i < kNT * 4; ++i) {
        if (!kept.has(i / 4, i % 4)) ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] = 0.0f;
      }
    }
    if (all.dropout.on) drop_tile(pf_row[0], on, all.dropout.factor);
  }
  if constexpr (kCol) {
    const ColumnBits<kNT> inside(Keep(), n0, p.b.rows);
    if constexpr (kRow || !By::kTogether) start(std::false_type());
    By::template wait<0>(dp);
    if (all.dropout.on) {
      on = drop_bits<kNT>(all.dropout, p.drop_b, p.flip, head, row0, n0);
      drop_tile(dp[0], on, all.dropout.factor);
    }
    unroll<kNT>([&](auto n) {
      const float2 delta = load_shared2<kDelta * kStride + n * 32>(cols);
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[0][n][i] -= i % 2 ? delta.y : delta.x;
    });
    if (!inside.all || !a.all()) {
#pragma unroll
      for (int i = 0; i < kNT * 4; ++i) {
        if (!inside.has(i / 4, i % 4) || !a.keep(i % 4 / 2)) {
          dp[0][i / 4][i % 4] = pf_col[0][i / 4][i % 4] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      ds[0][i / 4][i % 4] += pf_col[0][i / 4][i % 4] * dp[0][i / 4][i % 4];
    }
    if (all.dropout.on) drop_tile(pf_col[0], on, all.dropout.factor);
  }
}

}  // namespace fmm::cuda
