// Tiles of raw products between a forward and its backward, as many of each row of tiles, evenly
// spaced, for all threads to gain alike. Of bf16 inputs they are 16-bit multiples of a step, half
// the bytes; a tile where that could move a probability by more than its rounding to bf16 does is
// computed again.
#pragma once

#include "../pair_loss.h"
#include "tile.h"

namespace fmm::cpu::FMM_ISA {

static_assert(kDotsTile == int64_t{kBlock} * kBlock);

class KeptDots {
 public:
  explicit KeptDots(const PairLoss& a)
      : data_(a.dots),
        tiles_y_(ceil_div(a.N, kBlock)),
        each_(a.dots_tiles / std::max<int64_t>(1, a.G * ceil_div(a.M, kBlock))),
        size_(dots_tile_floats(a.x.dtype)) {}

  bool as_multiples() const { return size_ != kDotsTile; }
  // Where tile y of row x (over all problems) is kept, nullptr: it is not.
  float* at(int64_t x, int64_t y) const {
    const int64_t slot = y * each_ / tiles_y_;
    return (y + 1) * each_ / tiles_y_ > slot ? data_ + (x * each_ + slot) * size_ : nullptr;
  }

  // Leaves rows x nv vectors of `dots`, which scores are at most `scale` times of.
  static void put(float* tile, const float* dots, int rows, int nv, float scale) {
    const float most = largest(dots, rows, nv), step = most / kMost;
    tile[0] = most >= kLeast && step * scale <= kCoarsest ? step : 0.0f;
    if (tile[0] == 0.0f) return;
    auto* to = reinterpret_cast<int16_t*>(tile + kDotsHeader);
    const Vec inverse = splat(kMost / most);
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < nv; ++v) {
        const int at = i * kBlock + v * kLanes;
        const ShortVec n = to_short(load(dots + at) * inverse);
        __builtin_memcpy(to + at, &n, sizeof n);
      }
    }
  }

  // Whether the tile could be had; then it is in `dots`.
  static bool get(const float* tile, float* dots, int rows, int nv) {
    const Vec step = splat(tile[0]);
    if (tile[0] == 0.0f) return false;
    const auto* from = reinterpret_cast<const int16_t*>(tile + kDotsHeader);
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < nv; ++v) {
        const int at = i * kBlock + v * kLanes;
        ShortVec n;
        __builtin_memcpy(&n, from + at, sizeof n);
        store(dots + at, to_float(n) * step);
      }
    }
    return true;
  }

 private:
  static constexpr float kMost = 32767.0f;
  static constexpr float kLeast = 1e-30f;            // below it, 1 / step overflows
  static constexpr float kCoarsest = 1.0f / 256.0f;  // step of a score: exp is off by 2^-9 at most

  // Largest magnitude; infinite or NaN if any is.
  static float largest(const float* dots, int rows, int nv) {
    IVec top{};
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < nv; ++v) {
        const IVec bits = (IVec)load(dots + i * kBlock + v * kLanes) & 0x7fffffff;
        top = bits > top ? bits : top;
      }
    }
    float most = 0.0f;
    for (int i = 0; i < kLanes; ++i) {
      float x;
      const int32_t bits = top[i];
      __builtin_memcpy(&x, &bits, sizeof x);
      most = x > most || x != x ? x : most;
    }
    return most;
  }

  float* data_;
  int64_t tiles_y_, each_, size_;
};

}  // namespace fmm::cpu::FMM_ISA
