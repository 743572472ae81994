// Tensor-core fragments of one warp: loads from swizzled shared memory and c += a * b on m16n8
// tiles.
//
// fp16 and bf16 multiply by m16n8k16. fp32 multiplies by m16n8k8 in 3xTF32: x = hi + lo, each with
// 11 bits, so that hi*lo + lo*hi + hi*hi is off by at most 2^-21 of a product, an eighth of what
// the contract allows; each k8 step starts from zero and is added in fp32, because tensor cores
// truncate where they accumulate, and its two mixed terms are added to each other, so that a * b
// and b * a have the same bits. Scores alone are sums of IEEE FMA in the order of k: under exp
// their error counts absolutely, 1e4 * 2^-21 would be too much.
//
// With g = lane / 4 and t = lane % 4 a lane holds of c [16, 8]: c0, c1 = [g, 2t..2t+1] and
// c2, c3 = [g + 8, 2t..2t+1].
#pragma once

#include "store.cuh"

namespace fmm::cuda {

// Depth of one mma step.
template <typename T>
constexpr int kStep = 32 / sizeof(T);

template <typename T, int kRegs>
struct Frag {
  uint32_t r[kRegs];
};
template <int kRegs>
struct Frag<float, kRegs> {
  uint32_t r[kRegs], low[kRegs];
};
template <typename T>
using FragA = Frag<T, 4>;  // [16, kStep]
template <typename T>
using FragB = Frag<T, 2>;  // [kStep, 8]

// x = hi + lo up to 2^-24; infinite and NaN stay in hi.
__device__ inline void split(uint32_t bits, uint32_t& hi, uint32_t& lo) {
  const float x = __uint_as_float(bits);
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(hi) : "f"(x));
  const float rest = fabsf(x) < 3.4e38f ? x - __uint_as_float(hi) : 0.0f;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(lo) : "f"(rest));
}

template <typename T, int kRegs>
__device__ inline void finish(Frag<T, kRegs>& f) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kRegs; ++i) split(f.r[i], f.r[i], f.low[i]);
  }
}

__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&from)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(from[0]),
        "f"(from[1]), "f"(from[2]), "f"(from[3]));
}

// c = a * b + from; `from` may be c.
template <typename T>
__device__ inline void mma(float (&c)[4], const FragA<T>& a, const FragB<T>& b,
                           const float (&from)[4]) {
  if constexpr (sizeof(T) == 4) {
    constexpr float kZero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float step[4], other[4];
    mma_tf32(step, a.low, b.r, kZero);
    mma_tf32(other, a.r, b.low, kZero);
#pragma unroll
    for (int i = 0; i < 4; ++i) step[i] += other[i];
    mma_tf32(step, a.r, b.r, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = from[i] + step[i];
  } else if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]),
          "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]),
          "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]));
  }
}
template <typename T>
__device__ inline void mma(float (&c)[4], const FragA<T>& a, const FragB<T>& b) {
  mma<T>(c, a, b, c);
}

// Four 8 x 8 matrices of 16-bit numbers, kFar bytes after the lanes' addresses.
template <bool kTrans, int kFar>
__device__ inline void ldmatrix(uint32_t (&a)[2], uint32_t (&b)[2], uint32_t address) {
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1])
                 : "r"(address), "n"(kFar)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1])
                 : "r"(address), "n"(kFar)
                 : "memory");
  }
}

// Where a lane starts in tiles of one kind: for load_a and load_b from row `row`, a multiple of
// eight; for load_bt from column `col`, a multiple of as many as are then read, a power of two; for
// load_at likewise, but of 128 bytes unless padded.
template <typename Of>
struct Lanes {
  uint32_t by_a, by_b, by_word;

