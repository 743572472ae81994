// The CPU launchers' common ground: torch's thread pool as the kernels' ParallelFor.
#pragma once

#include <ATen/Parallel.h>

#include "../common/torch_params.h"
#include "kernels.h"
#include "result_memory.h"

namespace fmm::cpu {

inline void parallel_for(int64_t n, const Body& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace fmm::cpu
