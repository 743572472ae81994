// Forward of bi_attention where one stream is short: it stays in shared memory while the other
// passes by, with one s and one exp for both directions; three products a tile. In base 2:
//
//   e = 2^(s - u), u[m] = max_n s;  p_row = e;  p_col = e * 2^(u - top) * gain, gain[n] = 2^(top -
//   ref)
//
// `top` and the columns' references stay until a tile exceeds one by 2^11 or lies out of reach of
// fp32; then they are set anew and the sums rescaled, as for the first tile. bf16 reaches as far as
// fp32: there p_col has no gain, the sums of columns near `top` refer to that, and so do the rows,
// u = top and p_col = p_row, where their sums show that they lie near it.
#include "attention_kernels.h"
#include "softmax.cuh"
#include "sources.cuh"
#include "tuning.h"

namespace fmm::cuda {
namespace {

// How a tile is computed: first with rows that refer to `top`, then to their maxima, then p_col
// from s itself, for references set anew.
enum class Pass { kTop, kMaxima, kColumns };

constexpr float kNear = 65536.0f;  // how far sums of rows may be from 1 in Pass::kTop

// What a block knows of the resident stream's tokens.
template <typename S>
struct Columns {
  float ref[S::kCols], unit[S::kCols], gain[S::kCols], alpha[S::kCols], total[S::kCols];
  float most[S::kWarps][S::kCols], top[S::kWarps];
};

// Shared memory: b's qk and v; per stage a's qk and v; p_col; Columns; where a's rows come from.
template <typename T, int kWidth, typename S>
struct Layout {
  static constexpr uint32_t kB = S::kCols * kWidth * sizeof(T), kA = S::kRows * kWidth * sizeof(T);
  static constexpr uint32_t kP = 2 * kB + 2 * S::kStages * kA;
  static constexpr uint32_t kState = kP + S::kRows * Tile<T, S::kCols, true>::kRowBytes;
  static constexpr uint32_t kSources = kState + (sizeof(Columns<S>) + 7) / 8 * 8;
  static constexpr uint32_t kBytes = kSources + sizeof(Sources<T>);

  static __device__ uint32_t stage(uint32_t base, int i) { return base + 2 * kB + 2 * i * kA; }
};

// Writes one number a column, each lane having some of all of its warp's columns, to the warp's row
// of `to`: joined over the lanes by join_across<8, 4>.
template <typename S>
__device__ inline void put_columns(float (&to)[S::kCols], const float (&x)[2 * S::kNT]) {
  const int lane = threadIdx.x % 32;
  if constexpr (S::kNT == 4) {
    to[lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2] = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < S::kNT / 8; ++i) {
      float* at = &to[(lane / 4 * (S::kNT / 8) + i) * 8 + lane % 4 * 2];
      *reinterpret_cast<float2*>(at) = make_float2(x[2 * i], x[2 * i + 1]);
    }
  }
}

// New references from this tile's s: ref = max(ref, the column's maximum), top = max(top, u), both
// over rows that are keys; unit: what the column's sums refer to; alpha = 2^(old unit - unit), at
// most 2^80, for neither falls. Returns whether p_col lies within e's reach.
template <bool kGain, typename S>
__device__ inline bool set_references(Columns<S>& c, float& top, const float (&s)[S::kNT][4],
                                      const float (&u)[2], const bool (&keep)[2], float unit,
                                      int64_t cols) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float most[2 * S::kNT];
#pragma unroll
  for (int i = 0; i < S::kNT * 2; ++i) {
    const float* x = s[i / 2] + i % 2;
    most[i] = fmaxf(keep[0] ? x[0] : -kInf, keep[1] ? x[2] : -kInf);
  }
  max_across<8, 4>(most);
#pragma unroll
  for (int i = 0; i < S::kNT / 4; ++i) most[i] *= unit;
  put_columns<S>(c.most[warp], most);
  float mine = fmaxf(keep[0] ? u[0] : -kInf, keep[1] ? u[1] : -kInf);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, step));
  if (lane == 0) c.top[warp] = mine;
  __syncthreads();  // orders the warps' maxima before their joint ones
