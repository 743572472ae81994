// Launchers by device: torch tensors in, torch tensors out. Arguments as in the schemas of
// bindings.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace fmm {

using OptTensor = std::optional<at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

#define FMM_OPS                                                                                   \
  Four bi_attention_fwd(const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,    \
                        const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y,  \
                        const OptTensor& bias, std::optional<double> clamp, double scale,         \
                        double dropout_p, const OptTensor& seed);                                 \
  std::vector<at::Tensor> bi_attention_bwd(                                                       \
      const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,                    \
      const OptTensor& dlse_y, const at::Tensor& qk_x, const at::Tensor& qk_y,                    \
      const at::Tensor& v_x, const at::Tensor& v_y, const OptTensor& mask_x,                      \
      const OptTensor& mask_y, const OptTensor& bias, const at::Tensor& o_x,                      \
      const at::Tensor& o_y, const at::Tensor& lse_x, const at::Tensor& lse_y,                    \
      std::optional<double> clamp, double scale, double dropout_p, const OptTensor& seed,         \
      std::array<bool, 5> needs);                                                                 \
  Four co_attention_fwd(const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,      \
                        const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y,      \
                        const OptTensor& mask_x, const OptTensor& mask_y,                         \
                        const OptTensor& bias_xy, const OptTensor& bias_yx, double scale_x,       \
                        double scale_y, double dropout_p, const OptTensor& seed);                 \
  std::vector<at::Tensor> co_attention_bwd(                                                       \
      const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,                    \
      const OptTensor& dlse_y, const at::Tensor& q_x, const at::Tensor& k_x,                      \
      const at::Tensor& v_x, const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y, \
      const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias_xy,                 \
      const OptTensor& bias_yx, const at::Tensor& o_x, const at::Tensor& o_y,                     \
      const at::Tensor& lse_x, const at::Tensor& lse_y, double scale_x, double scale_y,           \
      double dropout_p, const OptTensor& seed, std::array<bool, 8> needs);                        \
  std::tuple<at::Tensor, at::Tensor> contrastive_loss_fwd(                                        \
      const at::Tensor& x, const at::Tensor& y, const at::Tensor& logit_scale,                    \
      const OptTensor& positives, const OptTensor& ids_x, const OptTensor& ids_y, bool ignore,    \
      bool normalize, bool want_x, bool want_y, const OptTensor& dots);                           \
  std::vector<at::Tensor> contrastive_loss_bwd(                                                   \
      const at::Tensor& coef_x, const at::Tensor& coef_y, const at::Tensor& x,                    \
      const at::Tensor& y, const at::Tensor& logit_scale, const OptTensor& positives,             \
      const OptTensor& ids_x, const OptTensor& ids_y, bool ignore, bool normalize,                \
      std::array<bool, 3> needs, const OptTensor& dots);                                          \
  at::Tensor contrastive_rows(const at::Tensor& stats, const OptTensor& dloss, double smoothing); \
  at::Tensor sigmoid_loss_fwd(const at::Tensor& x, const at::Tensor& y,                           \
                              const at::Tensor& logit_scale, const at::Tensor& logit_bias,        \
                              const OptTensor& positives, const OptTensor& ids_x,                 \
                              const OptTensor& ids_y, bool normalize, const OptTensor& dots);     \
  std::vector<at::Tensor> sigmoid_loss_bwd(                                                       \
      const at::Tensor& dloss, const at::Tensor& x, const at::Tensor& y,                          \
      const at::Tensor& logit_scale, const at::Tensor& logit_bias, const OptTensor& positives,    \
      const OptTensor& ids_x, const OptTensor& ids_y, bool normalize, std::array<bool, 4> needs,  \
      const OptTensor& dots);

namespace cpu {
FMM_OPS

// Memory for raw products that a loss's forward leaves for its backward.
at::Tensor kept_dots(int64_t n);

Four fusion_attention_fwd(const at::Tensor& x, const at::Tensor& k, const at::Tensor& v,
                          const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
                          double dropout_p, const OptTensor& seed);
std::vector<at::Tensor> fusion_attention_bwd(
    const at::Tensor& d_o, const at::Tensor& dz, const OptTensor& dlse_x, const OptTensor& dlse_y,
    const at::Tensor& x, const at::Tensor& k, const at::Tensor& v, const OptTensor& mask_x,
    const OptTensor& mask_y, const OptTensor& bias, const at::Tensor& z, const at::Tensor& lse_x,
    const at::Tensor& lse_y, double dropout_p, const OptTensor& seed, std::array<bool, 4> needs);
}  // namespace cpu
namespace cuda {
FMM_OPS

// Sets the bytes that a loss's chunk of scores may take; returns what they were.
int64_t pair_workspace(int64_t bytes);
}  // namespace cuda

}  // namespace fmm
