// One tile of the backward: probabilities from lse, ds and the dropped-out probabilities, for the
// softmax over a row (b's tokens are keys), over a column (a's are keys), or both from one exp.
#pragma once

#include "softmax.cuh"

namespace fmm::cuda {

// A finite number in base 2 near the lse of a head.
__device__ inline float centre_of(const Pair& p, int64_t head) {
  if (p.centre == nullptr) return 0.0f;
  const float c = static_cast<float>(p.centre[head * p.centre_stride]) * kLog2e;
  return fabsf(c) < 1e30f ? c : 0.0f;
}

// Statistics of a lane's two rows of a.
struct RowStats {
  float hi[2], lo[2], delta[2], c[2], up[2], down[2];
  bool keep[2], all;  // as keys; all: of the whole warp
  float far;

  __device__ RowStats(const Stream& a, const Keep& kept, int64_t head, int row0, float centre,
                      int64_t heads) {
    const Stats& st = a.stats;
    const int lane = threadIdx.x % 32;
    const int64_t step = heads * st.padded, base = head * st.padded + row0 + lane / 4;
    far = st.far[(head * st.padded + row0) / 16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* at = st.data + base + 8 * r;
      hi[r] = at[kHi * step], lo[r] = at[kLo * step], delta[r] = at[kDelta * step];
      up[r] = at[kUp * step], down[r] = at[kDown * step];
      c[r] = 0.5f * (hi[r] + centre);
      const int row = row0 + lane / 4 + 8 * r;
      keep[r] = row < a.rows && kept.at(row);
    }
    all = __all_sync(~0u, keep[0] && keep[1]);
  }
};

// Starts the copy of the statistics of rows [n0, n0 + kCols) to [kStats, kCols] floats.
template <int kCols, int kThreads>
__device__ inline void load_stats(uint32_t to, const Stream& b, int64_t head, int n0,
                                  int64_t heads) {
  static_assert(kStatRows % kCols == 0);
  for (int i = threadIdx.x; i < kStats * kCols / 4; i += kThreads) {
    const int stat = i / (kCols / 4), at = i % (kCols / 4) * 4;
    const int64_t row = (stat * heads + head) * b.stats.padded + n0 + at;
    cp_async16(to + i * 16, b.stats.data + row, 16);
  }
}

__device__ inline float2 load_shared2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// A tile of a's rows: qk, d_o (row softmax) and v (column softmax); and the same of b.
template <typename T, int kWidth>
struct Tiles {
  Tile<T, kWidth> qk, v, d_o;
};

// Loads kRows rows of a stream: qk, v if its tokens are keys, d_o if they are queries. What is a
// key alone may hold anything where it is masked.
template <int kRows, int kThreads, bool kV, bool kGrad, typename T, int kWidth>
__device__ inline void load_tiles(const Tiles<T, kWidth>& t, const Stream& s, int64_t width,
                                  int64_t b, int64_t h, int row0) {
  const Keep keys = kGrad ? Keep() : Keep(s.keep, b);
  load_tile<kRows, kThreads>(t.qk, Matrix<T>(s.qk, b, h, s.rows, width), row0, keys);
  if constexpr (kV) {
    const Matrix<T> v(s.v, b, h, s.rows, s.width_v);
    load_tile<kRows, kThreads>(t.v, v, row0, Keep(s.keep, b));
  }
  if constexpr (kGrad) {
    const Matrix<T> d_o(s.d_o, b, h, s.rows, s.width_o);
    load_tile<kRows, kThreads>(t.d_o, d_o, row0, Keep());
  }
}

// s [16, 8 * kNT] of one warp into ds (before the clamp's gate) and pf_row, pf_col, which are the
// probabilities after dropout. `cols`: b's statistics in shared memory.
//   ds = p_row * (do_a @ v_b.T - delta_a) + p_col * (v_a @ do_b.T - delta_b)
template <bool kRow, bool kCol, typename T, int kNT, int kWidth>
__device__ inline void ds_tile(float (&ds)[1][kNT][4], float (&pf_row)[1][kNT][4],
                               float (&pf_col)[1][kNT][4], uint64_t (&passes)[1],
                               const Attention& all, const Pair& p, int64_t b, int64_t h,
                               const Tiles<T, kWidth>& ta, const Tiles<T, kWidth>& tb,
                               uint32_t cols, const RowStats& a, float centre, int local0, int row0,
                               int n0) {
  constexpr uint32_t kStride = kNT * 8 * sizeof(float);
  const int lane = threadIdx.x % 32;
  const int64_t head = b * all.H + h;
  const float unit = unit_of(p);
  cols += lane % 4 * 8;
  clear(ds);
  dot_scores(ds, ta.qk, local0, tb.qk);
  s_tile(ds, p, b, h, row0, n0, passes);
  float far = a.far;
  if constexpr (kRow && kCol) {
#pragma unroll
    for (int i = 0; i < kNT * 8; i += 16) {
      far = fmaxf(far, p.b.stats.far[(head * p.b.stats.padded + n0 + i) / 16]);
    }
  }
  // One exp for both while every factor stays within 2^43.
  if (kRow && kCol && far <= 43.0f) {
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      const float2 half = load_shared2(cols + kHalf * kStride + n * 32);
      const float2 up = load_shared2(cols + kUp * kStride + n * 32);
      const float2 down = load_shared2(cols + kDown * kStride + n * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e = exp2_fast(fmaf(ds[0][n][i], unit, -a.c[i / 2]) - (i % 2 ? half.y : half.x));
        pf_row[0][n][i] = e * a.down[i / 2] * (i % 2 ? up.y : up.x);
        pf_col[0][n][i] = e * a.up[i / 2] * (i % 2 ? down.y : down.x);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      if constexpr (kRow) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pf_row[0][n][i] = exp2_fast(fmaf(ds[0][n][i], unit, -a.hi[i / 2]) - a.lo[i / 2]);
        }
      }
      if constexpr (kCol) {
        const float2 hi = load_shared2(cols + kHi * kStride + n * 32);
        const float2 lo = load_shared2(cols + kLo * kStride + n * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = fmaf(ds[0][n][i], unit, i % 2 ? -hi.y : -hi.x);
          pf_col[0][n][i] = exp2_fast(x - (i % 2 ? lo.y : lo.x));
        }
      }
    }
  }

  uint64_t on[1];
  float dp[1][kNT][4];
  clear(ds);
  if constexpr (kRow) {
    const ColumnBits<kNT> kept(Keep(p.b.keep, b), n0, p.b.rows);
    clear(dp);
    dot_tile(dp, ta.d_o, local0, tb.v);
    if (all.dropout.on) {
      drop_bits<1, kNT>(on, all.dropout, p.drop_a, p.flip, head, row0, n0);
      drop_tile(dp[0], on[0], all.dropout.factor);
    }
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] * (dp[0][i / 4][i % 4] - a.delta[i % 4 / 2]);
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
    clear(dp);
    dot_tile(dp, ta.v, local0, tb.d_o);
    if (all.dropout.on) {
      drop_bits<1, kNT>(on, all.dropout, p.drop_b, p.flip, head, row0, n0);
      drop_tile(dp[0], on[0], all.dropout.factor);
    }
    const bool whole = inside.all && a.all;
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      const float2 delta = load_shared2(cols + kDelta * kStride + n * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = pf_col[0][n][i] * (dp[0][n][i] - (i % 2 ? delta.y : delta.x));
        ds[0][n][i] += whole || (inside.has(n, i) && a.keep[i / 2]) ? x : 0.0f;
      }
    }
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kNT * 4; ++i) {
        if (!inside.has(i / 4, i % 4) || !a.keep[i % 4 / 2]) pf_col[0][i / 4][i % 4] = 0.0f;
      }
    }
    if (all.dropout.on) drop_tile(pf_col[0], on[0], all.dropout.factor);
  }
}

}  // namespace fmm::cuda
