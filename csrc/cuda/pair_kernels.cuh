// The kernels of a pair loss: forward and backward, with products from the streams or from memory.
// A Loss has `Forward<S>`, what a block does with its tiles, and `ds` of an entry, whose sums over
// a row it counts in kSums.
#pragma once

#include "pair_tile.cuh"
#include "wgmma.cuh"

namespace fmm::cuda {

// A warp's strips are adjacent here, which wgmma's of more than one are not.
template <typename T, typename S>
using PairDots = Dots<S::kMT == 1 && kInFours<T, S::kStrips>>;

// A block owns rows of x; products are those of the chunk.
template <typename Loss>
__global__ void __launch_bounds__(PairTile::kThreads, 1)
    stored_fwd_kernel(const __grid_constant__ PairForward p) {
  using S = PairTile;
  using Forward = typename Loss::template Forward<S>;
  __shared__ typename Forward::Room room;
  const BlockAt<S> block(blockIdx.x, p.scores.M, p.scores.N, p.splits);
  Forward forward(p, block, room);
  for (int j = block.begin; j < block.end; ++j) {
    float s[S::kMT][S::kNT][4];
    load_dots(s, p.scores, block.lane(j * S::kCols));
    __syncthreads();  // orders the reads of the room by the tile before its overwriting
    forward.tile(s, j * S::kCols);
  }
  forward.finish();
}

// The same; x's rows are resident, y's pass.
template <typename Loss, typename T, int kWidth>
__global__ void __launch_bounds__(PairFwd<kWidth>::kThreads, 1)
    fused_fwd_kernel(const __grid_constant__ PairForward p) {
  using S = PairFwd<kWidth>;
  using Forward = typename Loss::template Forward<S>;
  extern __shared__ __align__(1024) char smem[];
  constexpr uint32_t kTileBytes = S::kCols * kWidth * sizeof(T);
  constexpr uint32_t kTiles = S::kRows * kWidth * sizeof(T) + S::kStages * kTileBytes;
  const BlockAt<S> block(blockIdx.x, p.scores.M, p.scores.N, p.splits);
  const Tile<T, kWidth> x{shared_address(smem)};
  const uint32_t stages = x.base + S::kRows * kWidth * sizeof(T);
  const Matrix<T> xs(p.x, block.g, 0, p.scores.M, p.D), ys(p.y, block.g, 0, p.scores.N, p.D);
  Forward forward(p, block, *reinterpret_cast<typename Forward::Room*>(smem + kTiles));
  load_tile<S::kRows, S::kThreads>(x, xs, block.m0);
  const auto load = [&](int j, int stage) {
    const Tile<T, kWidth> y{stages + stage * kTileBytes};
    load_tile<S::kCols, S::kThreads>(y, ys, (block.begin + j) * S::kCols);
  };
  const Lanes<Tile<T, kWidth>> lanes(kWidth > 64);
  using By = PairDots<T, S>;
  walk<S::kStages, By::kTogether>(0, block.end - block.begin, load, [&](int j, int stage) {
    const Tile<T, kWidth> y{stages + stage * kTileBytes};
    float s[S::kMT][S::kNT][4];
    By::start(s, x, static_cast<int>(threadIdx.x) / 32 * 16 * S::kMT, y, lanes);
    By::template wait<0>(s);
    forward.tile(s, (block.begin + j) * S::kCols);
  });
  forward.finish();
}

// Starts the copy of the facts of rows [first, first + kRows) to [kFacts, kRows] floats.
template <int kRows, int kThreads>
__device__ inline void load_facts(uint32_t to, const Facts& facts, int64_t g, int64_t first) {
  const float* from = facts.data + g * facts.stride[1] + first;
  for (int i = threadIdx.x; i < kFacts * kRows / 4; i += kThreads) {
    const int fact = i / (kRows / 4), at = i % (kRows / 4) * 4;
    cp_async16(to + i * 16, from + fact * facts.stride[0] + at, 16);
  }
}

// Facts of kRows rows in shared memory.
template <int kRows>
struct FactTile {
  const float* data;

