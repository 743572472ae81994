// A tensor as kernels with 16-byte loads take it.
#pragma once

#include "../common/torch_params.h"
#include "attention.h"

namespace fmm::cuda {

inline Strided strided(const at::Tensor& t) {
  Strided r;
  static_cast<Tensor4&>(r) = tensor4(t);
  const int64_t size = t.element_size();
  r.vectors = r.stride[3] == 1 && reinterpret_cast<uintptr_t>(r.data) % 16 == 0;
  for (int d = 0; d < 3; ++d) r.vectors = r.vectors && r.stride[d] * size % 16 == 0;
  return r;
}

}  // namespace fmm::cuda