#pragma unroll
  for (int w = 0; w < S::kWarps; ++w) top = fmaxf(top, c.top[w]);
  bool lost = false;
  for (int n = threadIdx.x; n < S::kCols; n += S::kThreads) {
    float ref = c.ref[n];
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) ref = fmaxf(ref, c.most[w][n]);
    const float reach = top - ref, now = kGain || !(fabsf(reach) <= 80.0f) ? ref : top;
    c.alpha[n] = exp2_fast(c.unit[n] - finite_or(now, 0.0f));
    c.ref[n] = ref;
    c.unit[n] = now;
    if (kGain) c.gain[n] = ref == -kInf ? 0.0f : exp2_fast(reach);
    lost = lost || (n < cols && !(fabsf(reach) <= 80.0f));
  }
  return !__syncthreads_or(lost);  // and orders the new state before its use
}

template <typename T, int kWidth, int kCols>
__global__ void __launch_bounds__((ResidentFwd<kWidth, kCols>::kThreads),
                                  (ResidentFwd<kWidth, kCols>::kBlocks))
    resident_fwd_kernel(const __grid_constant__ Resident p) {
  using S = ResidentFwd<kWidth, kCols>;
  using L = Layout<T, kWidth, S>;
  constexpr int kNT = S::kNT, kMC = S::kMC, kDC = S::kDC, kSteps = kCols / kStep<T>;
  constexpr bool kGain = std::is_same_v<T, __half>;
  constexpr bool kHold = kCols < 64 || (kCols == 64 && S::kBlocks == 1);  // places in registers
  static_assert(S::kMT == 1 && sizeof(T) == 2);
  extern __shared__ __align__(1024) char smem[];
  const Attention& all = p.all;
  const Pair& pair = all.pair[0];
  const Stream &a = pair.a, &other = pair.b;
  const Place place(blockIdx.x, p.chunks, all.H);
  const int head = place.head, b = place.b, h = place.h;
  const int start = place.block * static_cast<int>(p.chunk);
  const int end = static_cast<int>(min(start + p.chunk, a.rows));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp * 16;
  const int group0 = warp % S::kGroups * 16 * kMC, col0 = warp / S::kGroups * 8 * kDC;

  const uint32_t base = shared_address(smem);
  const Tile<T, kWidth> qk_b{base}, v_b{base + L::kB};
  const Tile<T, kCols, true> p_col{base + L::kP};
  Columns<S>& state = *reinterpret_cast<Columns<S>*>(smem + L::kState);
  const Keep keep_b(other.keep, b);
  Sources<T>& walked = *reinterpret_cast<Sources<T>*>(smem + L::kSources);
  if (threadIdx.x == 0) walked = Sources<T>(a, pair.width, b, h, true, kWidth);
  const float unit = unit_of(pair);

  load_tile<kCols, S::kThreads>(qk_b, Matrix<T>(other.qk, b, h, other.rows, pair.width), 0);
  load_tile<kCols, S::kThreads>(v_b, Matrix<T>(other.v, b, h, other.rows, other.width_v, keep_b),
                                0);
  for (int n = threadIdx.x; n < kCols; n += S::kThreads) {
    state.ref[n] = state.unit[n] = -kInf;
  }
  const Copier<S::kThreads, Tile<T, kWidth>> copier(kHold);
  const Lanes<Tile<T, kWidth>> lanes(kHold);
  const Lanes<Tile<T, kCols, true>> lanes_p(kHold);
  static_assert(Storer<T, S::kChunk / 8>::Stage::kRowBytes <= Tile<T, kCols, true>::kRowBytes);
  const Storer<T, S::kChunk / 8> store({p_col.address(row0, 0)}, kHold);
  auto p_at = spot_of(p_col, row0);
  if (kHold) p_at.at = kept_register(p_at.at);
  const int width_a = static_cast<int>(a.width_o);
  float acc[kMC][kDC][4], total[2 * kNT], top = -kInf;
  clear(acc);
#pragma unroll
  for (int i = 0; i < 2 * kNT; ++i) total[i] = 0.0f;
  bool stale = true;
  const bool plain = keep_b.data == nullptr && !all.dropout.on;
  __syncthreads();  // orders the writes of `walked` before their reads

  const auto load = [&](int j, int stage) {
    const uint32_t qk = L::stage(base, stage), v = qk + L::kA;
    const Tiles<T, kWidth> t{{qk}, {v}, {v}};
    load_tiles<S::kRows, true, false>(t, walked, start + j * S::kRows, copier);
  };
  const int tiles = static_cast<int>(ceil_div(end - start, S::kRows));
  walk<S::kStages>(0, tiles, load, [&](int j, int stage) {
    const Tile<T, kWidth> qk_a{L::stage(base, stage)}, v_a{qk_a.base + L::kA};
    const int m0 = start + j * S::kRows, row = m0 + row0 + lane / 4;
    const ColumnBits<kNT, false> kept(keep_b, 0, other.rows);  // s: -inf past rows
    bool keep[2] = {true, true};
    const bool inside = m0 + row0 + 16 <= walked.plain;
    if (!inside) {
      const Keep& keys = walked.v.keep;
      keep[0] = row < a.rows && keys.at(row), keep[1] = row + 8 < a.rows && keys.at(row + 8);
    }
    float s[1][kNT][4], u[2], part[kNT][2];
    bool near_top[2] = {false, false};  // rows that refer to it in Pass::kMaxima too
    // Also where there is one key, whose p is 1 then, without a rounding.
    Pass pass = kGain || stale || other.rows == 1 ? Pass::kMaxima : Pass::kTop;
    while (true) {
      clear(s);
      dot_tile(s, qk_a, row0, qk_b, lanes);
      // Opaque to the compiler, which would compute for every tile what only a bias needs, or
      // dropout.
      const auto hide = [](int x) { return static_cast<int>(kept_register(x)); };
      s_tile(s[0], pair, hide(b), hide(h), hide(m0 + row0), 0);
      if (other.rows < kCols) {
        const int left = static_cast<int>(other.rows) - lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kNT * 4; ++i) {
          if (i / 4 * 8 + i % 2 >= left) s[0][i / 4][i % 4] = -kInf;
        }
      }
      u[0] = u[1] = top;
      if (kGain || pass != Pass::kTop) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float most = -kInf;
          if (kept.all) {
#pragma unroll
            for (int i = 0; i < 2 * kNT; ++i) most = fmaxf(most, s[0][i / 2][2 * r + i % 2]);
          } else {
#pragma unroll
            for (int i = 0; i < 2 * kNT; ++i) {
              most = fmaxf(most, kept.has(i / 2, i) ? s[0][i / 2][2 * r + i % 2] : -kInf);
            }
          }
          const float own = finite_or(quad_max(most) * unit, 0.0f);
          u[r] = near_top[r] ? top : own;
        }
      }
      bool near = true, over = false;
      if (stale || pass == Pass::kColumns) {
        near = set_references<kGain>(state, top, s[0], u, keep, unit, other.rows);
        if (j > 0) {
#pragma unroll
          for (int i = 0; i < kMC * kDC * 4; ++i) {
            const int m = i / (kDC * 4), d = i / 4 % kDC, r = i % 4 / 2;
            acc[m][d][i % 4] *= state.alpha[group0 + 16 * m + lane / 4 + 8 * r];
          }
#pragma unroll
          for (int i = 0; i < kNT * 2; ++i) {
            total[i] *= state.alpha[i / 2 * 8 + lane % 4 * 2 + i % 2];
          }
        }
        stale = !near;
      }
      FragA<T> frag[kSteps];
      if (pass == Pass::kColumns) {
#pragma unroll
        for (int i = 0; i < 4 * kNT; ++i) {
          const float of = finite_or(state.unit[i / 4 * 8 + lane % 4 * 2 + i % 2], 0.0f);
          s[0][i / 4][i % 4] = exp2_fast(fmaf(s[0][i / 4][i % 4], unit, -of));
        }
      } else {
        // Rows: o = e @ v_b / sum.
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 4 * kNT; ++i) {
          float& x = s[0][i / 4][i % 4];
          x = exp2_fast(fmaf(x, unit, -u[i % 4 / 2]));
          sum[i % 4 / 2] += x;
        }
        if (!kept.all) {
          // Columns that are no keys may lie further above u than what brings p_col back to `top`.
          over = pass == Pass::kMaxima &&
                 ((keep[0] && !(sum[0] <= kNear)) || (keep[1] && !(sum[1] <= kNear)));
          sum[0] = sum[1] = 0.0f;
#pragma unroll
          for (int i = 0; i < 4 * kNT; ++i) {
            sum[i % 4 / 2] += kept.has(i / 4, i % 4) ? s[0][i / 4][i % 4] : 0.0f;
          }
        }
        sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
        if (!kGain && pass == Pass::kTop) {
#pragma unroll
          for (int r = 0; r < 2; ++r) near_top[r] = sum[r] >= 1.0f / kNear && sum[r] <= kNear;
          if (!__all_sync(~0u, near_top[0] && near_top[1])) {
            pass = Pass::kMaxima;
            continue;
          }
        }
        if (plain) {
#pragma unroll
          for (int i = 0; i < kSteps; ++i) from_acc(frag[i], &s[0][2 * i]);
        } else {
          uint64_t on = ~uint64_t{0};
          if (all.dropout.on) {
            on =
                drop_bits<kNT>(all.dropout, pair.drop_a, pair.flip, hide(head), hide(m0 + row0), 0);
          }
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            float x[2][4];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              const int n = 2 * i + e / 4;
              x[e / 4][e % 4] = kept.has(n, e % 4) ? s[0][n][e % 4] * all.dropout.factor : 0.0f;
              x[e / 4][e % 4] = gate(on, n * 4 + e % 4, x[e / 4][e % 4]);
            }
            from_acc(frag[i], x);
          }
        }
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          inverse[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
          if (lane % 4 == 0 && row + 8 * r < end) {
            const double lse2 = static_cast<double>(u[r]) + log2_fast(sum[r]);
            a.lse[head * a.rows + row + 8 * r] = sum[r] == 0.0f ? -kInf : lse2 * kLn2;
          }
        }
        const int left = end - m0 - row0;
        const bool all_there = left >= 16 && width_a == kWidth;
        T* to = store.start(a.o, head * a.rows + m0 + row0, width_a);
        unroll_while<kWidth / S::kChunk>([&](auto chunk) {
          constexpr int kCol = chunk * S::kChunk;
          float o[1][S::kChunk / 8][4];
          clear(o);
          dot_frags<kCol>(o[0], frag, v_b, 0, lanes);
#pragma unroll
          for (int i = 0; i < S::kChunk / 2; ++i) o[0][i / 4][i % 4] *= inverse[i % 4 / 2];
          store.template operator()<kCol>(to, all_there, left, width_a, width_a, o[0]);
          return kCol + S::kChunk < width_a;
        });
      }
      // Columns: p_col to shared memory, and its sums. 128 tokens have no registers for p in
      // fragments beside s.
      const bool same = !kGain && kCols < 128 && pass == Pass::kTop && plain && inside;
      if (pass == Pass::kMaxima) {
        const float r[2] = {exp2_fast(u[0] - top), exp2_fast(u[1] - top)};
#pragma unroll
        for (int n = 0; n < kNT; ++n) {
          float2 gain = make_float2(1.0f, 1.0f);
          if (kGain) gain = *reinterpret_cast<float2*>(&state.gain[n * 8 + lane % 4 * 2]);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][n][i] *= r[i / 2] * (i % 2 ? gain.y : gain.x);
        }
        over = over || !near || (keep[0] && u[0] - top > 40.0f) || (keep[1] && u[1] - top > 40.0f);
      }
      if (!inside && !(keep[0] && keep[1])) {
#pragma unroll
        for (int i = 0; i < 4 * kNT; ++i) {
          if (!keep[i % 4 / 2]) s[0][i / 4][i % 4] = 0.0f;  // also where it is not a number
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kNT; ++i) {
        part[i / 2][i % 2] = s[0][i / 2][i % 2] + s[0][i / 2][i % 2 + 2];
        asm volatile("" : "+f"(part[i / 2][i % 2]));  // after the barrier it takes copies of s
      }
      // In bf16 what rows refer to bounds p_col, unless columns that are no keys lie above it.
      if ((kGain || !kept.all) && pass != Pass::kColumns) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * kNT; ++i) most = fmaxf(most, part[i / 2][i % 2]);
        over = over || most > (kGain ? 2048.0f : 0x1p40f);
      }
      if (same) {
        put_frags(p_at, frag);
      } else {
        if (all.dropout.on) {
          const uint64_t on =
              drop_bits<kNT>(all.dropout, pair.drop_b, pair.flip, hide(head), hide(m0 + row0), 0);
          drop_tile(s[0], on, all.dropout.factor);
        }
        put_tile(p_at, s[0]);
      }
      // And orders the writes of p_col before its reads.
      if (!__syncthreads_or(over) || pass == Pass::kColumns) break;
      pass = Pass::kColumns;
    }
