// A warp's accumulators [16, 8 * kDT] to shared and global memory.
#pragma once

#include "tile.cuh"

namespace fmm::cuda {

// Where a lane's accumulators lie in rows [row, row + 16) and columns from `col` of a padded tile.
template <typename Of>
__device__ inline Spot<Of> spot_of(Of tile, int row, int col = 0) {
  const int lane = threadIdx.x % 32;
  return {tile.address(row + lane / 4, col + lane % 4 * 2)};
}

template <typename T, int kDT, int kWidth>
__device__ inline void put_tile(Spot<Tile<T, kWidth, true>> to, const float (&c)[kDT][4]) {
  using Dst = Tile<T, kWidth, true>;
  unroll<2 * kDT>([&](auto i) {
    constexpr int kFar = i % 2 * 8 * Dst::kRowBytes + i / 2 * 8 * Dst::kSize;
    const float* v = &c[i / 2][i % 2 * 2];
    if constexpr (sizeof(T) == 2) {
      store_shared<kFar>(to.at, pack<T>(v[0], v[1]));
    } else {
      asm volatile("st.shared.v2.f32 [%0+%3], {%1,%2};" ::"r"(to.at), "f"(v[0]), "f"(v[1]),
                   "n"(kFar)
                   : "memory");
    }
  });
}

// As fp32 columns [col, ...) of rows [row0, row0 + 16) of the contiguous `out` [rows, width].
template <int kDT>
__device__ inline void put_rows(float* out, int row0, int64_t rows, int width, int col,
                                const float (&c)[kDT][4]) {
  const int lane = threadIdx.x % 32;
  const bool pairs = width % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
  const bool whole = row0 + 16 <= rows && col + 8 * kDT <= width && pairs;
  col += lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + lane / 4 + 8 * i;
    float* to = out + int64_t{row} * width + col;
    if (whole) {
      unroll<kDT>([&](auto d) { store_global<32 * d>(to, c[d][2 * i], c[d][2 * i + 1]); });
      continue;
    }
    if (row >= rows) continue;
#pragma unroll
    for (int d = 0; d < kDT; ++d) {
      const float x = c[d][2 * i], y = c[d][2 * i + 1];
      const int left = width - col - 8 * d;
      if (left > 0) to[8 * d] = x;
      if (left > 1) to[8 * d + 1] = y;
    }
  }
}

// Writes accumulators as 16 rows of a result, 16 bytes a lane, by way of `stage`: 16 rows of shared
// memory that this warp alone uses.
template <typename T, int kDT>
struct Storer {
  using Stage = Tile<T, 8 * kDT, true>;
  static constexpr int kAcross = Stage::kChunks < 8 ? Stage::kChunks : 8, kDown = 32 / kAcross;
  int row, col;
  Spot<Stage> put;
  uint32_t get;

  // `keep`: in registers, which a kernel may be short of.
  __device__ Storer(Stage stage, bool keep) : put(spot_of(stage, 0)) {
    const int lane = threadIdx.x % 32;
    row = kAcross < 8 ? lane % kDown : lane / kAcross;
    col = (kAcross < 8 ? lane / kDown : lane % kAcross) * Stage::kPer16;
    get = stage.address(row, col);
    if (keep) put.at = kept_register(put.at), get = kept_register(get);
  }
  static __device__ bool whole(int64_t rows, int width, int cols) {
    return width % Stage::kPer16 == 0 && rows >= 16 && cols >= 8 * kDT;
  }
  // The lane's first element of rows from row0 on of the contiguous `out` [.., width].
  __device__ T* start(void* out, int64_t row0, int width) const {
    return static_cast<T*>(out) + (row0 + row) * width + col;
  }
  // Columns [kCol, ...) of the 16 rows at `to`; `rows` and `cols` are how many there are, and
  // `whole`: they are all there, in 16-byte chunks.
  template <int kCol = 0>
  __device__ void operator()(T* to, bool whole, int64_t rows, int width, int cols,
                             const float (&c)[kDT][4]) const {
    constexpr int kFar = kCol * Stage::kSize;
    put_tile(put, c);
    __syncwarp();
    if (whole) {
      each([&](auto i, auto j, const uint4& w) {
        store_global<kFar + j * kAcross * 16>(to + i * kDown * width, w);
      });
    } else {
      each([&](auto i, auto j, const uint4& w) {
        constexpr int kAt = kCol + j * kAcross * Stage::kPer16;
        if (row + i * kDown >= rows) return;
        T* at = to + i * kDown * width + kAt;
        const int inside = cols - col - kAt;
        if (width % Stage::kPer16 == 0) {
          if (inside > 0) store_global<0>(at, w);
        } else {
          const T* v = reinterpret_cast<const T*>(&w);
#pragma unroll
          for (int e = 0; e < Stage::kPer16; ++e) {
            if (e < inside) at[e] = v[e];
          }
        }
      });
    }
    __syncwarp();
  }

 private:
  // body(i, j, its 16 bytes) for the lane's chunks: j-th of row kDown * i.
  template <typename Body>
  __device__ void each(const Body& body) const {
    constexpr int kAlong = Stage::kChunks / kAcross;
    unroll<16 / kDown * kAlong>([&body, from = get](auto at) {
      constexpr int kI = at / kAlong, kJ = at % kAlong;
      body(std::integral_constant<int, kI>(), std::integral_constant<int, kJ>(),
           load_shared16<kI * kDown * Stage::kRowBytes + kJ * kAcross * 16>(from));
    });
  }
};

// The next four numbers, `left` of which there are, in one access if `vectors`: sum += factor *
// from, and to = sum.
__device__ inline void add_scaled4(float (&sum)[4], float factor, const float* from, int left,
                                   bool vectors) {
  if (vectors) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    sum[0] = fmaf(factor, x.x, sum[0]), sum[1] = fmaf(factor, x.y, sum[1]);
    sum[2] = fmaf(factor, x.z, sum[2]), sum[3] = fmaf(factor, x.w, sum[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) sum[i] = fmaf(factor, from[i], sum[i]);
    }
  }
}
template <typename T>
__device__ inline void put4(T* to, const float (&sum)[4], int left, bool vectors) {
  if (sizeof(T) == 2 && vectors) {
    T v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = static_cast<T>(sum[i]);
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) to[i] = static_cast<T>(sum[i]);
    }
  }
}

}  // namespace fmm::cuda
