// CUDA impls of the ops whose schemas csrc/bindings.cpp defines; the module carries build facts and
// the launch geometry of every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "../ops.h"
#include "attention_kernels.h"
#include "pair_loss.h"

#define FMM_IMPL(name) m.impl(#name, &fmm::cuda::name)

TORCH_LIBRARY_IMPL(_fusedmm_C, CUDA, m) {
  FMM_IMPL(bi_attention_fwd);
  FMM_IMPL(bi_attention_bwd);
  FMM_IMPL(co_attention_fwd);
  FMM_IMPL(co_attention_bwd);
  FMM_IMPL(contrastive_loss_fwd);
  FMM_IMPL(contrastive_loss_bwd);
  FMM_IMPL(contrastive_rows);
  FMM_IMPL(sigmoid_loss_fwd);
  FMM_IMPL(sigmoid_loss_bwd);
}

namespace {

// One dict a tile kernel: its name and template arguments as the compiler mangles them, the tile,
// and what a launch asks for.
std::vector<pybind11::dict> kernels() {
  using fmm::DType;
  using fmm::cuda::Kernel;
  using fmm::cuda::Softmax;
  const std::pair<DType, const char*> dtypes[] = {
      {DType::kHalf, "6__half"}, {DType::kBFloat16, "13__nv_bfloat16"}, {DType::kFloat, "f"}};
  const std::pair<Softmax, const char*> softmaxes[] = {
      {Softmax::kRow, "Lb1ELb0E"}, {Softmax::kColumn, "Lb0ELb1E"}, {Softmax::kBoth, "Lb1ELb1E"}};
  const std::pair<std::string, fmm::cuda::PairKernels (*)(DType, int)> losses[] = {
      {"NS0_11ContrastiveE", fmm::cuda::contrastive_kernels},
      {"NS0_7SigmoidE", fmm::cuda::sigmoid_kernels}};
  std::vector<pybind11::dict> all;
  const auto add = [&](const char* name, const std::string& arguments, const Kernel& k) {
    if (k.function == nullptr) return;
    pybind11::dict d;
    d["kernel"] = name, d["arguments"] = arguments;
    d["rows"] = k.rows, d["cols"] = k.cols, d["threads"] = k.threads, d["smem"] = k.smem;
    all.push_back(d);
  };
  for (const auto& [dtype, mangled] : dtypes) {
    for (const int width : {32, 64, 128, 256}) {
      const std::string tail = std::string(mangled) + "Li" + std::to_string(width) + "E";
      for (int height = 0; height <= fmm::cuda::kHighest; ++height) {
        const std::string last = tail + "Li" + std::to_string(height) + "E";
        add("attend_fwd_kernel", last, fmm::cuda::attend_fwd(dtype, width, height));
        for (const auto& [which, flags] : softmaxes) {
          const Kernel k = fmm::cuda::owner_bwd(dtype, width, which, height);
          add("owner_bwd_kernel", flags + last, k);
        }
      }
      for (const auto& [which, flags] : softmaxes) {
        add("dbias_kernel", flags + tail, fmm::cuda::dbias(dtype, width, which));
      }
      const auto residents = [&](const char* name, Kernel (*of)(DType, int, int64_t)) {
        int before = 0;
        for (const int cols : {32, 64, 128, 256}) {
          const Kernel k = of(dtype, width, cols);
          if (k.cols != before) add(name, tail + "Li" + std::to_string(k.cols) + "E", k);
          before = k.cols;
        }
      };
      residents("resident_fwd_kernel", fmm::cuda::resident_fwd);
      residents("resident_bwd_kernel", fmm::cuda::resident_bwd);
      for (const auto& [loss, of] : losses) {
        const fmm::cuda::PairKernels k = of(dtype, width);
        add("fused_fwd_kernel", loss + tail, k.fused_fwd);
        add("fused_bwd_kernel", loss + tail, k.fused_bwd);
      }
    }
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fusedmm's CUDA kernels; ops are in torch.ops._fusedmm_C.";
  m.attr("archs") = FMM_CUDA_ARCHS;
  m.def("kernels", &kernels);
  m.def("pair_workspace", &fmm::cuda::pair_workspace, pybind11::arg("bytes"),
        "Sets the bytes that a loss's chunk of scores may take, not between a forward and its "
        "backward; returns what they were.");
}