  // `keep`: in registers, which a kernel may be short of.
  __device__ explicit Lanes(bool keep = !Of::kPadded_) {
    const int lane = threadIdx.x % 32;
    by_a = Of::offset(lane % 16, lane / 16 * Of::kPer16);
    by_b = Of::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * Of::kPer16);
    by_word = Of::offset(lane % 4 * 2, lane / 4);
    if (keep) {
      by_a = kept_register(by_a), by_b = kept_register(by_b);
      if constexpr (Of::kSize == 4) by_word = kept_register(by_word);
    }
  }
  __device__ Spot<Of> a(Of tile, int row) const { return {tile.base + row * Of::kRowBytes + by_a}; }
  __device__ Spot<Of> b(Of tile) const { return {tile.base + by_b}; }
  __device__ Spot<Of> bt(Of tile, int col) const {
    const uint32_t by = Of::kSize == 2 ? by_a : by_word, bytes = col * Of::kSize;
    return {tile.base + (Of::kPadded_ ? by + bytes : (by ^ (bytes & 127)) + Of::across(bytes))};
  }
  __device__ Spot<Of> at(Of tile, int col) const {
    const uint32_t bytes = col * Of::kSize;
    return {tile.base + (Of::kPadded_ ? bytes : Of::across(bytes)) +
            (Of::kSize == 2 ? by_b : by_word)};
  }
};

// Rows [kRow, kRow + 16), depth [kCol, kCol + kStep) of a tile stored by rows.
template <int kRow, int kCol, typename T, typename Of>
__device__ inline void load_a(FragA<T>& f, Spot<Of> s) {
  uint32_t lo[2], hi[2];
  ldmatrix<false, Spot<Of>::template kFar<kRow, kCol>>(lo, hi, s.template near<kCol>());
  f.r[0] = lo[0], f.r[1] = lo[1], f.r[2] = hi[0], f.r[3] = hi[1];
  finish(f);
}

// Two b fragments whose columns are the rows [kRow, kRow + 16) of the tile: b = tile.T.
template <int kRow, int kCol, typename T, typename Of>
__device__ inline void load_b(FragB<T> (&f)[2], Spot<Of> s) {
  ldmatrix<false, Spot<Of>::template kFar<kRow, kCol>>(f[0].r, f[1].r, s.template near<kCol>());
  finish(f[0]);
  finish(f[1]);
}

// The fp32 number of row kRow + i and column kCol; rows 2t and 2t + 1 are permuted by a chunk.
template <int kRow, int kCol, int kI, typename Of>
__device__ inline uint32_t load_word(Spot<Of> s) {
  static_assert(Of::kSize == 4 && Of::kChunks >= 8);
  const Spot<Of> row{s.at ^ kI * 16};
  return load_shared<Spot<Of>::template kFar<kRow + kI, kCol>>(row.template near<kCol>());
}

// Two b fragments: depth = tile rows [kRow, kRow + kStep), columns = tile columns [kCol, kCol +
// 16). fp32 takes depth in the order in which c holds columns: row 2t, then row 2t + 1.
template <int kRow, int kCol, typename T, typename Of>
__device__ inline void load_bt(FragB<T> (&f)[2], Spot<Of> s) {
  if constexpr (sizeof(T) == 2) {
    ldmatrix<true, Spot<Of>::template kFar<kRow, kCol>>(f[0].r, f[1].r, s.template near<kCol>());
  } else {
    unroll<4>([&](auto i) { f[i % 2].r[i / 2] = load_word<kRow, kCol + i % 2 * 8, i / 2>(s); });
    finish(f[0]);
    finish(f[1]);
  }
}

// a fragment of tile.T: rows = tile columns [kCol, kCol + 16), depth = tile rows [kRow, kRow +
// kStep).
template <int kRow, int kCol, typename T, typename Of>
__device__ inline void load_at(FragA<T>& f, Spot<Of> s) {
  if constexpr (sizeof(T) == 2) {
    uint32_t lo[2], hi[2];
    ldmatrix<true, Spot<Of>::template kFar<kRow, kCol>>(lo, hi, s.template near<kCol>());
    f.r[0] = lo[0], f.r[1] = lo[1], f.r[2] = hi[0], f.r[3] = hi[1];
  } else {
    unroll<4>([&](auto i) { f.r[i] = load_word<kRow, kCol + i % 2 * 8, i / 2>(s); });
    finish(f);
  }
}

// The a fragment [16, kStep] of accumulators: c points at the first of its one or two n8 tiles.
template <typename T>
__device__ inline void from_acc(FragA<T>& f, const float (*c)[4]) {
  if constexpr (sizeof(T) == 2) {
    f.r[0] = pack<T>(c[0][0], c[0][1]), f.r[1] = pack<T>(c[0][2], c[0][3]);
    f.r[2] = pack<T>(c[1][0], c[1][1]), f.r[3] = pack<T>(c[1][2], c[1][3]);
  } else {
    f.r[0] = __float_as_uint(c[0][0]), f.r[1] = __float_as_uint(c[0][2]);
    f.r[2] = __float_as_uint(c[0][1]), f.r[3] = __float_as_uint(c[0][3]);
    finish(f);
  }
}

