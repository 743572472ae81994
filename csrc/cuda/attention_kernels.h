// The attention kernels by dtype and padded width, as launchers see them. No torch headers.
#pragma once

#include "../common/switch.h"
#include "attention.h"

namespace fmm::cuda {

// What a launch needs to know of a kernel.
struct Kernel {
  const void* function;
  int rows, cols;  // of a tile
  int threads, smem;
};

// Which softmax's gradient a kernel of the backward computes: that over a row of s, whose keys are
// the walked stream's tokens, over a column, or both.
enum class Softmax { kRow, kColumn, kBoth };

Kernel attend_fwd(DType dtype, int width);
Kernel delta(DType dtype);
Kernel owner_bwd(DType dtype, int width, Softmax which);
Kernel dbias(DType dtype, int width, Softmax which);  // kRow or kBoth

}  // namespace fmm::cuda
