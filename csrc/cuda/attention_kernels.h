// The attention kernels by dtype and padded width, as launchers see them. No torch headers.
#pragma once

#include "../common/switch.h"
#include "attention.h"

namespace fmm::cuda {

// What a launch needs to know of a kernel.
struct Kernel {
  const void* function = nullptr;
  int rows = 0, cols = 0;  // of a tile
  int threads = 0, smem = 0;
  int blocks = 2;        // that a multiprocessor's registers suffice for
  bool spreads = false;  // a tall tile, but for few blocks too: the lower one takes as long a block
};

// make(height) with the height as a constant, a Kernel without function above kMost.
template <int kMost, typename Make>
Kernel by_height(int height, const Make& make) {
  if (height == kMost) return make(std::integral_constant<int, kMost>());
  if constexpr (kMost > 0) return by_height<kMost - 1>(height, make);
  return {};
}

// Which softmax's gradient a kernel of the backward computes: that over a row of s, whose keys are
// the walked stream's tokens, over a column, or both.
enum class Softmax { kRow, kColumn, kBoth };

// Short streams of up to `cols` tokens; a Kernel without function where there is none.
Kernel resident_fwd(DType dtype, int width, int64_t cols);
Kernel merge(DType dtype);  // after resident_fwd, where a head has several chunks
Kernel resident_bwd(DType dtype, int width, int64_t cols);
Kernel sum_chunks(DType dtype);  // after resident_bwd, likewise
// `height`: which of the tiles, up to kHighest; a Kernel without function where there is none.
constexpr int kHighest = 2;
Kernel attend_fwd(DType dtype, int width, int height);
Kernel delta(DType dtype);
Kernel owner_bwd(DType dtype, int width, Softmax which, int height);
Kernel dbias(DType dtype, int width, Softmax which);

}  // namespace fmm::cuda