#pragma unroll
    for (int i = 0; i < 2 * kNT; ++i) total[i] += part[i / 2][i % 2];
    dot_trans<S::kRows>(acc, p_col, group0, v_a, col0, end - m0, lanes_p, lanes);
  });

  __syncthreads();  // orders the last reads of shared memory before its next use
  sum_across<8, 4>(total);
  put_columns<S>(state.most[warp], total);
  __syncthreads();  // orders the warps' sums before their joint ones
  for (int n = threadIdx.x; n < kCols; n += S::kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) sum += state.most[w][n];
    state.total[n] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const double lse2 =
        sum == 0.0f ? -kInf : static_cast<double>(finite_or(state.unit[n], 0.0f)) + log2_fast(sum);
    if (n < other.rows) {
      if (p.chunks > 1) {
        p.part_lse[blockIdx.x * other.rows + n] = lse2;
      } else {
        other.lse[head * other.rows + n] = lse2 * kLn2;
      }
    }
  }
  __syncthreads();  // orders the factors before their reads
  const int width = static_cast<int>(other.width_o);
#pragma unroll
  for (int m = 0; m < kMC; ++m) {
#pragma unroll
    for (int i = 0; i < kDC * 4; ++i) {
      acc[m][i / 4][i % 4] *= state.total[group0 + 16 * m + lane / 4 + i % 4 / 2 * 8];
    }
    if (p.chunks > 1) {
      float* to = p.part + blockIdx.x * other.rows * width;
      put_rows(to, group0 + 16 * m, other.rows, width, col0, acc[m]);
    } else {
      using Store = Storer<T, kDC>;
      const Store finish({base + warp * 16 * Store::Stage::kRowBytes}, false);
      const int first = group0 + 16 * m;
      T* to = finish.start(other.o, head * other.rows + first, width) + col0;
      const int left = static_cast<int>(other.rows) - first;
      finish(to, finish.whole(left, width, width - col0), left, width, width - col0, acc[m]);
    }
  }
}

