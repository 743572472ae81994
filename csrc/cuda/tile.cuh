// Tiles in shared memory: XOR-swizzled layout, predicated loads by cp.async, and the pipeline that
// walks a stream. No op knowledge.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "attention.h"

namespace fmm::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// body(i) for i = 0 .. kN - 1 as constants.
template <typename Body, int... kI>
__device__ inline void unroll(const Body& body, std::integer_sequence<int, kI...>) {
  (body(std::integral_constant<int, kI>()), ...);
}
template <int kN, typename Body>
__device__ inline void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, kN>());
}

// The same while body(i) says so.
template <int kN, int kI = 0, typename Body>
__device__ inline void unroll_while(const Body& body) {
  if (!body(std::integral_constant<int, kI>())) return;
  if constexpr (kI + 1 < kN) unroll_while<kN, kI + 1>(body);
}

// x, to be kept: what depends on the lane the compiler would rather compute anew in every turn of a
// loop.
__device__ inline uint32_t kept_register(uint32_t x) {
  uint32_t y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Shared memory kFar bytes after an address.
template <int kFar = 0>
__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1+%2];" : "=r"(v) : "r"(address), "n"(kFar) : "memory");
  return v;
}

template <int kFar = 0>
__device__ inline float2 load_shared2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2+%3];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address), "n"(kFar)
               : "memory");
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

template <int kFar>
__device__ inline uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address), "n"(kFar)
               : "memory");
  return v;
}

template <int kFar>
__device__ inline void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0+%2], %1;" ::"r"(address), "r"(v), "n"(kFar) : "memory");
}

// Rows of kWidth elements. Eight lanes that read or write one chunk of 16 bytes of eight rows touch
// all 32 banks: eight rows lie together, 128 bytes of each at a time, with their chunks permuted by
// row, which are the swizzled atoms of wgmma; or, where memory allows, rows are kPadded by a chunk.
// The base is a multiple of eight rows' bytes.
template <typename T, int kWidth, bool kPadded = false>
struct Tile {
  static constexpr int kRowBytes = (kWidth * sizeof(T)) + kPadded * 16;
  static constexpr int kChunks = kWidth * sizeof(T) / 16;
  static constexpr int kPer16 = 16 / sizeof(T), kSize = sizeof(T);
  static constexpr bool kPadded_ = kPadded;
  // Bytes from a row to the next of its eight, and from 128 bytes of a row to its next 128.
  static constexpr int kPitch = kPadded || kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kAtom = kPadded ? 128 : 8 * kPitch;
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0);

  uint32_t base;  // shared-space address

  static __device__ int swizzle(int row) {
    if constexpr (kPadded) return 0;
    return kChunks >= 8 ? row % 8 : row / (8 / (kChunks < 8 ? kChunks : 8)) % kChunks;
  }
  // Bytes from a row to that `rows` on, both among the same eight or a multiple of eight apart.
  static constexpr __host__ __device__ int down(int rows) {
    return rows * kPitch + (rows & ~7) * (kRowBytes - kPitch);
  }
  // Bytes from a column to that `bytes` on, a multiple of 128.
  static constexpr __host__ __device__ int across(int bytes) { return bytes / 128 * kAtom; }
  // Bytes from the base to an element.
  static __device__ uint32_t offset(int row, int col) {
    const int chunk = col / kPer16, in = col % kPer16 * static_cast<int>(sizeof(T));
    if constexpr (kPadded) return row * kRowBytes + chunk * 16 + in;
    const int on = down(row) + (chunk ^ swizzle(row)) * 16 + in;
    if constexpr (kChunks <= 8) return on;
    return on + (chunk & ~7) * (kAtom / 8 - 16);
  }
  __device__ uint32_t address(int row, int col) const { return base + offset(row, col); }
  // The address `cols` columns after that at `offset`, whose own column is below the first multiple
  // of `cols`. The swizzle permutes chunks inside 128 bytes only: tiles share the permuted offsets,
  // and what is beyond is an immediate.
  __device__ uint32_t along(uint32_t offset, int cols) const {
    const int bytes = cols * static_cast<int>(sizeof(T));
    return base + (offset ^ (bytes & 127)) + across(bytes);
  }
};

