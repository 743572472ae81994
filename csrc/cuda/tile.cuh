// Tiles in shared memory: XOR-swizzled layout, predicated loads by cp.async, the pipeline that
// walks a stream, and stores of a warp's accumulators. No op knowledge.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "attention.h"

namespace fmm::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ inline float4 load_shared4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ inline void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Rows of kWidth elements whose 16-byte chunks are permuted by row: eight lanes that read or write
// one chunk column of eight rows touch all 32 banks. The base is a multiple of a row's bytes.
template <typename T, int kWidth>
struct Tile {
  static constexpr int kRowBytes = kWidth * sizeof(T);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPer16 = 16 / sizeof(T);
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0);

  uint32_t base;  // shared-space address

  static __device__ int swizzle(int row) {
    return kChunks >= 8 ? row % 8 : row / (8 / (kChunks < 8 ? kChunks : 8)) % kChunks;
  }
  // Bytes from the base to an element.
  static __device__ uint32_t offset(int row, int col) {
    const int chunk = (col / kPer16) ^ swizzle(row);
    return row * kRowBytes + chunk * 16 + col % kPer16 * static_cast<int>(sizeof(T));
  }
  __device__ uint32_t address(int row, int col) const { return base + offset(row, col); }
  // The address `cols` columns after that at `offset`, whose own column is below the first multiple
  // of `cols`. The swizzle permutes chunks inside 128 bytes only: tiles share the permuted offsets,
  // and what is beyond is an immediate.
  __device__ uint32_t along(uint32_t offset, int cols) const {
    const int bytes = cols * static_cast<int>(sizeof(T));
    return base + (offset ^ (bytes & 127)) + (bytes & ~127);
  }
};

// Copies `bytes` of 16 and fills the rest with zeros; with 0 bytes `from` is not read, and may lie
// past the tensor.
__device__ inline void cp_async16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <typename T>
__device__ inline uint32_t pack(float a, float b) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

// One element of a tensor of run-time type.
__device__ inline float load_float(const Tensor4& t, int64_t at) {
  switch (t.dtype) {
    case DType::kHalf:
      return __half2float(static_cast<const __half*>(t.data)[at]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[at]);
    default:
      return static_cast<const float*>(t.data)[at];
  }
}

// A block's head, and its place among the `per_head` blocks of that head; grids are below 2^31.
struct Place {
  int head, b, h, block;

  __device__ Place(int64_t pid, int64_t per_head, int64_t H) {
    const unsigned i = static_cast<unsigned>(pid), n = static_cast<unsigned>(per_head);
    head = i / n, block = i % n;
    b = head / static_cast<unsigned>(H), h = head % static_cast<unsigned>(H);
  }
};

// The keys of one batch item: [rows] bool, nullptr: all kept.
struct Keep {
  const bool* data;
  int64_t stride;

  __device__ Keep() : data(nullptr), stride(0) {}
  __device__ Keep(const KeyMask& m, int b)
      : data(m.data ? m.data + b * m.stride[0] : nullptr), stride(m.stride[1]) {}
  __device__ bool at(int64_t row) const { return data == nullptr || data[row * stride]; }
};

// One head's [rows, width] matrix in global memory. `vectors`: every row starts at a multiple of 16
// bytes and its elements are adjacent.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride_m, stride_d;
  int rows, width;
  bool vectors;

  __device__ Matrix(const Strided& t, int b, int h, int64_t rows, int64_t width)
      : data(static_cast<const T*>(t.data) + b * t.stride[0] + h * t.stride[1]),
        stride_m(t.stride[2]),
        stride_d(t.stride[3]),
        rows(static_cast<int>(rows)),
        width(static_cast<int>(width)),
        vectors(t.vectors) {}
};

// Starts the copy of rows [row0, row0 + kRows) into the tile; rows outside or not kept and columns
// past the width become 0, also where memory holds NaN. All threads of the block take part.
template <int kRows, int kThreads, typename T, int kWidth>
__device__ inline void load_tile(Tile<T, kWidth> tile, const Matrix<T>& m, int row0,
                                 const Keep& keep) {
  using Dst = Tile<T, kWidth>;
  constexpr int kRowsAtOnce = kThreads / Dst::kChunks;
  static_assert(kRowsAtOnce * Dst::kChunks == kThreads && kRowsAtOnce > 0);
  static_assert(kRows % kRowsAtOnce == 0);
  const int col = threadIdx.x % Dst::kChunks * Dst::kPer16;
  const int first = threadIdx.x / Dst::kChunks;
  const T* from = m.data + (row0 + first) * m.stride_m + col * m.stride_d;
  const int64_t step = kRowsAtOnce * m.stride_m;
  const int inside = max(0, min(Dst::kPer16, m.width - col));
  const int bytes = inside * static_cast<int>(sizeof(T)), left = m.rows - row0 - first;
  const uint32_t to0 = tile.address(first, col);
  // The swizzle repeats every eight rows.
  const auto place = [&](int r) {
    return kRowsAtOnce % 8 == 0 ? to0 + r * Dst::kRowBytes : tile.address(first + r, col);
  };
  if (m.vectors && keep.data == nullptr) {
#pragma unroll
    for (int r = 0; r < kRows; r += kRowsAtOnce) {
      cp_async16(place(r), from, r < left ? bytes : 0);
      from += step;
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kRows; r += kRowsAtOnce) {
      const bool on = r < left && keep.at(row0 + first + r);
      if (m.vectors) {
        cp_async16(place(r), from, on ? bytes : 0);
      } else {
        T v[Dst::kPer16];
#pragma unroll
        for (int i = 0; i < Dst::kPer16; ++i) {
          v[i] = on && i < inside ? from[i * m.stride_d] : static_cast<T>(0.0f);
        }
        const uint4 w = *reinterpret_cast<const uint4*>(v);
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(place(r)), "r"(w.x), "r"(w.y),
                     "r"(w.z), "r"(w.w)
                     : "memory");
      }
      from += step;
    }
  }
}

