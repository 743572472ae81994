// A block of the backward owns rows of one stream, a, and keeps their gradients in registers while
// it walks the other, b. Where its rows are all of a, the gradients of b's are finished on the way.
#pragma once

#include "ds.cuh"

namespace fmm::cuda {

// Shared memory of a block: a's tiles, then per stage b's tiles; then per stage b's statistics;
// where a's and b's rows come from.
template <bool kRow, bool kCol, typename T, int kWidth, typename S>
struct BwdLayout {
  static constexpr int kEach = 1 + kRow + kCol;
  static constexpr uint32_t kOwn = S::kRows * kWidth * sizeof(T);
  static constexpr uint32_t kWalked = S::kCols * kWidth * sizeof(T);
  static constexpr uint32_t kStat = kStats * S::kCols * sizeof(float);
  static constexpr uint32_t kTileBytes = kEach * (kOwn + S::kStages * kWalked);
  static constexpr uint32_t kSources = kTileBytes + S::kStages * kStat;
  static constexpr uint32_t kBytes = kSources + 2 * sizeof(Sources<T>);
  // Warps that share rows compute s of a part of the columns each, and exchange what they find.
  static constexpr bool kExchange = S::kSplit == 2 && S::kCols >= 32;
  // What goes through shared memory, behind these: ds, and pf_col exchanged or pf_row to finish
  // b's rows.
  using Through = Tile<T, S::kCols, true>;
  static constexpr uint32_t kThrough = (kBytes + 15) / 16 * 16;
  static constexpr uint32_t kEachThrough = S::kRows * Through::kRowBytes;
  static constexpr uint32_t kBytesThrough = kThrough + 2 * kEachThrough;