// A lane's place in a tile. Others are at constant distances: columns within 128 bytes an xor
// away, where they are permuted, and all else an immediate, for the permutation repeats every eight
// rows. Columns of the place are multiples of a power of two above those within 128 bytes.
template <typename Of>
struct Spot {
  uint32_t at;

  template <int kCol>
  __device__ uint32_t near() const {
    return Of::kPadded_ ? at : at ^ (kCol * Of::kSize & 127);
  }
  template <int kRow, int kCol>
  static constexpr int kFar =
      Of::down(kRow) + (Of::kPadded_ ? kCol * Of::kSize : Of::across(kCol * Of::kSize));
};

// A barrier of the block's warps from `group` * kWarps on, kWarps of them.
template <int kWarps>
__device__ inline void sync_warps(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(32 * kWarps) : "memory");
}

// Copies `bytes` of 16 and fills the rest with zeros; with 0 bytes `from` is not read, and may lie
// past the tensor.
template <int kFar = 0>
__device__ inline void cp_async16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes),
               "n"(kFar)
               : "memory");
}
template <int kFar>
__device__ inline void cp_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0+%2], [%1], 16;" ::"r"(to), "l"(from), "n"(kFar)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Accesses to several numbers at once, which through a pointer the compiler splits where another
// branch has them singly.
__device__ inline uint4 load_global(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
template <int kFar>
__device__ inline void store_global(void* to, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0+%5], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "n"(kFar)
               : "memory");
}
template <int kFar>
__device__ inline void store_global(void* to, float x, float y) {
  asm volatile("st.global.v2.f32 [%0+%3], {%1,%2};" ::"l"(to), "f"(x), "f"(y), "n"(kFar)
               : "memory");
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

// Sixteen bytes as numbers.
template <typename T>
__device__ inline void unpack(float (&x)[16 / sizeof(T)], const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    } else {
      asm("shl.b32 %0, %1, 16;" : "=f"(x[2 * i]) : "r"(words[i]));
      asm("and.b32 %0, %1, 0xffff0000;" : "=f"(x[2 * i + 1]) : "r"(words[i]));
    }
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

// One head's [rows, width] matrix in global memory, of which tiles show the rows that `keep` has.
// `vectors`: every row starts at a multiple of 16 bytes and its elements are adjacent.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride_m, stride_d;
  int rows, width;
  bool vectors;
  Keep keep;

  __device__ Matrix(const Strided& t, int b, int h, int64_t rows, int64_t width,
                    const Keep& keep = Keep())
      : data(static_cast<const T*>(t.data) + b * t.stride[0] + h * t.stride[1]),
        stride_m(t.stride[2]),
        stride_d(t.stride[3]),
        rows(static_cast<int>(rows)),
        width(static_cast<int>(width)),
        vectors(t.vectors),
        keep(keep) {}
  // Rows of which a tile of full width shows all, 16 bytes at once.
  __device__ int plain(int tile_width) const {
    return vectors && width == tile_width && keep.data == nullptr ? rows : 0;
  }
};

// What a lane copies of tiles of one kind: 16 bytes of every kRowsAtOnce-th row.
template <int kThreads, typename Of>
struct Copier {
  static constexpr int kRowsAtOnce = kThreads / Of::kChunks;
  static_assert(kRowsAtOnce * Of::kChunks == kThreads && kRowsAtOnce > 0);
  static_assert(kRowsAtOnce % 8 == 0 || Of::kChunks >= 8);
  int row, col;
  uint32_t to;  // bytes from a tile's base

  // `keep`: in a register, which a kernel may be short of.
  __device__ explicit Copier(bool keep)
      : row(threadIdx.x / Of::kChunks),
        col(threadIdx.x % Of::kChunks * Of::kPer16),
        to(Of::offset(row, col)) {
    if (keep) to = kept_register(to);
  }
  // Its place in a tile kRowsAtOnce * i rows on, but for the bytes of those rows: the permutation
  // of chunks repeats every eight rows.
  template <int kI>
  __device__ uint32_t at(Of tile) const {
    return (tile.base + to) ^ (kI * kRowsAtOnce % 8 * 16);
  }
};

