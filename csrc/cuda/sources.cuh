// What a block works on, tiles of one stream of attention, and where their rows come from.
#pragma once

#include "tile.cuh"

namespace fmm::cuda {

// Rows [m0, m0 + kRows) of pair[side].a, which walk rows [from, end) of b.
template <int kRows>
struct RowBlock {
  int side, head, b, h, m0, share, from, end;

  __device__ explicit RowBlock(const Attention& all, unsigned block = blockIdx.x)
      : side(block < all.first ? 0 : 1) {
    const Pair& p = all.pair[side];
    const unsigned chunks = static_cast<unsigned>(p.chunks);
    const Place at(block - (side ? all.first : 0), ceil_div(p.a.rows, kRows) * chunks, all.H);
    head = at.head, b = at.b, h = at.h;
    const unsigned tile = static_cast<unsigned>(at.block) / chunks;
    m0 = tile * kRows, share = at.block - tile * chunks;
    from = share * static_cast<int>(p.chunk);
    end = static_cast<int>(chunks == 1 ? p.b.rows : min(from + p.chunk, p.b.rows));
  }
  // The tiles of b: [first_tile, end_tile).
  __device__ int first_tile(unsigned cols) const { return static_cast<unsigned>(from) / cols; }
  __device__ int end_tile(unsigned cols) const {
    return (static_cast<unsigned>(end) + cols - 1) / cols;
  }
};

// Rows of a stream: qk; v as keys of the row softmax or, of the other stream, the column softmax;
// d_o, the gradients of their results.
template <typename T, int kWidth>
struct Tiles {
  Tile<T, kWidth> qk, v, d_o;

  // From row `row` on, a multiple of eight.
  __device__ Tiles from(int row) const {
    const uint32_t by = row * Tile<T, kWidth>::kRowBytes;
    return {{qk.base + by}, {v.base + by}, {d_o.base + by}};
  }
};

// Where a stream's rows come from: qk, v if its tokens are keys, d_o if they are queries in a
// backward. What is a key alone may hold anything where it is masked. Those of a walked stream lie
// in shared memory: between loads they take no registers.
template <typename T>
struct Sources {
  Matrix<T> qk, v, d_o;
  int plain;  // of all that are there

  __device__ Sources(const Stream& s, int64_t width, int b, int h, bool queries, int tile_width)
      : qk(s.qk, b, h, s.rows, width, queries ? Keep() : Keep(s.keep, b)),
        v(s.v, b, h, s.rows, s.width_v, Keep(s.keep, b)),
        d_o(s.d_o, b, h, s.rows, s.width_o),
        plain(qk.plain(tile_width)) {
    if (v.data) plain = min(plain, v.plain(tile_width));
    if (d_o.data) plain = min(plain, d_o.plain(tile_width));
  }
};

template <int kRows, bool kV, bool kGrad, typename T, int kWidth, int kThreads>
__device__ inline void load_tiles(const Tiles<T, kWidth>& t, const Sources<T>& s, int row0,
                                  const Copier<kThreads, Tile<T, kWidth>>& lane) {
  load_tile<kRows>(t.qk, s.qk, row0, s.plain, lane);
  if constexpr (kV) load_tile<kRows>(t.v, s.v, row0, s.plain, lane);
  if constexpr (kGrad) load_tile<kRows>(t.d_o, s.d_o, row0, s.plain, lane);
}

}  // namespace fmm::cuda
