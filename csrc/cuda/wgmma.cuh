// Products of four warps together by Hopper's wgmma: 64 rows, 16 a warp, against tiles in shared
// memory, whose swizzled layout is the one that wgmma reads. Accumulators lie as those of mma.cuh.
// Only code for sm_90a has it; elsewhere each warp multiplies alone.
//
// Asynchronous: what a product reads and adds to must not be touched until it was waited for. Tiles
// that cp.async or st.shared wrote need fence_async_reads() of the writers before the barrier.
#pragma once

#include "mma.cuh"

namespace fmm::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Whether the warps of a block multiply together that share tiles by kStrips strips of 16 rows.
template <typename T, int kStrips>
constexpr bool kInFours = kHasWgmma && sizeof(T) == 2 && kStrips % 4 == 0;

// Keeps reads and writes of accumulators where they stand among asynchronous products.
template <int kMT, int kNT>
__device__ inline void pin(float (&c)[kMT][kNT][4]) {
#pragma unroll
  for (int i = 0; i < kMT * kNT * 4; ++i) {
    asm volatile("" : "+f"(c[i / (kNT * 4)][i / 4 % kNT][i % 4])::"memory");
  }
}
// Accumulators with no value yet, and none that an instruction would write.
template <int kMT, int kNT>
__device__ inline void leave(float (&c)[kMT][kNT][4]) {
#pragma unroll
  for (int i = 0; i < kMT * kNT * 4; ++i) {
    asm volatile("" : "=f"(c[i / (kNT * 4)][i / 4 % kNT][i % 4])::"memory");
  }
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last kLeft committed groups are done.
template <int kLeft>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#define FMM_ACC1(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define FMM_ACC2(i) FMM_ACC1(i), FMM_ACC1(i + 1)
#define FMM_ACC4(i) FMM_ACC2(i), FMM_ACC2(i + 2)
#define FMM_ACC8(i) FMM_ACC4(i), FMM_ACC4(i + 4)
#define FMM_REG8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FMM_REG16 FMM_REG8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FMM_REG32 FMM_REG16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// In either type; `tail` is what follows the accumulators.
#define FMM_WGMMA_OF(cols, type, regs, tail) \
  "wgmma.mma_async.sync.aligned.m64n" cols "k16.f32." type "." type " {" regs "}, " tail ";"
#define FMM_WGMMA(cols, regs, acc, tail, ...)                                            \
  if constexpr (std::is_same_v<T, __half>) {                                             \
    asm volatile(FMM_WGMMA_OF(cols, "f16", regs, tail) : acc : __VA_ARGS__ : "memory");  \
  } else {                                                                               \
    asm volatile(FMM_WGMMA_OF(cols, "bf16", regs, tail) : acc : __VA_ARGS__ : "memory"); \
  }

// c [64, 8 * kNT] += a [64, 16] @ b.T, b [8 * kNT, 16]; descriptors of tiles. Without kAdd c is
// set.
template <typename T, int kNT, bool kAdd>
__device__ inline void wgmma_tiles(float (*c)[4], uint64_t a, uint64_t b) {
  static_assert(sizeof(T) == 2 && (kNT == 2 || kNT == 4 || kNT == 8));
  if constexpr (kNT == 2) {
    FMM_WGMMA("16", FMM_REG8, FMM_ACC2(0), "%8, %9, %10, 1, 1, 0, 0", "l"(a), "l"(b), "n"(kAdd))
  } else if constexpr (kNT == 4) {
    FMM_WGMMA("32", FMM_REG16, FMM_ACC4(0), "%16, %17, %18, 1, 1, 0, 0", "l"(a), "l"(b), "n"(kAdd))
  } else {
    FMM_WGMMA("64", FMM_REG32, FMM_ACC8(0), "%32, %33, %34, 1, 1, 0, 0", "l"(a), "l"(b), "n"(kAdd))
  }
}

// c [64, 8 * kNT] += a [64, 16] @ b, a in fragments, b [16, 8 * kNT].
template <typename T, int kNT>
__device__ inline void wgmma_frag(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(sizeof(T) == 2 && (kNT == 4 || kNT == 8));
  if constexpr (kNT == 4) {
    FMM_WGMMA("32", FMM_REG16, FMM_ACC4(0), "{%16, %17, %18, %19}, %20, 1, 1, 1, 1", "r"(a[0]),
              "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  } else {
    FMM_WGMMA("64", FMM_REG32, FMM_ACC8(0), "{%32, %33, %34, %35}, %36, 1, 1, 1, 1", "r"(a[0]),
              "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  }
}

#undef FMM_WGMMA
#undef FMM_WGMMA_OF
#undef FMM_REG32
#undef FMM_REG16
#undef FMM_REG8
#undef FMM_ACC8
#undef FMM_ACC4
#undef FMM_ACC2
#undef FMM_ACC1

// The descriptor of a tile from row `row` on, a multiple of eight; units of 16 bytes added to it
// move on, and so does kAtom / 16 from 64 columns to the next.
template <typename T, int kWidth>
__device__ inline uint64_t descriptor(Tile<T, kWidth> tile, int row) {
  using Of = Tile<T, kWidth>;
  static_assert(Of::kRowBytes >= 128 || Of::kRowBytes == 64);
  constexpr uint64_t kSwizzle = Of::kPitch == 128 ? 1 : 2;  // 128 or 64 bytes
  constexpr uint64_t kEight = 8 * Of::kRowBytes / 16;       // from eight rows to the next
  const uint32_t at = tile.base + row * Of::kRowBytes;
  return kSwizzle << 62 | kEight << 32 | uint64_t{1} << 16 | (at & 0x3FFFF) >> 4;
}

// How a kernel's warps multiply, each alone or four together: dot_tile and dot_scores of mma.cuh,
// which set c here, and dot_regs and dot_frags, which add to it. A warp's rows: from `row` on, the
// m-th 16 of them kApart * m further. What is started is there after a wait that leaves at most as
// many as were started later; warps alone do not wait.
template <bool kFour>
struct Dots {
  static constexpr bool kTogether = kFour;

  template <int kApart = 16, typename T, int kMT, int kNT, int kWidth>
  static __device__ void start(float (&c)[kMT][kNT][4], Tile<T, kWidth> a, int row,
                               Tile<T, kWidth> b, const Lanes<Tile<T, kWidth>>& lanes) {
    if constexpr (kFour) {
      static_assert(kMT == 1 || kApart % 64 == 0);
      const uint64_t from_a = descriptor(a, row & ~63), from_b = descriptor(b, 0);
      leave(c);
      wgmma_fence();
      unroll<kMT * kWidth / 16>([&](auto i) {
        constexpr int m = i / (kWidth / 16), k = i % (kWidth / 16) * 32;
        constexpr int kOn = (k % 128 + Tile<T, kWidth>::across(k)) / 16;
        constexpr int kRow = m * kApart * Tile<T, kWidth>::kRowBytes / 16;
        wgmma_tiles<T, kNT, (k > 0)>(c[m], from_a + kRow + kOn, from_b + kOn);
      });
      wgmma_commit();
    } else {
      clear(c);
      dot_tile<kApart>(c, a, row, b, lanes);
    }
  }
  template <int kApart = 16, typename T, int kMT, int kNT, int kWidth>
  static __device__ void start_scores(float (&c)[kMT][kNT][4], Tile<T, kWidth> a, int row,
                                      Tile<T, kWidth> b, const Lanes<Tile<T, kWidth>>& lanes) {
    if constexpr (kFour) {
      start<kApart>(c, a, row, b, lanes);
    } else {
      clear(c);
      dot_scores<kApart>(c, a, row, b, lanes);
    }
  }
  template <int kLeft, int kMT, int kNT>
  static __device__ void wait(float (&c)[kMT][kNT][4]) {
    if constexpr (kFour) {
      wgmma_wait<kLeft>();
      pin(c);
    }
  }
  template <typename T, int kMT, int kNT, int kDT, int kWidth>
  static __device__ void start_regs(float (&c)[kMT][kDT][4], const float (&p)[kMT][kNT][4],
                                    Tile<T, kWidth> b, int col,
                                    const Lanes<Tile<T, kWidth>>& lanes) {
    if constexpr (kFour) {
      FragA<T> frag[kMT][kNT / 2];
#pragma unroll
      for (int i = 0; i < kMT * kNT / 2; ++i) {
        from_acc(frag[i / (kNT / 2)][i % (kNT / 2)], &p[i / (kNT / 2)][i % (kNT / 2) * 2]);
      }
      issue(c, frag, b, col);
    } else {
      dot_regs(c, p, b, col, lanes);
    }
  }
  template <typename T, int kSteps, int kDT, int kWidth>
  static __device__ void start_frags(float (&c)[1][kDT][4], const FragA<T> (&p)[1][kSteps],
                                     Tile<T, kWidth> b, int col,
                                     const Lanes<Tile<T, kWidth>>& lanes) {
    if constexpr (kFour) {
      issue(c, p, b, col);
    } else {
      dot_frags<0>(c[0], p[0], b, col, lanes);
    }
  }

 private:
  // `col`: a multiple of 64.
  template <typename T, int kMT, int kSteps, int kDT, int kWidth>
  static __device__ void issue(float (&c)[kMT][kDT][4], const FragA<T> (&p)[kMT][kSteps],
                               Tile<T, kWidth> b, int col) {
    using Of = Tile<T, kWidth>;
    constexpr int kCols = kDT < 8 ? kDT : 8;  // n8 tiles a product
    const uint64_t from = descriptor(b, 0) + Of::across(col * 2) / 16;
    pin(c);
#pragma unroll
    for (int i = 0; i < kMT * kSteps * 4; ++i) {
      asm volatile("" ::"r"(p[i / (kSteps * 4)][i / 4 % kSteps].r[i % 4]) : "memory");
    }
    wgmma_fence();
    unroll<kMT * kSteps * kDT / kCols>([&](auto i) {
      constexpr int d = i % (kDT / kCols), k = i / (kDT / kCols) % kSteps;
      constexpr int m = i / (kDT / kCols * kSteps);
      constexpr int kOn = (Of::across(d * 128) + k * 16 * Of::kRowBytes) / 16;
      wgmma_frag<T, kCols>(&c[m][d * kCols], p[m][k].r, from + kOn);
    });
    wgmma_commit();
  }
};

}  // namespace fmm::cuda