  __device__ float at(Fact f, int row) const { return data[f * kRows + row]; }
  __device__ int mate(int row) const { return __float_as_int(at(kMate, row)); }
  __device__ void two(Fact f, int row, float& a, float& b) const {
    const float2 v = *reinterpret_cast<const float2*>(data + f * kRows + row);
    a = v.x, b = v.y;
  }
  template <int kCols>
  __device__ bool same_id(int row, FactTile<kCols> other, int col) const {
    return __float_as_int(at(kIdLow, row)) == __float_as_int(other.at(kIdLow, col)) &&
           __float_as_int(at(kIdHigh, row)) == __float_as_int(other.at(kIdHigh, col));
  }
};

// Turns products into scale * ds and adds a lane's shares of sum(ds * dots) and sum(ds).
template <typename Loss, typename S>
struct DsTile {
  static constexpr int kMT = S::kMT, kNT = S::kNT;
  using Known = typename Loss::Known;
  FactTile<S::kRows> rows;
  int end_rows, end_cols;
  bool ids, ignore;
  float bias;
  Known row[kMT][2];
  float along[kMT][2] = {}, total[kMT][2] = {};

  __device__ DsTile(FactTile<S::kRows> rows, int64_t end_rows, int64_t end_cols, bool ids,
                    bool ignore, const float* bias)
      : rows(rows),
        end_rows(static_cast<int>(end_rows)),
        end_cols(static_cast<int>(end_cols)),
        ids(ids),
        ignore(ignore),
        bias(bias ? *bias : 0.0f) {}

  static __device__ int local(int m, int h) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp * 16 * kMT + lane / 4 + 16 * m + 8 * h;
  }

  // Once the facts of the rows are there.
  __device__ void begin() {
#pragma unroll
    for (int k = 0; k < 2 * kMT; ++k) {
      row[k / 2][k % 2] = Known(rows, local(k / 2, k % 2));
    }
  }

  // `at`: the lane in the matrix.
  __device__ void tile(float (&x)[kMT][kNT][4], FactTile<S::kCols> cols, const LaneAt& at) {
    const int lane = threadIdx.x % 32, n0 = at.col - lane % 4 * 2, m0 = at.row - local(0, 0);
    bool look = ids || m0 + S::kRows > end_rows || n0 + S::kCols > end_cols;
#pragma unroll
    for (int k = 0; k < 2 * kMT; ++k) {
      const int mate = rows.mate(local(k / 2, k % 2));
      look = look || (mate >= n0 && mate < n0 + S::kCols);
    }
#pragma unroll
    for (int c = 0; c < S::kCols; c += 32) {
      const int mate = cols.mate(c + lane);
      look = look || (mate >= m0 && mate < m0 + S::kRows);
    }
    __any_sync(~0u, look) ? entries<true>(x, cols, at) : entries<false>(x, cols, at);
  }

 private:
  template <bool kMarked>
  __device__ void entries(float (&x)[kMT][kNT][4], FactTile<S::kCols> cols, const LaneAt& at) {
#pragma unroll
    for (int n = 0; n < kNT; ++n) {
      const int near = threadIdx.x % 4 * 2 + 8 * n;
      Known col[2];
      Known::two(col, cols, near);
#pragma unroll
      for (int k = 0; k < 4 * kMT; ++k) {
        const int m = k / 4, i = k % 4, h = i / 2, c = i % 2;
        const Known& r = row[m][h];
        const float dot = x[m][n][i], scale = r.scale * col[c].scale;
        const float s = Loss::score(dot * scale, bias);
        float ds;
        if constexpr (kMarked) {
          const int here = local(m, h), m_at = at.row_of(m, i), n_at = at.col_of(n, i);
          const bool outside = m_at >= end_rows || n_at >= end_cols;
          const bool hit = rows.mate(here) == n_at || cols.mate(near + c) == m_at;
          const bool same = ids && rows.same_id(here, cols, near + c);
          const bool match = hit || (same && !ignore);
          ds = Loss::ds_marked(match, s, r, col[c], rows, here, cols, near + c);
          if (outside || (same && ignore && !hit)) ds = 0.0f;
        } else {
          ds = Loss::ds(s, r, col[c]);
        }
        along[m][h] = fmaf(ds, dot, along[m][h]);
        if constexpr (Loss::kSums > 1) total[m][h] += ds;
        x[m][n][i] = ds * scale;
      }
    }
  }
};