// o and lse of the resident stream from the chunks' shares, in order; 16 lanes a row.
template <typename T>
__global__ void __launch_bounds__(128) merge_kernel(const __grid_constant__ Resident p) {
  const Stream& s = p.all.pair[0].b;
  const int rows = static_cast<int>(s.rows), width = static_cast<int>(s.width_o);
  const int chunks = static_cast<int>(p.chunks), lane = threadIdx.x % 16;
  const Place place(blockIdx.x, ceil_div(rows, 8), p.all.H);
  const int row = place.block * 8 + threadIdx.x / 16;
  if (row >= rows) return;
  const int64_t first = int64_t{place.head} * chunks * rows + row;
  const int64_t out = int64_t{place.head} * rows + row;
  const double* lse = p.part_lse + first;
  double top = -kInf;
  for (int c = 0; c < chunks; ++c) top = fmax(top, lse[c * rows]);
  if (top == -kInf) top = 0.0;
  float total = 0.0f;
  for (int c = 0; c < chunks; ++c) total += exp2_fast(static_cast<float>(lse[c * rows] - top));
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T* to = static_cast<T*>(s.o) + out * width;
  const bool vectors = width % 4 == 0;
#pragma unroll 1
  for (int d = lane * 4; d < width; d += 64) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int c = 0; c < chunks; ++c) {
      const float weight = exp2_fast(static_cast<float>(lse[c * rows] - top));
      add_scaled4(sum, weight, p.part + (first + c * rows) * width + d, width - d, vectors);
    }