// Fragments of 16 rows of a 16-bit type, where spot_of puts accumulators.
template <typename T, int kSteps, int kWidth>
__device__ inline void put_frags(Spot<Tile<T, kWidth, true>> to, const FragA<T> (&p)[kSteps]) {
  static_assert(sizeof(T) == 2 && kSteps * 16 == kWidth);
  using Dst = Tile<T, kWidth, true>;
  unroll<kSteps * 4>([&](auto i) {
    constexpr int kCol = i / 4 * 16 + i % 4 / 2 * 8;
    store_shared<i % 2 * 8 * Dst::kRowBytes + kCol * 2>(to.at, p[i / 4].r[i % 4]);
  });
}

template <int kMT, int kNT>
__device__ inline void clear(float (&c)[kMT][kNT][4]) {
#pragma unroll
  for (int i = 0; i < kMT * kNT * 4; ++i) c[i / (kNT * 4)][i / 4 % kNT][i % 4] = 0.0f;
}

// c[m, n] += sum_d a[row + m, d] * b[n, d]: kMT times 16 rows of a, kApart from one to the next,
// against the 8 * kNT rows of b.
template <int kApart = 16, typename T, int kMT, int kNT, int kWidth>
__device__ inline void dot_tile(float (&c)[kMT][kNT][4], Tile<T, kWidth> a, int row,
                                Tile<T, kWidth> b, const Lanes<Tile<T, kWidth>>& lanes) {
  // fp32 in parts: ptxas loads as far ahead as code is straight, until registers spill.
  constexpr int kPart = sizeof(T) == 4 ? 32 : kWidth;
  auto from_a = lanes.a(a, row), from_b = lanes.b(b);
#pragma unroll 1
  for (int k0 = 0; k0 < kWidth; k0 += kPart) {
    unroll<kPart / kStep<T>>([&](auto step) {
      constexpr int k = step * kStep<T>;
      FragA<T> fa[kMT];
      unroll<kMT>([&](auto m) { load_a<kApart * m, k>(fa[m], from_a); });
      unroll<kNT / 2>([&](auto n) {
        FragB<T> fb[2];
        load_b<16 * n, k>(fb, from_b);
#pragma unroll
        for (int m = 0; m < kMT; ++m) {
          mma<T>(c[m][2 * n], fa[m], fb[0]);
          mma<T>(c[m][2 * n + 1], fa[m], fb[1]);
        }
      });
    });
    constexpr uint32_t kNext = Tile<T, kWidth>::across(kPart * sizeof(T));
    from_a.at += kNext, from_b.at += kNext;
  }
}

// The same of 16 rows of a that are already in fragments.
template <typename T, int kSteps, int kNT, int kWidth>
__device__ inline void dot_rows(float (&c)[kNT][4], const FragA<T> (&a)[kSteps], Tile<T, kWidth> b,
                                const Lanes<Tile<T, kWidth>>& lanes) {
  static_assert(kSteps * kStep<T> == kWidth);
  const auto from = lanes.b(b);
  unroll<kSteps * kNT / 2>([&](auto at) {
    constexpr int step = at / (kNT / 2), n = at % (kNT / 2);
    FragB<T> fb[2];
    load_b<16 * n, step * kStep<T>>(fb, from);
    mma<T>(c[2 * n], a[step], fb[0]);
    mma<T>(c[2 * n + 1], a[step], fb[1]);
  });
}

