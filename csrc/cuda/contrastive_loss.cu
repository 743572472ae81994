// contrastive_loss on a chunk of products: statistics of each tile's rows and columns, which merge
// in order, and w = scale * ds / peak for the two products of the backward. Positives stay apart
// from negatives throughout. No atomics.
#include "pair_tile.cuh"

namespace fmm::cuda {
namespace {

__device__ inline float exp_of(float s, float top) { return exp2_fast((s - top) * kLog2e); }

// Where a statistic of problem g lies.
__device__ inline float* part_at(float* part, int64_t tile, int stat, const Scores& s, int64_t g,
                                 int64_t L) {
  return part + ((tile * kPartStats + stat) * s.G + g) * L;
}

// Maximum and sum of exp(s - maximum) over the entries where in(m, n, i), by rows.
template <typename In>
__device__ inline void rows_lse(float* top_to, float* sum_to, const PairAcc& s, const Scores& a,
                                const PairPlace& at, const In& in) {
  float top[kPairMT][2], sum[kPairMT][2];
  fold_rows(top, Most(), [&](int m, int n, int i) { return in(m, n, i) ? s[m][n][i] : -kInf; });
  fold_rows(sum, Add(), [&](int m, int n, int i) {
    return in(m, n, i) ? exp_of(s[m][n][i], finite_or(top[m][i / 2], 0.0f)) : 0.0f;
  });
  store_rows(top_to, a, at, top);
  store_rows(sum_to, a, at, sum);
}

// The same by columns; returned to the thread of each column.
template <typename In>
__device__ inline float2 columns_lse(ColumnRoom& room, float (&tops)[PairTile::kCols],
                                     const PairAcc& s, const In& in) {
  const float top = fold_columns(
      room, Most(), [&](int m, int n, int i) { return in(m, n, i) ? s[m][n][i] : -kInf; });
  if (threadIdx.x < PairTile::kCols) tops[threadIdx.x] = finite_or(top, 0.0f);
  __syncthreads();  // orders the maxima before their reads
  const int col = threadIdx.x % 4 * 2;
  const float sum = fold_columns(room, Add(), [&](int m, int n, int i) {
    return in(m, n, i) ? exp_of(s[m][n][i], tops[8 * n + col + i % 2]) : 0.0f;
  });
  return make_float2(top, sum);
}

__global__ void __launch_bounds__(PairTile::kThreads)
    contrastive_parts_kernel(const __grid_constant__ ContrastiveParts p) {
  __shared__ ColumnRoom room;
  __shared__ float tops[PairTile::kCols];
  const Scores& a = p.scores;
  const PairPlace at(a);
  PairAcc s;
  float scale[kPairMT][2];
  PairBits pos, out;
  load_dots(s, a, at);
  load_scale(scale, a, at);
  each([&](int m, int n, int i) { s[m][n][i] *= scale[m][i / 2]; });
  find_matches(pos, out, a, at);
  uint32_t some = 0;
#pragma unroll
  for (int m = 0; m < kPairMT; ++m) some |= pos.word[m];
  const bool positives = __syncthreads_or(some != 0);

  const auto negative = [&](int m, int n, int i) { return !pos.has(m, n, i) && !out.has(m, n, i); };
  const auto positive = [&](int m, int n, int i) { return pos.has(m, n, i); };
  const auto value = [&](int m, int n, int i) { return out.has(m, n, i) ? 0.0f : s[m][n][i]; };
  const auto one = [&](int m, int n, int i) { return out.has(m, n, i) ? 0.0f : 1.0f; };
  const auto value_pos = [&](int m, int n, int i) { return pos.has(m, n, i) ? s[m][n][i] : 0.0f; };
  const auto one_pos = [&](int m, int n, int i) { return pos.has(m, n, i) ? 1.0f : 0.0f; };

  if (p.x) {
    const auto to = [&](int stat) { return part_at(p.x, at.tile_n, stat, a, at.g, a.M); };
    float r[kPairMT][2];
    rows_lse(to(kNegTop), to(kNegSum), s, a, at, negative);
    fold_rows(r, Add(), value);
    store_rows(to(kTotal), a, at, r);
    fold_rows(r, Add(), one);
    store_rows(to(kCount), a, at, r);
    if (positives) {
      rows_lse(to(kPosTop), to(kPosSum), s, a, at, positive);
      fold_rows(r, Add(), value_pos);
      store_rows(to(kSumPos), a, at, r);
      fold_rows(r, Add(), one_pos);
      store_rows(to(kCountPos), a, at, r);
    } else {
#pragma unroll
      for (int k = 0; k < 2 * kPairMT; ++k) r[k / 2][k % 2] = 0.0f;
      for (int stat : {kPosTop, kPosSum, kSumPos, kCountPos}) store_rows(to(stat), a, at, r);
    }
  }
  if (p.y) {
    const float2 neg = columns_lse(room, tops, s, negative);
    const float total = fold_columns(room, Add(), value);
    const float count = fold_columns(room, Add(), one);
    float2 lse_pos = make_float2(0.0f, 0.0f);
    float sum_pos = 0.0f, count_pos = 0.0f;
    if (positives) {
      lse_pos = columns_lse(room, tops, s, positive);
      sum_pos = fold_columns(room, Add(), value_pos);
      count_pos = fold_columns(room, Add(), one_pos);
    }
    const int64_t col = at.tile_n * PairTile::kCols + threadIdx.x;
    if (threadIdx.x < PairTile::kCols && col < a.N) {
      const float all[kPartStats] = {neg.x,   neg.y,     lse_pos.x, lse_pos.y,
                                     sum_pos, count_pos, total,     count};
#pragma unroll
      for (int k = 0; k < kPartStats; ++k) part_at(p.y, at.tile_m, k, a, at.g, a.N)[col] = all[k];
    }
  }
}

// log(exp(a) + exp(b))
__device__ inline double log_add(double a, double b) {
  const double top = a > b ? a : b;
  return top == -kInf ? b + a : top + log(exp(a - top) + exp(b - top));
}

// A thread merges all parts of one row, in order.
__global__ void __launch_bounds__(kMergeThreads)
    contrastive_merge_kernel(const __grid_constant__ Merge a) {
  const int64_t at = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (at >= a.G * a.L) return;
  const int64_t step = a.G * a.L;
  const auto part = [&](int64_t tile, int stat) {
    return a.part[(tile * kPartStats + stat) * step + at];
  };
  double r[6];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float top = -kInf;
    for (int64_t t = 0; t < a.tiles; ++t) {
      if (part(t, 2 * k + 1) != 0.0f) top = fmaxf(top, part(t, 2 * k));
    }
    double sum = 0.0;
    for (int64_t t = 0; t < a.tiles; ++t) {
      const float share = part(t, 2 * k + 1);
      if (share != 0.0f)
        sum += double{share} * double{exp_of(part(t, 2 * k), finite_or(top, 0.0f))};
    }
    r[k] = sum == 0.0 ? -kInf : finite_or(top, 0.0f) + log(sum);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    double sum = 0.0;
    for (int64_t t = 0; t < a.tiles; ++t) sum += part(t, kSumPos + k);
    r[2 + k] = sum;
  }
  double* to = a.stats + at / a.L * a.stride[1] + at % a.L;
#pragma unroll
  for (int k = 0; k < 6; ++k) {
    double& v = to[k * a.stride[0]];
    v = !a.join ? r[k] : k < 2 ? log_add(v, r[k]) : v + r[k];
  }
}

// Coefficients of the rows or columns of a tile in fp32, lse as a sum of two.
enum Coef { kHigh, kLow, kWeight, kTarget, kUniform, kSingle, kCoefs };

template <int kRows>
__device__ inline void load_coefficients(float (&to)[kCoefs][kRows], const Coefficients& c,
                                         int64_t g, int64_t first, int64_t end) {
  for (int i = threadIdx.x; i < kRows; i += PairTile::kThreads) {
    const double* from = c.data + g * c.stride[1] + first + i;
    const bool in = first + i < end;
    const double lse = in ? from[0] : 0.0;
    const float high = static_cast<float>(lse);
    to[kHigh][i] = high, to[kLow][i] = fabsf(high) < kInf ? static_cast<float>(lse - high) : 0.0f;
#pragma unroll
    for (int k = kWeight; k < kCoefs; ++k) {
      to[k][i] = in ? static_cast<float>(from[(k - 1) * c.stride[0]]) : 0.0f;
    }
  }
}

// One direction's ds = weight * ((p at negatives, p - target or the given value at positives) - u).
__device__ inline float ds_of(float s, const float (&c)[kCoefs], bool pos) {
  const float p = exp2_fast(((s - c[kHigh]) - c[kLow]) * kLog2e);
  const float at_pos = c[kSingle] <= 1.0f ? c[kSingle] : p - c[kTarget];
  return c[kWeight] == 0.0f ? 0.0f : c[kWeight] * ((pos ? at_pos : p) - c[kUniform]);
}

template <typename T>
__global__ void __launch_bounds__(PairTile::kThreads)
    contrastive_ds_kernel(const __grid_constant__ ContrastiveDs p) {
  __shared__ float rows[kCoefs][PairTile::kRows], cols[kCoefs][PairTile::kCols];
  const Scores& a = p.scores;
  const PairPlace at(a);
  const int64_t m0 = at.tile_m * PairTile::kRows, n0 = at.tile_n * PairTile::kCols;
  load_coefficients(rows, p.x, at.g, m0, a.M);
  load_coefficients(cols, p.y, at.g, n0, a.N);
  PairAcc x;
  float scale[kPairMT][2], sum[kPairMT][2];
  PairBits pos, out;
  load_dots(x, a, at);
  load_scale(scale, a, at);
  find_matches(pos, out, a, at);
  const float inverse = 1.0f / *p.peak;
  __syncthreads();  // orders the coefficients before their reads
  float row[2 * kPairMT][kCoefs];
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) {
#pragma unroll
    for (int c = 0; c < kCoefs; ++c) row[k][c] = rows[c][at.row_of(k / 2, k % 2 * 2) - m0];
    sum[k / 2][k % 2] = 0.0f;
  }
#pragma unroll
  for (int n = 0; n < kPairNT; ++n) {
    float col[2][kCoefs];
#pragma unroll
    for (int c = 0; c < kCoefs; ++c) {
      const float2 v = *reinterpret_cast<const float2*>(&cols[c][at.col_of(n, 0) - n0]);
      col[0][c] = v.x, col[1][c] = v.y;
    }
#pragma unroll
    for (int k = 0; k < 4 * kPairMT; ++k) {
      const int m = k / 4, i = k % 4;
      const float product = x[m][n][i], s = product * scale[m][i / 2];
      const bool match = pos.has(m, n, i);
      const float both = ds_of(s, row[k / 2], match) + ds_of(s, col[i % 2], match);
      const float ds = out.has(m, n, i) ? 0.0f : both;
      sum[m][i / 2] += ds * product;
      x[m][n][i] = ds * scale[m][i / 2] * inverse;
    }
  }
#pragma unroll
  for (int k = 0; k < 2 * kPairMT; ++k) sum[k / 2][k % 2] = quad_sum(sum[k / 2][k % 2]);
  store_rows(p.part + (at.tile_n * a.G + at.g) * a.M, a, at, sum);
  if (p.w) store_w<T>(p.w, a, at, [&](int m, int n, int i) { return x[m][n][i]; });
}

}  // namespace

const void* contrastive_parts() { return reinterpret_cast<const void*>(&contrastive_parts_kernel); }
const void* contrastive_merge() { return reinterpret_cast<const void*>(&contrastive_merge_kernel); }
const void* contrastive_ds(DType dtype) {
  return pick(dtype, [](auto type) {
    return reinterpret_cast<const void*>(&contrastive_ds_kernel<typename decltype(type)::Type>);
  });
}

}  // namespace fmm::cuda
