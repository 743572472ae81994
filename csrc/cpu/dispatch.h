// The instruction sets compiled in and usable here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace fmm::cpu {

// Best first; never empty.
std::vector<const Kernels*> available();

// FLOP/s of register-only products on `threads` threads: what kernels are measured against.
double fma_peak(bool bf16, int64_t threads);

}  // namespace fmm::cpu