  static __device__ Tiles<T, kWidth> own(uint32_t base) {
    return {{base}, {base + kCol * kOwn}, {base + (kEach - 1) * kOwn}};
  }
  // b's v serves the row softmax, its d_o the column softmax.
  static __device__ Tiles<T, kWidth> walked(uint32_t base, int stage) {
    const uint32_t at = base + kEach * (kOwn + stage * kWalked);
    return {{at}, {at + kRow * kWalked}, {at + (kEach - 1) * kWalked}};
  }
  static __device__ uint32_t stats(uint32_t base, int stage) {
    return base + kTileBytes + stage * kStat;
  }
};

// Writes dqk and dv of rows [n0, end) of b, at most a tile, from all of a's. `stage`: shared memory
// that nothing else uses now.
//   dqk_b = scale * ds.T @ qk_a,  dv_b = pf_row.T @ do_a
template <typename S, typename T, int kWidth>
__device__ inline void finish_tile(const Pair& p, int head, int n0, int end,
                                   const Tiles<T, kWidth>& own, Tile<T, S::kCols, true> ds,
                                   Tile<T, S::kCols, true> pf_row, uint32_t stage,
                                   const Lanes<Tile<T, kWidth>>& lanes) {
  constexpr int kGroups = S::kCols / 16, kDC = kWidth / 8 * kGroups / S::kWarps;
  static_assert(S::kWarps % kGroups == 0 && kDC * 8 * S::kWarps == kWidth * kGroups);
  using Store = Storer<T, kDC>;
  static_assert(S::kWarps * 16 * Store::Stage::kRowBytes <= 3 * S::kCols * kWidth * sizeof(T));
  const int warp = threadIdx.x / 32;
  const int row0 = warp % kGroups * 16, col0 = warp / kGroups * 8 * kDC, left = end - n0 - row0;
  if (left <= 0) return;
  const Lanes<Tile<T, S::kCols, true>> lanes_through;
  const Store store({stage + warp * 16 * Store::Stage::kRowBytes}, false);
  const auto write = [&](void* out, int64_t columns, Tile<T, S::kCols, true> from,
                         Tile<T, kWidth> by, const auto& scale) {
    if (out == nullptr) return;
    const int width = static_cast<int>(columns), cols = width - col0;
    float c[1][kDC][4];
    clear(c);
    dot_trans<S::kRows>(c, from, row0, by, col0, static_cast<int>(p.a.rows), lanes_through, lanes);
    scale(c[0]);
    store(store.start(out, head * p.b.rows + n0 + row0, width) + col0,
          store.whole(left, width, cols), left, width, cols, c[0]);
  };
  write(p.b.dqk, p.width, ds, own.qk, [&](auto& c) {
#pragma unroll
    for (int i = 0; i < 4 * kDC; ++i) c[i / 4][i % 4] *= p.scale;
  });
  write(p.b.dv, p.b.width_v, pf_row, own.d_o, [](auto&) {});
}

// Gradients of the block's rows of a, by the softmax over a's rows (kRow), over b's (kCol) or both.
// kFinish: they are all of a's rows, and b's gradients are written too.
template <bool kRow, bool kCol, bool kFinish, typename T, int kWidth, typename S>
__device__ inline void own_rows(const Attention& all, char* smem) {
  using L = BwdLayout<kRow, kCol, T, kWidth, S>;
  constexpr int kParts = L::kExchange ? S::kSplit : 1;
  constexpr int kNT = S::kNT / kParts, kMT = S::kMT, kDT = kWidth / 8 / S::kSplit;
  using By = Dots<kInFours<T, S::kStrips>>;
  static_assert(!kFinish || S::kSplit == 1);
  const RowBlock<S::kRows> block(all);
  const Pair& p = all.pair[block.side];
  const int head = block.head, b = block.b, h = block.h, warp = threadIdx.x / 32;
  const int m0 = kFinish ? 0 : block.m0;
  const int heads = static_cast<int>(all.B * all.H);
  const int col0 = S::part_of(warp) * 8 * kDT;
  const int part0 = kParts > 1 ? S::part_of(warp) * 8 * kNT : 0;  // the warp's columns of a tile
  constexpr bool kHold = kMT == 1 && kWidth * sizeof(T) < 1024;   // places in registers
  // Opaque to the compiler, which would hold what it can compute before the loop.
  const auto hide = [](int x) { return kHold ? x : static_cast<int>(kept_register(x)); };
  // The warp's m-th 16 rows.
  const auto row_of = [warp](int m) { return (m * S::kStrips + S::strip_of(warp)) * 16; };
  const uint32_t base = shared_address(smem);
  const Tiles<T, kWidth> own = L::own(base);

  // In shared memory: between loads they take no registers.
  Sources<T>& walked = *reinterpret_cast<Sources<T>*>(smem + L::kSources);
  if (threadIdx.x == 0) walked = Sources<T>(p.b, p.width, b, h, kCol, kWidth);
  const Copier<S::kThreads, Tile<T, kWidth>> copier(kHold);
  load_tiles<S::kRows, kCol, kRow>(own, Sources<T>(p.a, p.width, b, h, kRow, kWidth), m0, copier);
  __syncthreads();  // orders the write of `walked` before its reads
  // Of the warp's m-th 16 rows: held, or read anew for each tile where registers are short.
  const auto read_stats = [&](int m) {
    const Keep keys(p.a.keep, hide(b));
    return RowStats<!kFinish>(p.a, keys, hide(head), m0 + hide(row_of(m)), heads);
  };
  const auto held = [&] {
    if constexpr (kFinish) {
      return 0;
    } else {
      return read_stats(0);
    }
  }();
  const auto stats = [&](int m) {
    if constexpr (kFinish) {
      return read_stats(m);
    } else {
      return held;
    }
  };
  const Lanes<Tile<T, kWidth>> lanes(kHold);
  float dqk[kMT][1][kDT][4], dv[kMT][1][kDT][4];
  unroll<kMT>([&](auto m) { clear(dqk[m]), clear(dv[m]); });
  const auto load = [&](int j, int stage) {
    const Tiles<T, kWidth> t = L::walked(base, stage);
    const int n0 = j * S::kCols;
    load_tiles<S::kCols, kRow, kCol>(t, walked, n0, copier);
    if constexpr (kCol) {
      const uint32_t to = L::stats(base, stage);
      load_stats<S::kCols, S::kThreads>(to, p.b, head, n0, heads);
    }
  };
  const int first = block.first_tile(S::kCols), end = block.end_tile(S::kCols);
  walk<S::kStages, By::kTogether>(first, end, load, [&](int j, int stage) {
    const Tiles<T, kWidth> other = L::walked(base, stage);
    const typename L::Through ds_all{base + L::kThrough}, pf_all{ds_all.base + L::kEachThrough};
    unroll<kMT>([&](auto m) {
      const int row0 = hide(row_of(m));
      // The first of the rows that are multiplied together.
      if (kFinish && (By::kTogether ? row0 & ~63 : row0) >= p.a.rows) return;
      float ds[1][kNT][4], pf_row[1][kNT][4], pf_col[1][kNT][4];
      uint64_t passes;
      ds_tile<kRow, kCol, S::kCols, By>(ds, pf_row, pf_col, passes, all, p, hide(b), hide(h), own,
                                        other.from(part0), lanes, L::stats(base, stage) + part0 * 4,
                                        stats(m), row0, m0 + row0, j * S::kCols + part0);
      if (!p.plain) {
#pragma unroll
        for (int i = 0; i < kNT * 4; ++i) {
          ds[0][i / 4][i % 4] = gate(passes, i, ds[0][i / 4][i % 4]);
        }
      }
      if constexpr (kFinish) {
        if (row0 + 16 > p.a.rows) {
#pragma unroll
          for (int i = 0; i < kNT * 4; ++i) {
            const bool on =
                row0 + static_cast<int>(threadIdx.x) % 32 / 4 + i % 4 / 2 * 8 < p.a.rows;
            if (!on) ds[0][i / 4][i % 4] = pf_row[0][i / 4][i % 4] = 0.0f;
          }
        }
        FragA<T> frag[1][S::kCols / kStep<T>];
#pragma unroll
        for (int i = 0; i < S::kCols / kStep<T>; ++i) from_acc(frag[0][i], &ds[0][2 * i]);
        put_frags(spot_of(ds_all, row0), frag[0]);
        put_tile(spot_of(pf_all, row0), pf_row[0]);
        By::start_frags(dqk[m], frag, other.qk, 0, lanes);
        By::start_regs(dv[m], pf_col, other.d_o, 0, lanes);
      } else if constexpr (L::kExchange) {
        put_tile(spot_of(ds_all, row0, part0), ds[0]);
        if constexpr (kCol) put_tile(spot_of(pf_all, row0, part0), pf_col[0]);
        sync_warps<S::kSplit>(S::strip_of(warp));  // orders these writes before their reads
        const auto add = [&](float (&c)[1][kDT][4], typename L::Through from, Tile<T, kWidth> by) {
          FragA<T> frag[1][S::kCols / kStep<T>];
          const auto at = Lanes<typename L::Through>().a(from, row0);
          unroll<S::kCols / kStep<T>>([&](auto i) { load_a<0, i * kStep<T>>(frag[0][i], at); });
          By::start_frags(c, frag, by, col0, lanes);
        };
        add(dqk[m], ds_all, other.qk);
        if constexpr (kCol) add(dv[m], pf_all, other.d_o);
      } else {
        By::start_regs(dqk[m], ds, other.qk, col0, lanes);
        if constexpr (kCol) By::start_regs(dv[m], pf_col, other.d_o, col0, lanes);
      }
      By::template wait<0>(dqk[m]);
      By::template wait<0>(dv[m]);
    });
    if constexpr (kFinish) {
      __syncthreads();  // orders the writes of ds and pf_row, and b's tile's last reads
      finish_tile<S>(p, hide(head), j * S::kCols, block.end, own, ds_all, pf_all, other.qk.base,
                     lanes);
    }
  });

  __syncthreads();  // orders the last reads of a's tiles before the results that take their place
  using Store = Storer<T, kDT>;
  const Store store({base + warp * 16 * Store::Stage::kRowBytes}, false);
  // Anew, for registers' sake.
  const RowBlock<S::kRows> out(all, kept_register(blockIdx.x));
  unroll<kMT>([&](auto m) {
    const int from = out.m0 + row_of(m);
    if (kFinish && from >= p.a.rows) return;
    const int64_t first = out.head * p.a.rows + from, rows = p.a.rows - from;
    float* part = p.part + (out.head * p.chunks + out.share) * p.a.rows * (p.width + p.a.width_v);
    const auto write = [&](void* to, float* share, int64_t columns, const float (&c)[kDT][4]) {
      if (to == nullptr) return;
      const int width = static_cast<int>(columns), cols = width - col0;
      if (p.chunks > 1) {
        put_rows(share, from, p.a.rows, width, col0, c);
      } else {
        store(store.start(to, first, width) + col0, store.whole(rows, width, cols), rows, width,
              cols, c);
      }
    };
#pragma unroll
    for (int i = 0; i < 4 * kDT; ++i) dqk[m][0][i / 4][i % 4] *= p.scale;
    write(p.a.dqk, part, p.width, dqk[m][0]);
    if constexpr (kCol) {
      const RowStats<!kFinish> keys = stats(m);
      if (!keys.all()) {
#pragma unroll
        for (int i = 0; i < 4 * kDT; ++i) {
          if (!keys.keep(i % 4 / 2)) dv[m][0][i / 4][i % 4] = 0.0f;
        }
      }
      write(p.a.dv, part + p.a.rows * p.width, p.a.width_v, dv[m][0]);
    }
  });
}

}  // namespace fmm::cuda