// Starts the copy of rows [row0, row0 + kRows) into the tile; rows outside or not kept and columns
// past the width become 0, also where memory holds NaN. All threads of the block take part. `plain`
// is m.plain(kWidth).
template <int kRows, typename T, int kWidth, int kThreads>
__device__ inline void load_tile(Tile<T, kWidth> tile, const Matrix<T>& m, int row0, int plain,
                                 const Copier<kThreads, Tile<T, kWidth>>& lane) {
  using Dst = Tile<T, kWidth>;
  constexpr int kRowsAtOnce = Copier<kThreads, Dst>::kRowsAtOnce;
  static_assert(kRows % kRowsAtOnce == 0);
  const int64_t step = kRowsAtOnce * m.stride_m;
  const T* from = m.data + (row0 + lane.row) * m.stride_m;
  if (row0 + kRows <= plain) {
    from += lane.col;
    unroll<kRows / kRowsAtOnce>([&](auto i) {
      cp_async16<Dst::down(i * kRowsAtOnce)>(lane.template at<i>(tile), from);
      from += step;
    });
    return;
  }
  from += lane.col * m.stride_d;
  const int inside = max(0, min(Dst::kPer16, m.width - lane.col));
  const int bytes = inside * static_cast<int>(sizeof(T)), left = m.rows - row0 - lane.row;
  if (m.vectors && m.keep.data == nullptr) {
    unroll<kRows / kRowsAtOnce>([&](auto i) {
      cp_async16<Dst::down(i * kRowsAtOnce)>(lane.template at<i>(tile), from,
                                             i * kRowsAtOnce < left ? bytes : 0);
      from += step;
    });
    return;
  }
#pragma unroll 1
  for (int r = 0; r < kRows; r += kRowsAtOnce) {
    const bool on = r < left && m.keep.at(row0 + lane.row + r);
    const uint32_t to = tile.address(lane.row + r, lane.col);
    if (m.vectors) {
      cp_async16(to, from, on ? bytes : 0);
    } else {
      T v[Dst::kPer16];
#pragma unroll
      for (int i = 0; i < Dst::kPer16; ++i) {
        v[i] = on && i < inside ? from[i * m.stride_d] : static_cast<T>(0.0f);
      }
      const uint4 w = *reinterpret_cast<const uint4*>(v);
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(w.x), "r"(w.y), "r"(w.z),
                   "r"(w.w)
                   : "memory");
    }
    from += step;
  }
}
template <int kRows, int kThreads, typename T, int kWidth>
__device__ inline void load_tile(Tile<T, kWidth> tile, const Matrix<T>& m, int row0) {
  const Copier<kThreads, Tile<T, kWidth>> lane(false);
  load_tile<kRows>(tile, m, row0, m.plain(kWidth), lane);
}

// Orders this thread's writes of shared memory, once a barrier has been passed, before their reads
// by wgmma.
template <bool kWgmma>
__device__ inline void fence_async_reads() {
  if constexpr (kWgmma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// body(j, stage) for j in [from, n), tile j loaded by load(j, stage) up to kStages - 1 steps ahead.
// With one stage the load is waited for; with more a tile has one barrier.
template <int kStages, bool kWgmma = false, typename Load, typename Body>
__device__ inline void walk(int from, int n, const Load& load, const Body& body) {
  n = static_cast<int>(kept_register(n));
  if constexpr (kStages == 1) {
    for (int j = from; j < n; ++j) {
      __syncthreads();  // orders the reads of tile j - 1 before its overwriting
      load(j, 0);
      cp_async_commit();
      cp_async_wait<0>();
      fence_async_reads<kWgmma>();
      __syncthreads();  // orders the writes of tile j before its reads
      body(j, 0);
    }
  } else {
    for (int j = 0; j < kStages - 1; ++j) {
      if (from + j < n) load(from + j, j);
      cp_async_commit();
    }
    int stage = 0;
    for (int j = from; j < n; ++j) {
      cp_async_wait<kStages - 2>();
      fence_async_reads<kWgmma>();
      __syncthreads();  // orders tile j's writes before its reads, reads of j - 1 before new writes
      const int next = j + kStages - 1;
      const int free = kStages == 2 ? stage ^ 1 : stage == 0 ? kStages - 1 : stage - 1;
      if (next < n) load(next, free);
      cp_async_commit();
      body(j, stage);
      stage = kStages == 2 ? free : stage == kStages - 1 ? 0 : stage + 1;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace fmm::cuda