// A block's shares of the sums [.., kSums, G, rows], `slot` of the first dimension.
template <typename Loss, typename S>
__device__ inline void store_all_sums(float* sums, int64_t slot, int64_t G, int64_t g,
                                      const LaneAt& at, const DsTile<Loss, S>& ds) {
  const int64_t rows = ds.end_rows;
  sums += (slot * Loss::kSums * G + g) * rows;
  store_sums<S::kMT>(sums, rows, at, ds.along);
  if constexpr (Loss::kSums > 1) store_sums<S::kMT>(sums + G * rows, rows, at, ds.total);
}

// A block turns one tile of the chunk's products into w.
template <typename Loss, typename T>
__global__ void __launch_bounds__(PairTile::kThreads, 1)
    stored_bwd_kernel(const __grid_constant__ StoredBackward p) {
  using S = PairTile;
  __shared__ __align__(16) float rows[kFacts * S::kRows];
  __shared__ __align__(16) float cols[kFacts * S::kCols];
  const Scores& s = p.scores;
  const BlockAt<S> block(blockIdx.x, s.M, s.N, ceil_div(s.N, S::kCols));
  const LaneAt at = block.lane(block.begin * S::kCols);
  load_facts<S::kRows, S::kThreads>(shared_address(rows), p.x, block.g, block.m0);
  load_facts<S::kCols, S::kThreads>(shared_address(cols), p.y, block.g, block.begin * S::kCols);
  float x[S::kMT][S::kNT][4];
  load_dots(x, s, at);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();  // orders the facts before their reads
  DsTile<Loss, S> ds({rows}, s.M, s.N, s.ids_x.data, s.ignore, s.bias);
  ds.begin();
  ds.tile(x, {cols}, at);
  if (p.w) store_w<T>(p.w, s, at, x);
  store_all_sums(p.sums, block.part, s.G, block.g, at, ds);
}

template <typename T, int kWidth>
struct BackwardLayout {
  using S = PairBwd<kWidth>;
  static constexpr uint32_t kOwn = S::kRows * kWidth * sizeof(T);
  static constexpr uint32_t kWalked = S::kCols * kWidth * sizeof(T);
  static constexpr uint32_t kFactsAt = kOwn + S::kStages * kWalked;
  static constexpr uint32_t kOwnFacts = kFacts * S::kRows * sizeof(float);
  static constexpr uint32_t kWalkedFacts = kFacts * S::kCols * sizeof(float);
  static constexpr uint32_t kBytes = kFactsAt + kOwnFacts + S::kStages * kWalkedFacts;
};

