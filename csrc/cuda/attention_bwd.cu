// Backward of attention where a block owns rows of one stream and walks the other: co_attention's
// dq (row softmax) and dk, dv (column softmax), and bi_attention's dqk and dv of either stream
// where both are long (both softmaxes, s and ds shared). Few rows share what they walk among
// blocks, whose sums are added in order. Deterministic.
#include <new>

#include "attention_kernels.h"
#include "owner_bwd.cuh"
#include "tuning.h"

namespace fmm::cuda {
namespace {

constexpr int kDeltaCols = 64;  // of rows that delta_kernel multiplies, at once

// A finite number in base 2 near the lse of a head.
__device__ inline float centre_of(const Pair& p, int head) {
  if (p.centre == nullptr) return 0.0f;
  const float c = static_cast<float>(p.centre[head * p.centre_stride]) * kLog2e;
  return fabsf(c) < 1e30f ? c : 0.0f;
}

// rowsum(do * o) of rows `first` + lane, 0 past the end; all of a block's kStatRows rows lie in
// `smem`, some columns at a time. It is the diagonal of a product, in the order of those of
// ds_tile.
template <typename T>
__device__ inline float dot_rows(Matrix<T> g, Matrix<T> o, int block0, uint32_t smem) {
  using Of = Tile<T, kDeltaCols>;
  const Of tile_g{smem}, tile_o{smem + kStatRows * Of::kRowBytes};
  const Copier<kStatRows, Of> copier(false);
  const Lanes<Of> lanes;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 32;
  float c[2][1][2][4];
  clear(c[0]), clear(c[1]);
  for (int left = g.width; left > 0; left -= kDeltaCols) {
    g.width = o.width = min(left, kDeltaCols);
    __syncthreads();  // orders the reads of the last columns before their overwriting
    load_tile<kStatRows>(tile_g, g, block0, g.plain(kDeltaCols), copier);
    load_tile<kStatRows>(tile_o, o, block0, o.plain(kDeltaCols), copier);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();  // orders the writes of the tiles before their reads
    unroll<2>([&](auto m) {
      const int row = row0 + m * 16;
      dot_tile(c[m], tile_g, row, Of{tile_o.base + row * Of::kRowBytes}, lanes);
    });
    g.data += kDeltaCols * g.stride_d, o.data += kDeltaCols * o.stride_d;
  }
  // Row r % 8 of eight is on the diagonal in lane r * 4 + r / 2.
  const int r = lane % 8, from = r * 4 + r / 2;
  const bool odd = lane / 4 % 2;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* x = c[i / 2][0][i % 2] + i % 2 * 2;
    const float theirs = __shfl_sync(~0u, odd ? x[1] : x[0], from);
    if (lane / 8 == i) sum = theirs;
  }
  return sum;
}

// Statistics of kStatRows rows of pair[.].a a block, one a lane, see Stats; rows past the end get
// harmless ones.
template <typename T>
__global__ void __launch_bounds__(kStatRows) delta_kernel(const __grid_constant__ Attention all) {
  __shared__ __align__(1024) char smem[2 * kStatRows * Tile<T, kDeltaCols>::kRowBytes];
  const int side = blockIdx.x < all.first ? 0 : 1;
  const Pair& p = all.pair[side];
  const Stats& st = p.a.stats;
  const Place at(blockIdx.x - (side ? all.first : 0), st.padded / kStatRows, all.H);
  const int head = at.head, lane = threadIdx.x % 32;
  const int block0 = at.block * kStatRows, row = block0 + static_cast<int>(threadIdx.x);
  const float centre = centre_of(p, head);
  const Matrix<T> g(p.a.d_o, at.b, at.h, p.a.rows, p.a.width_o);
  const Matrix<T> o(p.a.o_in, at.b, at.h, p.a.rows, p.a.width_o);
  float delta = dot_rows(g, o, block0, shared_address(smem));
  float hi = centre, lo = 0.0f;
  if (row < p.a.rows) {
    const double lse = p.a.lse[head * p.a.rows + row] * (1.0 / kLn2);
    if (lse != -kInf) hi = static_cast<float>(lse), lo = static_cast<float>(lse - hi);
    if (p.a.dlse) delta -= p.a.dlse[head * p.a.rows + row];
  }
  // lse - centre = far + rest, exactly but for the last addition.
  float far = hi - centre;
  const float back = far + centre, rest = (hi - back) - (centre - (back - far)) + lo;
  const float values[kStats] = {hi, lo, delta, exp2f(far) * exp2f(rest),
                                exp2f(-far) * exp2f(-rest)};
  far += rest;
#pragma unroll
  for (int k = 0; k < kStats; ++k) {
    st.data[(k * all.B * all.H + head) * st.padded + row] = values[k];
  }
  far = fabsf(far) <= 1e30f ? fabsf(far) : kInf;
#pragma unroll
  for (int step = 1; step < 16; step *= 2) far = fmaxf(far, __shfl_xor_sync(~0u, far, step));
  if (lane % 16 == 0) st.far[head * (st.padded / 16) + row / 16] = far;
}

template <bool kRow, bool kCol, typename T, int kWidth, int kHeight>
__global__ void __launch_bounds__((OwnerBwd<sizeof(T), kWidth, kHeight>::kThreads),
                                  (kRow && !kCol && sizeof(T) == 2 && kWidth <= 64 ? 3 : 1))
    owner_bwd_kernel(const __grid_constant__ Attention all) {
  extern __shared__ __align__(1024) char smem[];
  own_rows<kRow, kCol, false, T, kWidth, OwnerBwd<sizeof(T), kWidth, kHeight>>(all, smem);
}

// A block owns one tile of the bias's gradient and adds, in a fixed order, all of ds that falls on
// it.
template <bool kRow, bool kCol, typename T, int kWidth>
__global__ void __launch_bounds__(OwnerBwd<sizeof(T), kWidth, 0>::kThreads, 1)
    dbias_kernel(const __grid_constant__ BiasGrad grad) {
  using S = OwnerBwd<sizeof(T), kWidth, 0>;
  using L = BwdLayout<kRow, kCol, T, kWidth, S>;
  constexpr int kNT = S::kNT, kPitch = S::kCols + 1;
  static_assert(S::kRows * kPitch * sizeof(float) <= L::kBytes);
  extern __shared__ __align__(1024) char smem[];
  Sources<T>* sources = reinterpret_cast<Sources<T>*>(smem + L::kSources);
  const Attention& all = grad.all;
  const Pair& p = all.pair[0];
  const int B = static_cast<int>(all.B), H = static_cast<int>(all.H), heads = B * H;
  const int64_t tiles_m = ceil_div(grad.sizes[2], S::kRows);
  const int64_t tiles_n = ceil_div(grad.sizes[3], S::kCols);
  const int tile_n = static_cast<int>(blockIdx.x % tiles_n);
  const int tile_m = static_cast<int>(blockIdx.x / tiles_n % tiles_m);
  const int slots[2] = {static_cast<int>(grad.sizes[0]), static_cast<int>(grad.sizes[1])};
  const int slot = static_cast<int>(blockIdx.x / (tiles_n * tiles_m));
  const bool one_m = grad.sizes[2] == 1, one_n = grad.sizes[3] == 1;
  const int end_m = one_m ? static_cast<int>(p.a.rows) : (tile_m + 1) * S::kRows;
  const int end_n = one_n ? static_cast<int>(p.b.rows) : (tile_n + 1) * S::kCols;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp / S::kSplit * 16;
  const uint32_t base = shared_address(smem);
  const Tiles<T, kWidth> own = L::own(base), other = L::walked(base, 0);
  const Copier<S::kThreads, Tile<T, kWidth>> copier(false);
  const Lanes<Tile<T, kWidth>> lanes;
  float acc[1][kNT][4];
  clear(acc);
  for (int b = slot / slots[1]; b < B; b += slots[0]) {
    for (int h = slot % slots[1]; h < H; h += slots[1]) {
      const int head = b * H + h;
      __syncthreads();  // orders the reads of the last head's sources before their overwriting
      if (threadIdx.x == 0) {  // in place: an assignment copies padding, from local memory
        new (&sources[0]) Sources<T>(p.a, p.width, b, h, kRow, kWidth);
        new (&sources[1]) Sources<T>(p.b, p.width, b, h, kCol, kWidth);
      }
      for (int m0 = tile_m * S::kRows; m0 < end_m; m0 += S::kRows) {
        const RowStats<false> stats(p.a, Keep(p.a.keep, b), head, m0 + row0, heads);
        for (int n0 = tile_n * S::kCols; n0 < end_n; n0 += S::kCols) {
          __syncthreads();  // orders the reads of the tile before its overwriting, the sources
          load_tiles<S::kRows, kCol, kRow>(own, sources[0], m0, copier);
          load_tiles<S::kCols, kRow, kCol>(other, sources[1], n0, copier);
          if constexpr (kCol) {
            load_stats<S::kCols, S::kThreads>(L::stats(base, 0), p.b, head, n0, heads);
          }
          asm volatile("cp.async.wait_all;" ::: "memory");
          __syncthreads();  // orders the writes of the tile before its reads
          float ds[1][kNT][4], pf_row[1][kNT][4], pf_col[1][kNT][4];
          uint64_t passes;
          ds_tile<kRow, kCol, S::kCols, Dots<false>>(ds, pf_row, pf_col, passes, all, p, b, h, own,
                                                     other, lanes, L::stats(base, 0), stats, row0,
                                                     m0 + row0, n0);
#pragma unroll
          for (int i = 0; i < kNT * 4; ++i) {
            if (m0 + row0 + lane / 4 + i % 4 / 2 * 8 < p.a.rows) {
              acc[0][i / 4][i % 4] += ds[0][i / 4][i % 4];
            }
          }
        }
      }
    }
  }
  __syncthreads();  // orders the last reads of the tiles before the sums that take their place
  float* sums = reinterpret_cast<float*>(smem);
  if (warp % S::kSplit == 0) {
#pragma unroll
    for (int i = 0; i < kNT * 4; ++i) {
      const int row = row0 + lane / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums[row * kPitch + col] = acc[0][i / 4][i % 4];
    }
  }
  __syncthreads();  // orders the sums before their reads
  const int rows = one_m ? 1 : S::kRows, cols = one_n ? 1 : S::kCols;
  for (int i = threadIdx.x; i < rows * cols; i += S::kThreads) {
    const int row = i / cols, col = i % cols;
    double sum = 0.0;
    for (int r = row; r < (one_m ? S::kRows : row + 1); ++r) {
      for (int c = col; c < (one_n ? S::kCols : col + 1); ++c) sum += sums[r * kPitch + c];
    }
    const int64_t m = tile_m * S::kRows + row, n = tile_n * S::kCols + col;
    if (m < grad.sizes[2] && n < grad.sizes[3]) {
      grad.db[(slot * grad.sizes[2] + m) * grad.sizes[3] + n] = static_cast<float>(sum);
    }
  }
}

// make(row, column) with the two softmaxes' flags as constants.
template <typename Make>
Kernel by_softmax(Softmax which, const Make& make) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  switch (which) {
    case Softmax::kRow:
      return make(yes, no);
    case Softmax::kColumn:
      return make(no, yes);
    default:
      return make(yes, yes);
  }
}

