// CUDA impls of the ops whose schemas csrc/bindings.cpp defines; the module carries build facts.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "../ops.h"

#define FMM_IMPL(name) m.impl(#name, &fmm::cuda::name)

TORCH_LIBRARY_IMPL(_fusedmm_C, CUDA, m) {
  FMM_IMPL(bi_attention_fwd);
  FMM_IMPL(bi_attention_bwd);
  FMM_IMPL(co_attention_fwd);
  FMM_IMPL(co_attention_bwd);
}

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fusedmm's CUDA kernels; ops are in torch.ops._fusedmm_C.";
  m.attr("archs") = FMM_CUDA_ARCHS;
}