// dot_tile for scores: fp32 by FMA, sums of 128 apart, for roundings grow with their number.
template <int kApart = 16, typename T, int kMT, int kNT, int kWidth>
__device__ inline void dot_scores(float (&c)[kMT][kNT][4], Tile<T, kWidth> a, int row,
                                  Tile<T, kWidth> b, const Lanes<Tile<T, kWidth>>& lanes) {
  if constexpr (sizeof(T) == 2) {
    dot_tile<kApart>(c, a, row, b, lanes);
  } else {
    static_assert(kMT == 1);
    constexpr int kDepth = kWidth < 128 ? kWidth : 128;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k0 = 0; k0 < kWidth; k0 += kDepth) {
      float part[1][kNT][4];
      clear(part);
#pragma unroll 4
      for (int k = k0; k < k0 + kDepth; k += 4) {
        const float4 x[2] = {load_shared4(a.along(a.offset(row + lane / 4, 0), k)),
                             load_shared4(a.along(a.offset(row + lane / 4 + 8, 0), k))};
#pragma unroll
        for (int i = 0; i < 2 * kNT; ++i) {
          const float4 y = load_shared4(b.along(b.offset(i / 2 * 8 + lane % 4 * 2 + i % 2, 0), k));
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float& s = part[0][i / 2][2 * r + i % 2];
            s = fmaf(x[r].x, y.x, s), s = fmaf(x[r].y, y.y, s);
            s = fmaf(x[r].z, y.z, s), s = fmaf(x[r].w, y.w, s);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kNT; ++i) c[0][i / 4][i % 4] += part[0][i / 4][i % 4];
    }
  }
}

// c[m, d] += sum_n p[m, n] * b[n, col + d], p in registers: columns [col, col + 8 * kDT) of b.
template <typename T, int kMT, int kNT, int kDT, int kWidth>
__device__ inline void dot_regs(float (&c)[kMT][kDT][4], const float (&p)[kMT][kNT][4],
                                Tile<T, kWidth> b, int col, const Lanes<Tile<T, kWidth>>& lanes) {
  constexpr int kTiles = kStep<T> / 8;
  static_assert(kNT % kTiles == 0 && kDT % 2 == 0);
  const auto from = lanes.bt(b, col);
  unroll<kNT / kTiles>([&](auto n) {
    constexpr int k = n * kStep<T>;
    FragA<T> fa[kMT];
#pragma unroll
    for (int m = 0; m < kMT; ++m) from_acc(fa[m], &p[m][n * kTiles]);
    unroll<kDT / 2>([&](auto d) {
      FragB<T> fb[2];
      load_bt<k, 16 * d>(fb, from);
#pragma unroll
      for (int m = 0; m < kMT; ++m) {
        mma<T>(c[m][2 * d], fa[m], fb[0]);
        mma<T>(c[m][2 * d + 1], fa[m], fb[1]);
      }
    });
  });
}

// The same for 16 rows whose p is already in fragments, columns [col + kCol, ...) of b.
template <int kCol, typename T, int kSteps, int kDT, int kWidth>
__device__ inline void dot_frags(float (&c)[kDT][4], const FragA<T> (&p)[kSteps], Tile<T, kWidth> b,
                                 int col, const Lanes<Tile<T, kWidth>>& lanes) {
  const auto from = lanes.bt(b, col);
  unroll<kSteps * kDT / 2>([&](auto at) {
    constexpr int i = at / (kDT / 2), d = at % (kDT / 2);
    FragB<T> fb[2];
    load_bt<i * kStep<T>, kCol + 16 * d>(fb, from);
    mma<T>(c[2 * d], p[i], fb[0]);
    mma<T>(c[2 * d + 1], p[i], fb[1]);
  });
}

// c[n, d] += sum_m a[m, row + n] * b[m, col + d] over the first `depth` of kDepth rows of both
// tiles.
template <int kDepth, typename T, int kMT, int kDT, int kWidthA, int kWidth>
__device__ inline void dot_trans(float (&c)[kMT][kDT][4], Tile<T, kWidthA, true> a, int row,
                                 Tile<T, kWidth> b, int col, int depth,
                                 const Lanes<Tile<T, kWidthA, true>>& lanes_a,
                                 const Lanes<Tile<T, kWidth>>& lanes) {
  const auto from_a = lanes_a.at(a, row);
  const auto from_b = lanes.bt(b, col);
  unroll_while<kDepth / kStep<T>>([&](auto step) {
    constexpr int k = step * kStep<T>;
    FragA<T> fa[kMT];
    unroll<kMT>([&](auto m) { load_at<k, 16 * m>(fa[m], from_a); });
    unroll<kDT / 2>([&](auto d) {
      FragB<T> fb[2];
      load_bt<k, 16 * d>(fb, from_b);
#pragma unroll
      for (int m = 0; m < kMT; ++m) {
        mma<T>(c[m][2 * d], fa[m], fb[0]);
        mma<T>(c[m][2 * d + 1], fa[m], fb[1]);
      }
    });
    return k + kStep<T> < depth;
  });
}

}  // namespace fmm::cuda