// body(j, stage) for j in [0, n), tile j loaded by load(j, stage) up to kStages - 1 steps ahead.
// With one stage the load is waited for; with more a tile has one barrier.
template <int kStages, typename Load, typename Body>
__device__ inline void walk(int n, const Load& load, const Body& body) {
  if constexpr (kStages == 1) {
    for (int j = 0; j < n; ++j) {
      __syncthreads();  // orders the reads of tile j - 1 before its overwriting
      load(j, 0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // orders the writes of tile j before its reads
      body(j, 0);
    }
  } else {
    for (int j = 0; j < kStages - 1; ++j) {
      if (j < n) load(j, j);
      cp_async_commit();
    }
    int stage = 0;
    for (int j = 0; j < n; ++j) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // orders tile j's writes before its reads, reads of j - 1 before new writes
      const int next = j + kStages - 1;
      const int free = stage == 0 ? kStages - 1 : stage - 1;
      if (next < n) load(next, free);
      cp_async_commit();
      body(j, stage);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// A warp's accumulators as rows [row, row + 16) of a tile.
template <typename T, int kDT, int kWidth>
__device__ inline void put_tile(Tile<T, kWidth> tile, int row, const float (&c)[kDT][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < kDT; ++d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t to = tile.address(row + lane / 4 + 8 * i, 8 * d + lane % 4 * 2);
      if constexpr (sizeof(T) == 2) {
        store_shared(to, pack<T>(c[d][2 * i], c[d][2 * i + 1]));
      } else {
        asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(to), "f"(c[d][2 * i]),
                     "f"(c[d][2 * i + 1])
                     : "memory");
      }
    }
  }
}

// A warp's accumulators as fp32 columns [col, ...) of rows [row0, row0 + 16) of `out` [rows,
// width].
template <int kDT>
__device__ inline void put_rows(float* out, int row0, int64_t rows, int width, int col,
                                const float (&c)[kDT][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kDT * 4; ++i) {
    const int row = row0 + lane / 4 + i % 4 / 2 * 8, at = col + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < rows && at < width) out[int64_t{row} * width + at] = c[i / 4][i % 4];
  }
}

// Writes a warp's accumulators, [16, 8 * kDT], as columns [col, ...) of rows [row0, row0 + 16) of
// the contiguous `out` [rows, width]; `stage` are 16 rows of shared memory that this warp alone
// uses.
template <typename T, int kDT>
__device__ inline void store_tile(T* out, int64_t row0, int64_t rows, int width, int col,
                                  const float (&c)[kDT][4], Tile<T, 8 * kDT> stage) {
  const int lane = threadIdx.x % 32;
  put_tile(stage, 0, c);
  __syncwarp();
  using Src = Tile<T, 8 * kDT>;
  const bool vectors = width % Src::kPer16 == 0;
#pragma unroll
  for (int i = 0; i < 16 * Src::kChunks; i += 32) {
    const int row = (i + lane) / Src::kChunks, at = (i + lane) % Src::kChunks * Src::kPer16;
    uint4 w;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "r"(stage.address(row, at))
                 : "memory");
    if (row0 + row < rows && col + at < width) {
      T* to = out + (row0 + row) * width + col + at;
      if (vectors) {
        *reinterpret_cast<uint4*>(to) = w;
      } else {
        const T* v = reinterpret_cast<const T*>(&w);
#pragma unroll
        for (int e = 0; e < Src::kPer16; ++e) {
          if (col + at + e < width) to[e] = v[e];
        }
      }
    }
  }
  __syncwarp();
}

// Numbers [at, at + 4) of `size` ones, in one access where no group of four leaves them or crosses
// 16 bytes: sum += factor * from, and to = sum.
__device__ inline void add_scaled4(float (&sum)[4], float factor, const float* from, int at,
                                   int size) {
  if (size % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const float4 x = *reinterpret_cast<const float4*>(from + at);
    sum[0] = fmaf(factor, x.x, sum[0]), sum[1] = fmaf(factor, x.y, sum[1]);
    sum[2] = fmaf(factor, x.z, sum[2]), sum[3] = fmaf(factor, x.w, sum[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < size) sum[i] = fmaf(factor, from[at + i], sum[i]);
    }
  }
}
template <typename T>
__device__ inline void put4(T* to, const float (&sum)[4], int at, int size) {
  if (sizeof(T) == 2 && size % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    T v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = static_cast<T>(sum[i]);
    *reinterpret_cast<uint2*>(to + at) = *reinterpret_cast<const uint2*>(v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < size) to[at + i] = static_cast<T>(sum[i]);
    }
  }
}

}  // namespace fmm::cuda
