// Backward of bi_attention where one stream is short: it and its gradients stay on the chip while
// the other passes by; seven products a tile, ds of both softmaxes added before the last two.
#include "attention_kernels.h"
#include "ds.cuh"
#include "tuning.h"

namespace fmm::cuda {
namespace {

// Shared memory: b's tiles; per stage a's tiles; ds and pf_row of a tile; b's statistics; where
// a's rows come from.
template <typename T, int kWidth, typename S>
struct Layout {
  static constexpr uint32_t kB = S::kCols * kWidth * sizeof(T), kA = S::kRows * kWidth * sizeof(T);
  static constexpr uint32_t kP = 3 * (kB + S::kStages * kA);
  static constexpr uint32_t kEachP = S::kRows * Tile<T, S::kCols, true>::kRowBytes;
  static constexpr uint32_t kStat = kP + 2 * kEachP;
  static constexpr uint32_t kSources = kStat + kStats * S::kCols * sizeof(float);
  static constexpr uint32_t kBytes = kSources + sizeof(Sources<T>);

  static __device__ Tiles<T, kWidth> resident(uint32_t at) {
    return {{at}, {at + kB}, {at + 2 * kB}};
  }
  static __device__ Tiles<T, kWidth> stage(uint32_t base, int i) {
    const uint32_t at = base + 3 * (kB + i * kA);
    return {{at}, {at + kA}, {at + 2 * kA}};
  }
};

// out[m, d] = factor * sum_n p[m, n] * b[n, d] of a warp's 16 rows, `rows` of which there are,
// written in chunks of columns.
template <typename S, typename T, int kSteps, int kWidth>
__device__ inline void finish_rows(void* out, int64_t first, int rows, int64_t width,
                                   const FragA<T> (&p)[kSteps], Tile<T, kWidth> b,
                                   const Lanes<Tile<T, kWidth>>& lanes, float factor,
                                   const Storer<T, S::kChunk / 8>& store) {
  const int cols = static_cast<int>(width);
  const bool whole = rows >= 16 && cols == kWidth;
  T* to = store.start(out, first, cols);
  unroll_while<kWidth / S::kChunk>([&](auto chunk) {
    constexpr int kCol = chunk * S::kChunk;
    float c[1][S::kChunk / 8][4];
    clear(c);
    dot_frags<kCol>(c[0], p, b, lanes);
#pragma unroll
    for (int i = 0; i < S::kChunk / 2; ++i) c[0][i / 4][i % 4] *= factor;
    store.template operator()<kCol>(to, whole, rows, cols, cols, c[0]);
    return kCol + S::kChunk < cols;
  });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(ResidentBwd<kWidth>::kThreads, ResidentBwd<kWidth>::kBlocks)
    resident_bwd_kernel(const __grid_constant__ Resident p) {
  using S = ResidentBwd<kWidth>;
  using L = Layout<T, kWidth, S>;
  constexpr int kNT = S::kNT, kMC = S::kMC, kDC = S::kDC, kSteps = S::kCols / kStep<T>;
  static_assert(S::kMT == 1 && sizeof(T) == 2);
  extern __shared__ __align__(1024) char smem[];
  const Attention& all = p.all;
  const Pair& pair = all.pair[0];
  const Stream &a = pair.a, &other = pair.b;
  const int heads = static_cast<int>(all.B * all.H);
  const Place place(blockIdx.x, p.chunks, all.H);
  const int head = place.head, b = place.b, h = place.h;
  const int start = place.block * static_cast<int>(p.chunk);
  const int end = static_cast<int>(min(start + p.chunk, a.rows));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp * 16;
  const int group0 = warp % S::kGroups * 16 * kMC, col0 = warp / S::kGroups * 8 * kDC;

  const uint32_t base = shared_address(smem);
  const Tiles<T, kWidth> tb = L::resident(base);
  const Tile<T, S::kCols, true> ds_rows{base + L::kP}, pf_rows{ds_rows.base + L::kEachP};
  const Keep keep_a(a.keep, b);
  const float centre = centre_of(pair, head);

  // In shared memory: between loads they take no registers.
  Sources<T>& walked = *reinterpret_cast<Sources<T>*>(smem + L::kSources);
  if (threadIdx.x == 0) walked = Sources<T>(a, pair.width, b, h, true, kWidth);
  const Copier<S::kThreads, Tile<T, kWidth>> copier(S::kBlocks == 1);
  const Sources<T> resident(other, pair.width, b, h, true, kWidth);
  load_tiles<S::kCols, true, true>(tb, resident, 0, copier);
  __syncthreads();  // orders the write of `walked` before its reads
  load_stats<S::kCols, S::kThreads>(base + L::kStat, other, head, 0, heads);
  const Lanes<Tile<T, kWidth>> lanes(S::kBlocks == 1);
  const Lanes<Tile<T, S::kCols, true>> lanes_p;
  const Storer<T, S::kChunk / 8> store({ds_rows.address(row0, 0)}, false);
  const auto ds_at = spot_of(ds_rows, row0), pf_at = spot_of(pf_rows, row0);
  float dqk[kMC][kDC][4], dv[kMC][kDC][4];
  clear(dqk);
  clear(dv);
  const auto load = [&](int j, int stage) {
    load_tiles<S::kRows, true, true>(L::stage(base, stage), walked, start + j * S::kRows, copier);
  };
  const int tiles = static_cast<int>(ceil_div(end - start, S::kRows));
  walk<S::kStages>(0, tiles, load, [&](int j, int stage) {
    const Tiles<T, kWidth> ta = L::stage(base, stage);
    const int m0 = start + j * S::kRows, left = end - m0 - row0;
    const int64_t first = head * a.rows + m0 + row0;
    FragA<T> frag[kSteps];
    {
      const RowStats stats(a, keep_a, head, m0 + row0, centre, heads);
      float ds[1][kNT][4], pf_row[1][kNT][4], pf_col[1][kNT][4];
      uint64_t passes[1];
      ds_tile<true, true>(ds, pf_row, pf_col, passes, all, pair, b, h, ta, tb, lanes,
                          base + L::kStat, stats, row0, m0 + row0, 0);
      if (!pair.plain) {
#pragma unroll
        for (int i = 0; i < kNT * 4; ++i) {
          ds[0][i / 4][i % 4] = gate(passes[0], i, ds[0][i / 4][i % 4]);
        }
      }
      if (m0 + row0 + 16 > a.rows) {
#pragma unroll
        for (int i = 0; i < kNT * 4; ++i) {
          const bool on = m0 + row0 + lane / 4 + i % 4 / 2 * 8 < a.rows;
          if (!on) ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] = 0.0f;
        }
      }
      if (a.dv) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) from_acc(frag[i], &pf_col[0][2 * i]);
        finish_rows<S>(a.dv, first, left, a.width_v, frag, tb.d_o, lanes, 1.0f, store);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) from_acc(frag[i], &ds[0][2 * i]);
      put_tile(pf_at, pf_row[0]);
    }
    if (a.dqk) {
      finish_rows<S>(a.dqk, first, left, pair.width, frag, tb.qk, lanes, pair.scale, store);
    }
    put_frags(ds_at, frag);
    __syncthreads();  // orders the writes of ds and pf_row before their reads
    if (other.dqk) dot_trans<S::kRows>(dqk, ds_rows, group0, ta.qk, col0, end - m0, lanes_p, lanes);
    if (other.dv) dot_trans<S::kRows>(dv, pf_rows, group0, ta.d_o, col0, end - m0, lanes_p, lanes);
  });

