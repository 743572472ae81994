// The CPU launchers' common ground: torch's thread pool as the kernels' ParallelFor, and results.
#pragma once

#include <ATen/Parallel.h>

#include "../common/torch_params.h"
#include "huge_pages.h"
#include "kernels.h"

namespace fmm::cpu {

inline void parallel_for(int64_t n, const Body& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
}

// A tensor that a kernel fills.
inline at::Tensor make_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
  prefer_huge_pages(t.data_ptr(), t.nbytes());
  return t;
}

}  // namespace fmm::cpu
