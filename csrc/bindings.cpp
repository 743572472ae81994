// Every schema and the impls for CPU tensors (csrc/cuda/bindings.cpp has those for CUDA); the
// pybind11 module carries what is not a tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "ops.h"

TORCH_LIBRARY(_fusedmm_C, m) {
  m.def(
      "bi_attention_fwd(Tensor qk_x, Tensor qk_y, Tensor v_x, Tensor v_y, Tensor? mask_x, "
      "Tensor? mask_y, Tensor? bias, float? clamp, float scale, float dropout_p, Tensor? seed) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bi_attention_bwd(Tensor do_x, Tensor do_y, Tensor? dlse_x, Tensor? dlse_y, Tensor qk_x, "
      "Tensor qk_y, Tensor v_x, Tensor v_y, Tensor? mask_x, Tensor? mask_y, Tensor? bias, "
      "Tensor o_x, Tensor o_y, Tensor lse_x, Tensor lse_y, float? clamp, float scale, "
      "float dropout_p, Tensor? seed, bool[5] needs) -> Tensor[]");
  m.def(
      "fusion_attention_fwd(Tensor x, Tensor k, Tensor v, Tensor? mask_x, Tensor? mask_y, "
      "Tensor? bias, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "fusion_attention_bwd(Tensor d_o, Tensor dz, Tensor? dlse_x, Tensor? dlse_y, Tensor x, "
      "Tensor k, Tensor v, Tensor? mask_x, Tensor? mask_y, Tensor? bias, Tensor z, Tensor lse_x, "
      "Tensor lse_y, float dropout_p, Tensor? seed, bool[4] needs) -> Tensor[]");
  m.def(
      "co_attention_fwd(Tensor q_x, Tensor k_x, Tensor v_x, Tensor q_y, Tensor k_y, Tensor v_y, "
      "Tensor? mask_x, Tensor? mask_y, Tensor? bias_xy, Tensor? bias_yx, float scale_x, "
      "float scale_y, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "co_attention_bwd(Tensor do_x, Tensor do_y, Tensor? dlse_x, Tensor? dlse_y, Tensor q_x, "
      "Tensor k_x, Tensor v_x, Tensor q_y, Tensor k_y, Tensor v_y, Tensor? mask_x, "
      "Tensor? mask_y, Tensor? bias_xy, Tensor? bias_yx, Tensor o_x, Tensor o_y, Tensor lse_x, "
      "Tensor lse_y, float scale_x, float scale_y, float dropout_p, Tensor? seed, bool[8] needs) "
      "-> Tensor[]");
  m.def(
      "contrastive_loss_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? positives, "
      "Tensor? ids_x, Tensor? ids_y, bool ignore, bool normalize, bool want_x, bool want_y, "
      "Tensor(a!)? dots=None) -> (Tensor, Tensor)");
  m.def(
      "contrastive_loss_bwd(Tensor coef_x, Tensor coef_y, Tensor x, Tensor y, Tensor logit_scale, "
      "Tensor? positives, Tensor? ids_x, Tensor? ids_y, bool ignore, bool normalize, "
      "bool[3] needs, Tensor? dots=None) -> Tensor[]");
  m.def("contrastive_rows(Tensor stats, Tensor? dloss, float smoothing) -> Tensor");
  m.def(
      "sigmoid_loss_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, "
      "Tensor? positives, Tensor? ids_x, Tensor? ids_y, bool normalize, Tensor(a!)? dots=None) "
      "-> Tensor");
  m.def(
      "sigmoid_loss_bwd(Tensor dloss, Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, "
      "Tensor? positives, Tensor? ids_x, Tensor? ids_y, bool normalize, bool[4] needs, "
      "Tensor? dots=None) -> Tensor[]");
}

TORCH_LIBRARY_FRAGMENT(_fusedmm_C, m) { m.def("kept_dots(int n) -> Tensor", &fmm::cpu::kept_dots); }

#define FMM_IMPL(ns, name) m.impl(#name, &fmm::ns::name)
#define FMM_IMPLS(ns)                 \
  FMM_IMPL(ns, bi_attention_fwd);     \
  FMM_IMPL(ns, bi_attention_bwd);     \
  FMM_IMPL(ns, co_attention_fwd);     \
  FMM_IMPL(ns, co_attention_bwd);     \
  FMM_IMPL(ns, contrastive_loss_fwd); \
  FMM_IMPL(ns, contrastive_loss_bwd); \
  FMM_IMPL(ns, contrastive_rows);     \
  FMM_IMPL(ns, sigmoid_loss_fwd);     \
  FMM_IMPL(ns, sigmoid_loss_bwd)

TORCH_LIBRARY_IMPL(_fusedmm_C, CPU, m) {
  FMM_IMPLS(cpu);
  FMM_IMPL(cpu, fusion_attention_fwd);
  FMM_IMPL(cpu, fusion_attention_bwd);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fusedmm's native kernels: build information; ops are in torch.ops._fusedmm_C.";
  m.def("cpu_isa", [] { return std::string(fmm::cpu::kernels().isa); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const auto* k : fmm::cpu::available()) names.emplace_back(k->isa);
    return names;
  });
  m.def("fma_peak", &fmm::cpu::fma_peak, pybind11::arg("bf16"), pybind11::arg("threads"));
}