  __syncthreads();  // orders the last reads of shared memory before the results
  using Store = Storer<T, kDC>;
  const Store finish({base + warp * 16 * Store::Stage::kRowBytes}, false);
  const Keep keep_b(other.keep, b);
  const int64_t rows = other.rows, width = pair.width, width_v = other.width_v;
#pragma unroll
  for (int m = 0; m < kMC; ++m) {
    const int first = group0 + 16 * m;
    const float scale = pair.scale;
#pragma unroll
    for (int i = 0; i < kDC * 4; ++i) dqk[m][i / 4][i % 4] *= scale;
    if (keep_b.data) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = first + lane / 4 + 8 * r;
        if (n >= rows || keep_b.at(n)) continue;
#pragma unroll
        for (int i = 0; i < kDC * 2; ++i) dv[m][i / 2][2 * r + i % 2] = 0.0f;
      }
    }
    if (p.chunks > 1) {
      float* part = p.part + blockIdx.x * rows * (width + width_v);
      put_rows(part, first, rows, static_cast<int>(width), col0, dqk[m]);
      put_rows(part + rows * width, first, rows, static_cast<int>(width_v), col0, dv[m]);
    } else {
      const auto write = [&](void* out, int64_t columns, const float (&c)[kDC][4]) {
        if (out == nullptr) return;
        const int w = static_cast<int>(columns), left = static_cast<int>(rows) - first;
        finish(finish.start(out, head * rows + first, w) + col0, finish.whole(left, w, w - col0),
               left, w, w - col0, c);
      };
      write(other.dqk, width, dqk[m]);
      write(other.dv, width_v, dv[m]);
    }
  }
}

// The resident stream's gradients from the chunks' shares, in order; four numbers a thread.
template <typename T>
__global__ void __launch_bounds__(128) sum_kernel(const __grid_constant__ Resident p) {
  const Stream& s = p.all.pair[0].b;
  const int one = static_cast<int>(s.rows * p.all.pair[0].width);
  const int both = one + static_cast<int>(s.rows * s.width_v);
  const Place place(blockIdx.x, ceil_div(one, 512) + ceil_div(both - one, 512), p.all.H);
  const int blocks = static_cast<int>(ceil_div(one, 512));
  const bool values = place.block >= blocks;
  const int from = values ? one : 0, size = values ? both - one : one;
  const int i = ((values ? place.block - blocks : place.block) * 128 + threadIdx.x) * 4;
  void* out = values ? s.dv : s.dqk;
  if (out == nullptr || i >= size) return;
  const int chunks = static_cast<int>(p.chunks);
  const float* part = p.part + int64_t{place.head} * chunks * both + from;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int c = 0; c < chunks; ++c) add_scaled4(sum, 1.0f, part + int64_t{c} * both, i, size);
  put4(static_cast<T*>(out) + int64_t{place.head} * size, sum, i, size);
}

template <typename T, int kWidth>
Kernel kernel() {
  using S = ResidentBwd<kWidth>;
  return {reinterpret_cast<const void*>(&resident_bwd_kernel<T, kWidth>), S::kRows, S::kCols,
          S::kThreads, static_cast<int>(Layout<T, kWidth, S>::kBytes)};
}

}  // namespace

Kernel resident_bwd(DType dtype, int width, int64_t cols) {
  return pick(dtype, width, [cols](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    if constexpr (sizeof(T) == 2 && kW <= 128) {
      if (cols <= ResidentBwd<kW>::kCols) return kernel<T, kW>();
    }
    return Kernel{};
  });
}

Kernel sum_chunks(DType dtype) {
  return pick(dtype, 32, [](auto type, auto) {
    using T = typename decltype(type)::Type;
    return Kernel{reinterpret_cast<const void*>(&sum_kernel<T>), 512, 0, 128, 0};
  });
}

}  // namespace fmm::cuda
