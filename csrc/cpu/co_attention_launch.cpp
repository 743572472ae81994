// co_attention on CPU tensors: allocates results, fills Params, calls the kernel.
#include "../ops.h"
#include "launch.h"

namespace fmm::cpu {
namespace {

AttentionSide side(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const OptTensor& mask, const OptTensor& bias, at::Tensor& hold, double scale) {
  FMM_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "4 dims");
  AttentionSide s{};
  const int64_t B = q.size(0), H = q.size(1);
  s.M = q.size(2), s.D = q.size(3), s.N = k.size(2), s.Dv = v.size(3);
  check_shape(k, {B, H, s.N, s.D}, "k");
  check_shape(v, {B, H, s.N, s.Dv}, "v");
  s.q = tensor4(q), s.k = tensor4(k), s.v = tensor4(v);
  s.bias = bias4(bias, {B, H, s.M, s.N}, hold);
  s.mask = key_mask(mask, {B, s.N}, "mask");
  s.scale = static_cast<float>(scale);
  return s;
}

struct Held {
  at::Tensor bias_x, bias_y;
};

CoAttention params(const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,
                   const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y,
                   const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias_xy,
                   const OptTensor& bias_yx, Held& hold, double scale_x, double scale_y,
                   double dropout_p, const OptTensor& seed) {
  CoAttention a{};
  a.side[0] = side(q_x, k_y, v_y, mask_y, bias_xy, hold.bias_x, scale_x);
  a.side[1] = side(q_y, k_x, v_x, mask_x, bias_yx, hold.bias_y, scale_y);
  a.B = q_x.size(0), a.H = q_x.size(1);
  FMM_CHECK(q_y.size(0) == a.B && q_y.size(1) == a.H, "q_y: batch and heads");
  a.dropout = dropout(seed, dropout_p);
  return a;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> co_attention_fwd(
    const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x, const at::Tensor& q_y,
    const at::Tensor& k_y, const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y,
    const OptTensor& bias_xy, const OptTensor& bias_yx, double scale_x, double scale_y,
    double dropout_p, const OptTensor& seed) {
  Held hold;
  CoAttention a = params(q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, hold,
                         scale_x, scale_y, dropout_p, seed);
  at::Tensor o[2], lse[2];
  for (int i = 0; i < 2; ++i) {
    AttentionSide& s = a.side[i];
    o[i] = empty_result({a.B, a.H, s.M, s.Dv}, q_x.options());
    lse[i] = empty_result({a.B, a.H, s.M}, q_x.options().dtype(at::kDouble));
    s.o = o[i].data_ptr(), s.lse = lse[i].data_ptr<double>();
  }
  if (a.B * a.H > 0) kernels().co_attention_fwd(a, parallel_for);
  return {o[0], o[1], lse[0], lse[1]};
}

std::vector<at::Tensor> co_attention_bwd(
    const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,
    const OptTensor& dlse_y, const at::Tensor& q_x, const at::Tensor& k_x, const at::Tensor& v_x,
    const at::Tensor& q_y, const at::Tensor& k_y, const at::Tensor& v_y, const OptTensor& mask_x,
    const OptTensor& mask_y, const OptTensor& bias_xy, const OptTensor& bias_yx,
    const at::Tensor& o_x, const at::Tensor& o_y, const at::Tensor& lse_x, const at::Tensor& lse_y,
    double scale_x, double scale_y, double dropout_p, const OptTensor& seed,
    std::array<bool, 8> needs) {
  Held hold;
  const CoAttention a = params(q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, hold,
                               scale_x, scale_y, dropout_p, seed);
  FMM_CHECK(needs.size() == 8, "needs");
  std::vector<at::Tensor> grads;
  auto result = [&](bool need, const at::Tensor& like) -> void* {
    if (!need) return nullptr;
    grads.push_back(empty_result(like.sizes(), like.options()));
    return grads.back().data_ptr();
  };
  CoAttentionGrad g{};
  g.side[0].dq = result(needs[0], q_x), g.side[1].dk = result(needs[1], k_x);
  g.side[1].dv = result(needs[2], v_x), g.side[1].dq = result(needs[3], q_y);
  g.side[0].dk = result(needs[4], k_y), g.side[0].dv = result(needs[5], v_y);
  const at::Tensor d_o[2] = {do_x, do_y}, o[2] = {o_x, o_y};
  const at::Tensor lse[2] = {contiguous_double(lse_x), contiguous_double(lse_y)};
  const at::Tensor dlse[2] = {contiguous_float(dlse_x, lse_x), contiguous_float(dlse_y, lse_y)};
  const OptTensor bias[2] = {bias_xy, bias_yx};
  const size_t plain = grads.size();
  for (int i = 0; i < 2; ++i) {
    const AttentionSide& s = a.side[i];
    AttentionSideGrad& sg = g.side[i];
    check_shape(d_o[i], {a.B, a.H, s.M, s.Dv}, "do");
    check_shape(o[i], {a.B, a.H, s.M, s.Dv}, "o");
    check_shape(lse[i], {a.B, a.H, s.M}, "lse");
    check_shape(dlse[i], {a.B, a.H, s.M}, "dlse");
    sg.d_o = tensor4(d_o[i]), sg.o = tensor4(o[i]);
    sg.lse = lse[i].const_data_ptr<double>(), sg.dlse = dlse[i].const_data_ptr<float>();
    if (needs[6 + i]) {
      grads.push_back(make_dbias(*bias[i], sg.dbias_stride));
      sg.dbias = grads.back().data_ptr<float>();
    }
  }
  if (a.B * a.H > 0) kernels().co_attention_bwd(a, g, parallel_for);
  for (size_t i = plain, k = needs[6] ? 0 : 1; i < grads.size(); ++i, ++k) {
    grads[i] = grads[i].to(bias[k]->scalar_type());
  }
  return grads;
}

}  // namespace fmm::cpu
