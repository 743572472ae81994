// Dropout factors by Philox4x32-10, bit for bit those of the other backends.
#pragma once

#include "tile.h"

namespace fmm::cpu::FMM_ISA {

struct Philox {
  uint32_t word[4];
};

FMM_INLINE Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// factor[i][j] of the tile at (m0, n0); `swapped`: tile rows are the problem's n, columns its m.
inline void dropout_tile(float* factor, const Dropout& drop, int64_t bh, int direction,
                         bool swapped, int64_t row0, int64_t col0, int rows, int cols) {
  const auto c2 = static_cast<uint32_t>(bh), c3 = static_cast<uint32_t>(direction);
  for (int i = 0; i < rows; ++i) {
    float* out = factor + i * kBlock;
    for (int j = 0; j < cols; ++j) {
      const auto m = static_cast<uint32_t>(swapped ? col0 + j : row0 + i);
      const auto n = static_cast<uint32_t>(swapped ? row0 + i : col0 + j);
      const Philox r = philox(n / 4, m, c2, c3, drop.seed);
      if (!swapped && n % 4 == 0 && j + 4 <= cols) {
        for (int w = 0; w < 4; ++w) out[j + w] = r.word[w] >= drop.threshold ? drop.factor : 0.0f;
        j += 3;
      } else {
        out[j] = r.word[n % 4] >= drop.threshold ? drop.factor : 0.0f;
      }
    }
    for (int j = cols; j < round_up(cols, kLanes); ++j) out[j] = 0.0f;
  }
}

}  // namespace fmm::cpu::FMM_ISA
