// One tile of the backward: probabilities from lse, ds and the dropped-out probabilities, for the
// softmax over a row (b's tokens are keys), over a column (a's are keys), or both from one exp.
#pragma once

#include "softmax.cuh"
#include "sources.cuh"

namespace fmm::cuda {

// A finite number in base 2 near the lse of a head.
__device__ inline float centre_of(const Pair& p, int head) {
  if (p.centre == nullptr) return 0.0f;
  const float c = static_cast<float>(p.centre[head * p.centre_stride]) * kLog2e;
  return fabsf(c) < 1e30f ? c : 0.0f;
}

// Statistics of a lane's two rows of a.
struct RowStats {
  float hi[2], lo[2], delta[2], c[2], up[2], down[2];
  uint32_t kept;  // as keys: a bit a row; bit 2: the whole warp's
  float far;

  __device__ RowStats(const Stream& a, const Keep& keys, int head, int row0, float centre,
                      int heads) {
    // A tall tile may end beyond the padding; what its last warps read is not used.
    const int from = min(row0, static_cast<int>(a.stats.padded) - 16);
    far = a.stats.far[head * (a.stats.padded >> 4) + (from >> 4)];
    const float* at = start(a, head, from);
    const int64_t next = int64_t{heads} * a.stats.padded;  // statistic
    read(hi, at), read(lo, at += next), read(delta, at += next);
    read(up, at += 2 * next), read(down, at += next);
    static_assert(kHi == 0 && kLo == 1 && kDelta == 2 && kUp == 4 && kDown == 5);
    c[0] = 0.5f * (hi[0] + centre), c[1] = 0.5f * (hi[1] + centre);
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
//   ds = p_row * (do_a @ v_b.T - delta_a) + p_col * (v_a @ do_b.T - delta_b)
template <bool kRow, bool kCol, typename T, int kNT, int kWidth>
__device__ inline void ds_tile(float (&ds)[1][kNT][4], float (&pf_row)[1][kNT][4],
                               float (&pf_col)[1][kNT][4], uint64_t (&passes)[1],
                               const Attention& all, const Pair& p, int b, int h,
                               const Tiles<T, kWidth>& ta, const Tiles<T, kWidth>& tb,
                               const Lanes<Tile<T, kWidth>>& lanes, uint32_t cols,
                               const RowStats& a, int local0, int row0, int n0) {
  constexpr int kStride = kNT * 8 * sizeof(float);
  const int lane = threadIdx.x % 32;
  const int heads = static_cast<int>(all.B * all.H), head = b * static_cast<int>(all.H) + h;
  const float unit = unit_of(p);
  cols += lane % 4 * 8;
  clear(ds);
  dot_scores(ds, ta.qk, local0, tb.qk, lanes);
  s_tile(ds, p, b, h, row0, n0, passes);
  float far = a.far;
  if constexpr (kRow && kCol) {
    const float* far_b = p.b.stats.far + head * (p.b.stats.padded >> 4) + (n0 >> 4);
#pragma unroll
    for (int i = 0; i < kNT / 2; ++i) far = fmaxf(far, far_b[i]);
  }
  // One exp for both while every factor stays within 2^43.
  if (kRow && kCol && far <= 43.0f) {
    unroll<kNT>([&](auto n) {
      const float2 half = load_shared2<kHalf * kStride + n * 32>(cols);
      const float2 up = load_shared2<kUp * kStride + n * 32>(cols);
      const float2 down = load_shared2<kDown * kStride + n * 32>(cols);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e = exp2_fast(fmaf(ds[0][n][i], unit, -a.c[i / 2]) - (i % 2 ? half.y : half.x));
        pf_row[0][n][i] = e * a.down[i / 2] * (i % 2 ? up.y : up.x);
        pf_col[0][n][i] = e * a.up[i / 2] * (i % 2 ? down.y : down.x);
      }
    });
  } else {
    float row_hi[2] = {a.hi[0], a.hi[1]}, row_lo[2] = {a.lo[0], a.lo[1]};
    if constexpr (kRow && kCol) {  // rare: not kept in registers
      const float* at = RowStats::start(p.a, head, row0);
      RowStats::read(row_hi, at), RowStats::read(row_lo, at + int64_t{heads} * p.a.stats.padded);
    }
    unroll<kNT>([&](auto n) {
      if constexpr (kRow) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pf_row[0][n][i] = exp2_fast(fmaf(ds[0][n][i], unit, -row_hi[i / 2]) - row_lo[i / 2]);
        }
      }
      if constexpr (kCol) {
        const float2 hi = load_shared2<kHi * kStride + n * 32>(cols);
        const float2 lo = load_shared2<kLo * kStride + n * 32>(cols);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = fmaf(ds[0][n][i], unit, i % 2 ? -hi.y : -hi.x);
          pf_col[0][n][i] = exp2_fast(x - (i % 2 ? lo.y : lo.x));
        }
      }
    });
  }

  uint64_t on[1];
  float dp[1][kNT][4];
  // Products with v start from -delta, unless dropout comes between.
  const float sign = all.dropout.on ? 0.0f : -1.0f;
  clear(ds);
  if constexpr (kRow) {
    const ColumnBits<kNT> kept(Keep(p.b.keep, b), n0, p.b.rows);
    const float from[2] = {sign * a.delta[0], sign * a.delta[1]};
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) dp[0][i / 4][i % 4] = from[i % 4 / 2];
    dot_tile(dp, ta.d_o, local0, tb.v, lanes);
    if (all.dropout.on) {
      drop_bits<1, kNT>(on, all.dropout, p.drop_a, p.flip, head, row0, n0);
      drop_tile(dp[0], on[0], all.dropout.factor);
#pragma unroll
      for (int i = 0; i < kNT * 4; ++i) dp[0][i / 4][i % 4] -= a.delta[i % 4 / 2];
    }
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] * dp[0][i / 4][i % 4];
    }
    if (!kept.all) {
#pragma unroll
      for (int i = 0; i < kNT * 4; ++i) {
        if (!kept.has(i / 4, i % 4)) ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] = 0.0f;
      }
    }
    if (all.dropout.on) drop_tile(pf_row[0], on[0], all.dropout.factor);
  }
  if constexpr (kCol) {
    const ColumnBits<kNT> inside(Keep(), n0, p.b.rows);
    // The same with the columns' delta.
    unroll<kNT>([&](auto n) {
      const float2 delta = load_shared2<kDelta * kStride + n * 32>(cols);
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[0][n][i] = sign * (i % 2 ? delta.y : delta.x);
    });
    dot_tile(dp, ta.v, local0, tb.d_o, lanes);
    if (all.dropout.on) {
      drop_bits<1, kNT>(on, all.dropout, p.drop_b, p.flip, head, row0, n0);
      drop_tile(dp[0], on[0], all.dropout.factor);
      unroll<kNT>([&](auto n) {
        const float2 delta = load_shared2<kDelta * kStride + n * 32>(cols);
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[0][n][i] -= i % 2 ? delta.y : delta.x;
      });
    }
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
    if (all.dropout.on) drop_tile(pf_col[0], on[0], all.dropout.factor);
  }
}

}  // namespace fmm::cuda
