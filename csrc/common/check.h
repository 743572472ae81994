// What torch.ops' reachability makes necessary: sizes agree, so that kernels stay in bounds. Users'
// mistakes are caught, with better words, in fusedmm/problem.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#define FMM_CHECK(cond, ...) TORCH_CHECK(cond, "internal: ", __VA_ARGS__)

namespace fmm {

inline void check_shape(const at::Tensor& t, at::IntArrayRef expected, const char* name) {
  FMM_CHECK(t.sizes() == expected, name, ": expected shape ", expected, ", got ", t.sizes());
}

inline void check_shape(const std::optional<at::Tensor>& t, at::IntArrayRef expected,
                        const char* name) {
  if (t) check_shape(*t, expected, name);
}

}  // namespace fmm