// A block owns rows of one side and adds up ds @ other in registers.
template <typename Loss, typename T, int kWidth>
__global__ void __launch_bounds__(PairBwd<kWidth>::kThreads, 1)
    fused_bwd_kernel(const __grid_constant__ FusedBackward p) {
  using S = PairBwd<kWidth>;
  using L = BackwardLayout<T, kWidth>;
  extern __shared__ __align__(1024) char smem[];
  const int side = blockIdx.x < p.first ? 0 : 1;
  const PairSide &a = p.side[side], &b = p.side[1 - side];
  const BlockAt<S> block(blockIdx.x - (side ? p.first : 0), a.rows, b.rows, a.splits);
  const uint32_t base = shared_address(smem);
  const Tile<T, kWidth> own{base};
  const Matrix<T> as(a.t, block.g, 0, a.rows, p.D), bs(b.t, block.g, 0, b.rows, p.D);
  const auto facts = [&](int stage) {
    return L::kFactsAt + L::kOwnFacts + stage * L::kWalkedFacts;
  };
  const int row0 = threadIdx.x / 32 * 16 * S::kMT;

  load_tile<S::kRows, S::kThreads>(own, as, block.m0);
  load_facts<S::kRows, S::kThreads>(base + L::kFactsAt, a.facts, block.g, block.m0);
  DsTile<Loss, S> ds({reinterpret_cast<const float*>(smem + L::kFactsAt)}, a.rows, b.rows, p.ids,
                     p.ignore, p.bias);
  float acc[S::kMT][kWidth / 8][4];
  clear(acc);
  const auto load = [&](int j, int stage) {
    const Tile<T, kWidth> t{base + L::kOwn + stage * L::kWalked};
    const int n0 = (block.begin + j) * S::kCols;
    load_tile<S::kCols, S::kThreads>(t, bs, n0);
    load_facts<S::kCols, S::kThreads>(base + facts(stage), b.facts, block.g, n0);
  };
  const Lanes<Tile<T, kWidth>> lanes;
  using By = PairDots<T, S>;
  walk<S::kStages, By::kTogether>(0, block.end - block.begin, load, [&](int j, int stage) {
    const Tile<T, kWidth> t{base + L::kOwn + stage * L::kWalked};
    if (j == 0) ds.begin();
    float x[S::kMT][S::kNT][4];
    By::start(x, own, row0, t, lanes);
    By::template wait<0>(x);
    const float* cols = reinterpret_cast<const float*>(smem + facts(stage));
    ds.tile(x, {cols}, block.lane((block.begin + j) * S::kCols));
    By::start_regs(acc, x, t, 0, lanes);
    By::template wait<0>(acc);
  });

  if (a.out) {
    float* out = a.out + (block.part * p.G + block.g) * a.rows * p.D;
#pragma unroll
    for (int m = 0; m < S::kMT; ++m) {
      put_rows(out, block.m0 + row0 + 16 * m, a.rows, static_cast<int>(p.D), 0, acc[m]);
    }
  }
  if (a.sums) store_all_sums(a.sums, block.part, p.G, block.g, block.lane(0), ds);
}

template <typename Loss>
PairKernels kernels_of(DType dtype, int width) {
  PairKernels k;
  k.sums = Loss::kSums;
  using F = PairTile;
  const auto function = [](auto* f) { return reinterpret_cast<const void*>(f); };
  k.stored_fwd = {function(&stored_fwd_kernel<Loss>), F::kRows, F::kCols, F::kThreads, 0};
  k.stored_bwd = pick(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return Kernel{function(&stored_bwd_kernel<Loss, T>), F::kRows, F::kCols, F::kThreads, 0};
  });
  if (dtype == DType::kFloat) return k;
  const auto fill = [&](auto type, auto w) {
    using T = typename decltype(type)::Type;
    using A = PairFwd<w>;
    using B = PairBwd<w>;
    constexpr int kTiles = (A::kRows + A::kStages * A::kCols) * w * static_cast<int>(sizeof(T));
    constexpr int kRoom = static_cast<int>(sizeof(typename Loss::template Forward<A>::Room));
    k.fused_fwd = {function(&fused_fwd_kernel<Loss, T, w>), A::kRows, A::kCols, A::kThreads,
                   kTiles + kRoom};
    k.fused_bwd = {function(&fused_bwd_kernel<Loss, T, w>), B::kRows, B::kCols, B::kThreads,
                   static_cast<int>(BackwardLayout<T, w>::kBytes)};
  };
  if (dtype == DType::kHalf) {
    pick_width<__half>(width, fill);
  } else {
    pick_width<__nv_bfloat16>(width, fill);
  }
  return k;
}

}  // namespace fmm::cuda
