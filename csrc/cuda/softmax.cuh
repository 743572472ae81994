// Scores and probabilities in a warp's accumulators: scale, clamp and bias, masks as bits, dropout,
// reductions over a row's four lanes.
#pragma once

#include "mma.cuh"

namespace fmm::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInf = __builtin_huge_valf();

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Off by at most 2^-22 of the result, or 2^-22.6 near 1.
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, with -inf replaced: the only guard of (-inf) - (-inf).
__device__ inline float finite_or(float x, float other) { return x == -kInf ? other : x; }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// x[i] of kLanes lanes kStep apart, joined by `join`; lane j of them gets the results from j * kN /
// kLanes on, in x[0] and up.
template <int kLanes, int kStep, int kN, int kLive = kN, typename Join>
__device__ inline void join_across(float (&x)[kN], const Join& join) {
  static_assert(kLive % kLanes == 0);
  if constexpr (kLanes > 1) {
    constexpr int kHalf = kLive / 2, kFar = kLanes / 2 * kStep;
    const bool upper = threadIdx.x & kFar;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float mine = upper ? x[i + kHalf] : x[i], theirs = upper ? x[i] : x[i + kHalf];
      x[i] = join(mine, __shfl_xor_sync(~0u, theirs, kFar));
    }
    join_across<kLanes / 2, kStep, kN, kHalf>(x, join);
  }
}
template <int kLanes, int kStep, int kN>
__device__ inline void sum_across(float (&x)[kN]) {
  join_across<kLanes, kStep>(x, [](float a, float b) { return a + b; });
}
template <int kLanes, int kStep, int kN>
__device__ inline void max_across(float (&x)[kN]) {
  join_across<kLanes, kStep>(x, [](float a, float b) { return fmaxf(a, b); });
}

// Multiplier that turns raw scores into exponents of 2.
__device__ inline float unit_of(const Pair& p) { return p.plain ? p.scale * kLog2e : kLog2e; }

// Raw scores: the product itself if plain, else clamp(scale * product) + bias, no
// finite sum below kLeastScore. (row0, col0) is the
// place of the 16 rows in [rows, cols]. Returns where the clamp lets gradient through, one bit an
// accumulator of a lane: element [n][i] is bit n * 4 + i.
template <int kNT>
__device__ inline uint64_t s_tile(float (&s)[kNT][4], const Pair& p, int b, int h, int row0,
                                  int col0) {
  if (p.plain) return ~uint64_t{0};
  const int lane = threadIdx.x % 32;
  const int64_t head = b * p.bias.stride[0] + h * p.bias.stride[1];
  uint64_t in = 0;
#pragma unroll
  for (int n = 0; n < kNT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = s[n][i] * p.scale;
      in |= uint64_t{!(fabsf(x) > p.clamp)} << (n * 4 + i);
      x = x > p.clamp ? p.clamp : x < -p.clamp ? -p.clamp : x;
      if (p.bias.data) {
        const int64_t row = row0 + lane / 4 + i / 2 * 8;
        const int64_t col = col0 + n * 8 + lane % 4 * 2 + i % 2;
        if (row < p.a.rows && col < p.b.rows) {
          x += load_float(p.bias, head + row * p.bias.stride[2] + col * p.bias.stride[3]);
          if (x < kLeastScore && x > -kInf) x = kLeastScore;
        }
      }
      s[n][i] = x;
    }
  }
  return in;
}

// Which of columns [n0, n0 + 8 * kNT) are inside and kept; has() asks for a lane's own columns.
// Without kEnds those past the end do not matter where none inside is masked.
template <int kNT, bool kEnds = true>
struct ColumnBits {
  static constexpr int kWords = (kNT + 3) / 4;
  uint32_t word[kWords];
  bool all;

  __device__ ColumnBits(const Keep& keep, int n0, int64_t rows) {
    const int lane = threadIdx.x % 32;
    all = keep.data == nullptr && (!kEnds || n0 + kNT * 8 <= rows);
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = ~0u;
    if (all) return;
    all = true;
    // Opaque: of a resident stream the compiler would keep the addresses in registers.
    n0 = static_cast<int>(kept_register(n0));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int n = n0 + w * 32 + lane;
      const bool on = n < rows && w * 32 + lane < kNT * 8 && keep.at(n);
      const uint32_t bits = __ballot_sync(~0u, on);
      all = all && bits == (kNT * 8 - w * 32 >= 32 ? ~0u : (1u << (kNT * 8 % 32)) - 1);
      word[w] = bits >> (lane % 4 * 2);
    }
  }
  __device__ bool has(int n, int i) const { return word[n / 4] >> (n % 4 * 8 + i % 2) & 1; }
};

// x where bit, else 0.
__device__ inline float gate(uint64_t bits, int at, float x) { return bits >> at & 1 ? x : 0.0f; }

__device__ inline uint4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_hi = __umulhi(0xD2511F53u, c0), a_lo = 0xD2511F53u * c0;
    const uint32_t b_hi = __umulhi(0xCD9E8D57u, c2), b_lo = 0xCD9E8D57u * c2;
    c0 = b_hi ^ c1 ^ k0, c1 = b_lo;
    c2 = a_hi ^ c3 ^ k1, c3 = a_lo;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Which entries of 16 rows dropout keeps, as bits like those of s_tile. Word n % 4 of Philox
// counter (n / 4, m, head, direction) decides entry [m, n]; with `flip` the tile's rows are n and
// its columns m. A call serves four lanes or four columns, which exchange their bits.
template <int kNT>
__device__ inline uint64_t drop_bits(const Dropout& drop, int direction, bool flip, int head,
                                     int row, int col0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int j = g % 4;
  uint64_t out = 0;
#pragma unroll 1
  for (int n = 0; n < kNT; ++n) {
    const int col = col0 + n * 8;
    // Not flipped: even lanes draw four columns of row g, odd ones of row g + 8.
    // Flipped: lane j of a group draws four rows of half j / 2 at column 2t + j % 2.
    const uint32_t n4 = (flip ? row + j / 2 * 8 + g / 4 * 4 : col + t / 2 * 4) / 4;
    const uint32_t at = flip ? col + 2 * t + j % 2 : row + g + t % 2 * 8;
    const uint4 w = philox(n4, at, static_cast<uint32_t>(head), direction, drop.seed);
    const uint32_t mine = uint32_t{w.x >= drop.threshold} | uint32_t{w.y >= drop.threshold} << 1 |
                          uint32_t{w.z >= drop.threshold} << 2 |
                          uint32_t{w.w >= drop.threshold} << 3;
    uint32_t bits = 0;
    if (flip) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t theirs = __shfl_sync(~0u, mine, (g - j + i) * 4 + t);
        bits |= (theirs >> j & 1) << i;
      }
    } else {
      const uint32_t theirs = __shfl_xor_sync(~0u, mine, 1);
      const uint32_t low = t % 2 ? theirs : mine, high = t % 2 ? mine : theirs;
      bits = (low >> t % 2 * 2 & 3) | (high >> t % 2 * 2 & 3) << 2;
    }
    out |= uint64_t{bits} << (n * 4);
  }
  return out;
}

// p * factor where kept, else 0.
template <int kNT>
__device__ inline void drop_tile(float (&p)[kNT][4], uint64_t keep, float factor) {
#pragma unroll
  for (int n = 0; n < kNT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[n][i] = gate(keep, n * 4 + i, p[n][i] * factor);
  }
}

}  // namespace fmm::cuda
