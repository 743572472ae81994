// Forward of one softmax direction: o = softmax(s, keys) @ v and lse in one walk over the keys, for
// both directions of a call in one launch. Serves co_attention, and bi_attention where both streams
// are long. Few queries share their keys among blocks.
#include <cfloat>

#include "attention_kernels.h"
#include "softmax.cuh"
#include "sources.cuh"
#include "tuning.h"
#include "wgmma.cuh"

namespace fmm::cuda {
namespace {

template <typename T, int kWidth, typename S>
constexpr int smem_bytes() {
  const int tiles = (S::kRows + 2 * S::kStages * S::kCols) * kWidth * static_cast<int>(sizeof(T));
  return tiles + static_cast<int>(sizeof(Sources<T>));
}

// The sum of a lane's p of a row and tile beyond which the row's reference is set anew: every type
// holds p.
constexpr float kMost = 2048.0f;

// What turns raw scores into p = 2^((s * unit + less) * step). fp32 takes the whole factor as step,
// so that p of a row's largest score is 1 to the bit, however large that is.
template <typename T>
struct Units {
  float unit, step;

  __device__ explicit Units(float whole)
      : unit(sizeof(T) == 4 ? 1.0f : whole), step(sizeof(T) == 4 ? whole : 1.0f) {}
};

// The reference of a row that has none: no key is below it, and p of a later one overflows.
constexpr float kNone = FLT_MAX;

// If `wanted`, a reference `less` = -max s * unit no lower than row r's scores, and its sums, if
// any, scaled to it.
template <typename T, int kNT, int kDT>
__device__ inline void raise_row(bool wanted, bool sums, float& less, float& total,
                                 float (&o)[kDT][4], const float (&s)[kNT][4], int r,
                                 const Units<T>& by) {
  float most = -kInf;
#pragma unroll
  for (int i = 0; i < 2 * kNT; ++i) most = fmaxf(most, s[i / 2][2 * r + i % 2]);
  // One rounding of the shift, which every later exponent repeats.
  const float lower = fminf(quad_max(most) * -by.unit, less);
  if (!wanted) return;
  if (sums) {
    const float alpha = exp2_fast((lower - less) * by.step);
    total *= alpha;
#pragma unroll
    for (int i = 0; i < 2 * kDT; ++i) o[i / 2][2 * r + i % 2] *= alpha;
  }
  less = lower;
}

// A block owns kRows queries of one head and walks the keys; p stays in registers.
template <typename T, int kWidth, int kHeight>
__global__ void __launch_bounds__((AttendFwd<sizeof(T), kWidth, kHeight>::kThreads),
                                  (AttendFwd<sizeof(T), kWidth, kHeight>::kBlocks))
    attend_fwd_kernel(const __grid_constant__ Attention all) {
  using S = AttendFwd<sizeof(T), kWidth, kHeight>;
  constexpr int kMT = S::kMT, kNT = S::kNT, kDT = kWidth / 8 / S::kSplit;
  extern __shared__ __align__(1024) char smem[];
  const RowBlock<S::kRows> block(all);
  const Pair& p = all.pair[block.side];
  const int b = block.b, h = block.h, m0 = block.m0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kApart = 16 * S::kStrips;  // the warp's strips of rows
  using By = Dots<kInFours<T, S::kStrips>>;
  const int row0 = S::strip_of(warp) * 16, col0 = S::part_of(warp) * 8 * kDT;
  // A warp's rows of q in registers, where there are some left.
  constexpr bool kHoldQ =
      sizeof(T) == 2 && !By::kTogether && kMT == 1 && S::kBlocks == 1 && kWidth <= 128;
  FragA<T> rows[kHoldQ ? kWidth / kStep<T> : 1];

  constexpr uint32_t kTileBytes = S::kCols * kWidth * sizeof(T);
  const Tile<T, kWidth> q{shared_address(smem)};
  const uint32_t stages = q.base + S::kRows * kWidth * sizeof(T);
  Sources<T>& walked = *(reinterpret_cast<Sources<T>*>(smem + smem_bytes<T, kWidth, S>()) - 1);
  if (threadIdx.x == 0) walked = Sources<T>(p.b, p.width, b, h, false, kWidth);
  const Units<T> by(unit_of(p));

  const Lanes<Tile<T, kWidth>> lanes;
  float o[kMT][kDT][4], total[kMT][2], less[kMT][2];
  bool start = true;  // no row has a reference
  clear(o);
#pragma unroll
  for (int i = 0; i < 2 * kMT; ++i) total[i / 2][i % 2] = 0.0f, less[i / 2][i % 2] = kNone;

  const Copier<S::kThreads, Tile<T, kWidth>> copier(S::kBlocks == 1);
  const Matrix<T> queries(p.a.qk, b, h, p.a.rows, p.width);
  load_tile<S::kRows>(q, queries, m0, queries.plain(kWidth), copier);
  __syncthreads();  // orders the write of `walked` before its reads
  const auto tiles = [&](int stage) -> Tiles<T, kWidth> {
    const uint32_t k = stages + 2 * stage * kTileBytes, v = k + kTileBytes;
    return {{k}, {v}, {v}};
  };
  const auto load = [&](int j, int stage) {
    load_tiles<S::kCols, true, false>(tiles(stage), walked, j * S::kCols, copier);
  };
  const int first = block.first_tile(S::kCols), end = block.end_tile(S::kCols);
  walk<S::kStages, By::kTogether>(first, end, load, [&](int j, int stage) {
    const Tiles<T, kWidth> t = tiles(stage);
    const int n0 = j * S::kCols;
    const ColumnBits<kNT> kept(walked.v.keep, n0, p.b.rows);
    float s[kMT][kNT][4], part[kMT][2];
    if constexpr (kHoldQ) {
      if (start) {
        const auto from = lanes.a(q, row0);
        unroll<kWidth / kStep<T>>([&](auto i) { load_a<0, i * kStep<T>>(rows[i], from); });
      }
    }
    // Again where the references of some rows do not serve.
    for (bool again = false;; again = true) {
      if (!By::kTogether || again) {  // this warp alone
        clear(s);
        if constexpr (kHoldQ) {
          dot_rows(s[0], rows, t.qk, lanes);
        } else {
          dot_scores<kApart>(s, q, row0, t.qk, lanes);
        }
      } else {
        By::template start_scores<kApart>(s, q, row0, t.qk, lanes);
        By::template wait<0>(s);
      }
#pragma unroll
      for (int m = 0; m < kMT; ++m) s_tile(s[m], p, b, h, m0 + row0 + kApart * m, n0);
      if (!kept.all) {
#pragma unroll
        for (int m = 0; m < kMT; ++m) {
#pragma unroll
          for (int i = 0; i < kNT * 4; ++i) {
            if (!kept.has(i / 4, i % 4)) s[m][i / 4][i % 4] = -kInf;
          }
        }
      }
      // References stay: a tile takes no maximum.
      if (start || again) {
#pragma unroll
        for (int i = 0; i < 2 * kMT; ++i) {
          const int m = i / 2, r = i % 2;
          bool wanted = true;
          if (again) {
            const uint32_t over = __ballot_sync(~0u, !(part[m][r] <= kMost));
            wanted = over >> (lane & 28) & 15;
          }
          raise_row(wanted, again, less[m][r], total[m][r], o[m], s[m], r, by);
        }
        start = false;
      }
      bool over = false;
#pragma unroll
      for (int i = 0; i < 2 * kMT; ++i) {
        const int m = i / 2, r = i % 2;
#pragma unroll
        for (int n = 0; n < 2 * kNT; ++n) {
          float& x = s[m][n / 2][2 * r + n % 2];
          x = exp2_fast(fmaf(x, by.unit, less[m][r]) * by.step);
          part[m][r] = n ? part[m][r] + x : x;
        }
        over = over || !(part[m][r] <= kMost);
      }
      if (again || !__any_sync(~0u, over)) break;
    }
#pragma unroll
    for (int i = 0; i < 2 * kMT; ++i) total[i / 2][i % 2] += part[i / 2][i % 2];
    if (all.dropout.on) {
#pragma unroll
      for (int m = 0; m < kMT; ++m) {
        const uint64_t on =
            drop_bits<kNT>(all.dropout, p.drop_a, p.flip, block.head, m0 + row0 + kApart * m, n0);
        drop_tile(s[m], on, all.dropout.factor);
      }
    }
    By::start_regs(o, s, t.v, col0, lanes);
    By::template wait<0>(o);
  });

  __syncthreads();  // orders the last reads of q before the results that take its place
  using Store = Storer<T, kDT>;
  const Store store({q.base + warp * 16 * Store::Stage::kRowBytes}, false);
  const int width = static_cast<int>(p.a.width_o);
  // Anew, for registers' sake.
  const RowBlock<S::kRows> out(all, kept_register(blockIdx.x));
  const int64_t rows0 = out.head * p.a.rows;
  const int64_t part = (out.head * p.chunks + out.share) * p.a.rows;
#pragma unroll
  for (int m = 0; m < kMT; ++m) {
    const int first = out.m0 + row0 + kApart * m;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(total[m][r]);
      factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = first + lane / 4 + 8 * r;
      if (lane % 4 == 0 && col0 == 0 && row < p.a.rows) {
        const float log2 = sizeof(T) == 4 ? log2f(sum) : log2_fast(sum);
        const double top = -static_cast<double>(less[m][r]) * by.step;
        const double lse2 = sum == 0.0f ? -kInf : top + log2;
        if (p.chunks > 1) {
          p.part_lse[part + row] = lse2;
        } else {
          p.a.lse[rows0 + row] = lse2 * kLn2;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kDT; ++i) o[m][i / 4][i % 4] *= factor[i % 4 / 2];
    if (p.chunks > 1) {
      put_rows(p.part + part * width, first, p.a.rows, width, col0, o[m]);
      continue;
    }
    T* to = store.start(p.a.o, rows0 + first, width) + col0;
    const int64_t rows = p.a.rows - first;
    store(to, store.whole(rows, width, width - col0), rows, width, width - col0, o[m]);
  }
}

}  // namespace

Kernel attend_fwd(DType dtype, int width, int height) {
  return pick(dtype, width, [height](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    return by_height<kTallerFwd<sizeof(T), kW>>(height, [](auto height) {
      using S = AttendFwd<sizeof(T), kW, height>;
      return Kernel{reinterpret_cast<const void*>(&attend_fwd_kernel<T, kW, height>), S::kRows,
                    S::kCols, S::kThreads, smem_bytes<T, kW, S>()};
    });
  });
}

}  // namespace fmm::cuda