#pragma unroll
    for (float& x : sum) x *= inverse;
    put4(to + d, sum, width - d, vectors);
  }
  if (lane == 0) s.lse[out] = total == 0.0f ? -kInf : (top + log2_fast(total)) * kLn2;
}

template <typename T, int kWidth, int kCols>
Kernel kernel() {
  using S = ResidentFwd<kWidth, kCols>;
  Kernel k{reinterpret_cast<const void*>(&resident_fwd_kernel<T, kWidth, kCols>), S::kRows, kCols,
           S::kThreads, static_cast<int>(Layout<T, kWidth, S>::kBytes)};
  if (S::kBlocks > k.blocks) k.blocks = S::kBlocks;
  return k;
}

}  // namespace

Kernel resident_fwd(DType dtype, int width, int64_t cols) {
  return pick(dtype, width, [cols](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    if constexpr (sizeof(T) == 2) {
      if constexpr (kW >= 64) {
        if (cols <= 32) return kernel<T, kW, 32>();
      }
      if constexpr (kW <= 128) {
        if (cols <= 64) return kernel<T, kW, 64>();
        if constexpr (kW < 128) {
          if (cols <= 128) return kernel<T, kW, 128>();
        }
      }
    }
    return Kernel{};
  });
}

Kernel merge(DType dtype) {
  return pick(dtype, 32, [](auto type, auto) {
    using T = typename decltype(type)::Type;
    return Kernel{reinterpret_cast<const void*>(&merge_kernel<T>), 8, 0, 128, 0};
  });
}

}  // namespace fmm::cuda