template <bool kRow, bool kCol, typename T, int kWidth, typename S>
Kernel kernel(const void* function) {
  using L = BwdLayout<kRow, kCol, T, kWidth, S>;
  constexpr int kBytes = L::kExchange ? L::kBytesThrough : L::kBytes;
  Kernel k{function, S::kRows, S::kCols, S::kThreads, kBytes};
  k.spreads = L::kExchange;  // where the lower tile computes s twice
  return k;
}

}  // namespace

Kernel delta(DType dtype) {
  return pick(dtype, 32, [](auto type, auto) {
    using T = typename decltype(type)::Type;
    return Kernel{reinterpret_cast<const void*>(&delta_kernel<T>), kStatRows, 0, kStatRows, 0};
  });
}

Kernel owner_bwd(DType dtype, int width, Softmax which, int height) {
  return pick(dtype, width, [=](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    return by_softmax(which, [height](auto row, auto col) {
      constexpr bool kRow = row, kCol = col;
      return by_height<kTallerBwd<sizeof(T), kW>>(height, [](auto height) {
        return kernel<kRow, kCol, T, kW, OwnerBwd<sizeof(T), kW, height>>(
            reinterpret_cast<const void*>(&owner_bwd_kernel<kRow, kCol, T, kW, height>));
      });
    });
  });
}

Kernel dbias(DType dtype, int width, Softmax which) {
  return pick(dtype, width, [which](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    return by_softmax(which, [](auto row, auto col) {
      return kernel<row, col, T, kW, OwnerBwd<sizeof(T), kW, 0>>(
          reinterpret_cast<const void*>(&dbias_kernel<row, col, T, kW>));
    });
  });
}

}  // namespace fmm::cuda
