// bi_attention on CPU tensors: allocates results, fills Params, calls the kernel.
#include "../ops.h"
#include "launch.h"

namespace fmm::cpu {
namespace {

BiAttention params(const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,
                   const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y,
                   const OptTensor& bias, at::Tensor& hold, std::optional<double> clamp,
                   double scale, double dropout_p, const OptTensor& seed) {
  FMM_CHECK(qk_x.dim() == 4 && qk_y.dim() == 4 && v_x.dim() == 4 && v_y.dim() == 4, "4 dims");
  BiAttention a{};
  a.B = qk_x.size(0), a.H = qk_x.size(1), a.M = qk_x.size(2), a.D = qk_x.size(3);
  a.N = qk_y.size(2), a.Dv_x = v_x.size(3), a.Dv_y = v_y.size(3);
  check_shape(qk_y, {a.B, a.H, a.N, a.D}, "qk_y");
  check_shape(v_x, {a.B, a.H, a.M, a.Dv_x}, "v_x");
  check_shape(v_y, {a.B, a.H, a.N, a.Dv_y}, "v_y");
  a.qk_x = tensor4(qk_x), a.qk_y = tensor4(qk_y), a.v_x = tensor4(v_x), a.v_y = tensor4(v_y);
  a.bias = bias4(bias, {a.B, a.H, a.M, a.N}, hold);
  a.mask_x = key_mask(mask_x, {a.B, a.M}, "mask_x");
  a.mask_y = key_mask(mask_y, {a.B, a.N}, "mask_y");
  a.scale = static_cast<float>(scale);
  a.clamp = clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::infinity();
  a.dropout = dropout(seed, dropout_p);
  return a;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_attention_fwd(
    const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x, const at::Tensor& v_y,
    const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
    std::optional<double> clamp, double scale, double dropout_p, const OptTensor& seed) {
  at::Tensor hold;
  BiAttention a =
      params(qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, hold, clamp, scale, dropout_p, seed);
  at::Tensor o_x = empty_result({a.B, a.H, a.M, a.Dv_y}, qk_x.options());
  at::Tensor o_y = empty_result({a.B, a.H, a.N, a.Dv_x}, qk_x.options());
  at::Tensor lse_x = empty_result({a.B, a.H, a.M}, qk_x.options().dtype(at::kDouble));
  at::Tensor lse_y = empty_result({a.B, a.H, a.N}, qk_x.options().dtype(at::kDouble));
  a.o_x = o_x.data_ptr(), a.o_y = o_y.data_ptr();
  a.lse_x = lse_x.data_ptr<double>(), a.lse_y = lse_y.data_ptr<double>();
  if (a.B * a.H > 0) kernels().bi_attention_fwd(a, parallel_for);
  return {o_x, o_y, lse_x, lse_y};
}

std::vector<at::Tensor> bi_attention_bwd(
    const at::Tensor& do_x, const at::Tensor& do_y, const OptTensor& dlse_x,
    const OptTensor& dlse_y, const at::Tensor& qk_x, const at::Tensor& qk_y, const at::Tensor& v_x,
    const at::Tensor& v_y, const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
    const at::Tensor& o_x, const at::Tensor& o_y, const at::Tensor& lse_x, const at::Tensor& lse_y,
    std::optional<double> clamp, double scale, double dropout_p, const OptTensor& seed,
    std::array<bool, 5> needs) {
  at::Tensor hold;
  const BiAttention a =
      params(qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, hold, clamp, scale, dropout_p, seed);
  check_shape(do_x, {a.B, a.H, a.M, a.Dv_y}, "do_x");
  check_shape(do_y, {a.B, a.H, a.N, a.Dv_x}, "do_y");
  check_shape(o_x, do_x.sizes(), "o_x");
  check_shape(o_y, do_y.sizes(), "o_y");
  for (const OptTensor& t : {OptTensor(lse_x), dlse_x}) check_shape(t, {a.B, a.H, a.M}, "lse_x");
  for (const OptTensor& t : {OptTensor(lse_y), dlse_y}) check_shape(t, {a.B, a.H, a.N}, "lse_y");
  FMM_CHECK(needs.size() == 5, "needs");
  const at::Tensor lx = contiguous_double(lse_x), ly = contiguous_double(lse_y);
  const at::Tensor dlx = contiguous_float(dlse_x, lse_x);
  const at::Tensor dly = contiguous_float(dlse_y, lse_y);
  BiAttentionGrad g{};
  g.do_x = tensor4(do_x), g.do_y = tensor4(do_y), g.o_x = tensor4(o_x), g.o_y = tensor4(o_y);
  g.lse_x = lx.const_data_ptr<double>(), g.lse_y = ly.const_data_ptr<double>();
  g.dlse_x = dlx.const_data_ptr<float>(), g.dlse_y = dly.const_data_ptr<float>();
  std::vector<at::Tensor> grads;
  auto result = [&](bool need, const at::Tensor& like) -> void* {
    if (!need) return nullptr;
    grads.push_back(empty_result(like.sizes(), like.options()));
    return grads.back().data_ptr();
  };
  g.dqk_x = result(needs[0], qk_x), g.dqk_y = result(needs[1], qk_y);
  g.dv_x = result(needs[2], v_x), g.dv_y = result(needs[3], v_y);
  if (needs[4]) {
    grads.push_back(make_dbias(*bias, g.dbias_stride));
    g.dbias = grads.back().data_ptr<float>();
  }
  if (a.B * a.H > 0) kernels().bi_attention_bwd(a, g, parallel_for);
  if (needs[4]) grads.back() = grads.back().to(bias->scalar_type());
  return grads;
}

namespace {

// x [B, M, C] as every head sees it: queries, keys and values, stride 0 over heads.
BiAttention fusion_params(const at::Tensor& x, const at::Tensor& k, const at::Tensor& v,
                          const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
                          at::Tensor& hold, double dropout_p, const OptTensor& seed) {
  FMM_CHECK(x.dim() == 3 && k.dim() == 4, "x has 3 dims, k 4");
  const at::Tensor heads = x.unsqueeze(1).expand({x.size(0), k.size(1), x.size(1), x.size(2)});
  check_shape(bias, {k.size(0), k.size(1), k.size(2)}, "bias");
  const OptTensor row = bias ? OptTensor(bias->unsqueeze(2)) : OptTensor();
  BiAttention a =
      params(heads, k, heads, v, mask_x, mask_y, row, hold, std::nullopt, 1.0, dropout_p, seed);
  a.sum_heads = true;
  return a;
}

}  // namespace

Four fusion_attention_fwd(const at::Tensor& x, const at::Tensor& k, const at::Tensor& v,
                          const OptTensor& mask_x, const OptTensor& mask_y, const OptTensor& bias,
                          double dropout_p, const OptTensor& seed) {
  at::Tensor hold;
  BiAttention a = fusion_params(x, k, v, mask_x, mask_y, bias, hold, dropout_p, seed);
  at::Tensor o = empty_result({a.B, a.M, a.Dv_y}, x.options());
  at::Tensor z = empty_result({a.B, a.H, a.N, a.D}, x.options());
  at::Tensor lse_x = empty_result({a.B, a.H, a.M}, x.options().dtype(at::kDouble));
  at::Tensor lse_y = empty_result({a.B, a.H, a.N}, x.options().dtype(at::kDouble));
  a.o_x = o.data_ptr(), a.o_y = z.data_ptr();
  a.lse_x = lse_x.data_ptr<double>(), a.lse_y = lse_y.data_ptr<double>();
  if (a.B * a.H > 0) kernels().bi_attention_fwd(a, parallel_for);
  return {o, z, lse_x, lse_y};
}

std::vector<at::Tensor> fusion_attention_bwd(
    const at::Tensor& d_o, const at::Tensor& dz, const OptTensor& dlse_x, const OptTensor& dlse_y,
    const at::Tensor& x, const at::Tensor& k, const at::Tensor& v, const OptTensor& mask_x,
    const OptTensor& mask_y, const OptTensor& bias, const at::Tensor& z, const at::Tensor& lse_x,
    const at::Tensor& lse_y, double dropout_p, const OptTensor& seed, std::array<bool, 4> needs) {
  at::Tensor hold;
  const BiAttention a = fusion_params(x, k, v, mask_x, mask_y, bias, hold, dropout_p, seed);
  check_shape(d_o, {a.B, a.M, a.Dv_y}, "d_o");
  for (const at::Tensor& t : {dz, z}) check_shape(t, {a.B, a.H, a.N, a.D}, "z");
  for (const OptTensor& t : {OptTensor(lse_x), dlse_x}) check_shape(t, {a.B, a.H, a.M}, "lse_x");
  for (const OptTensor& t : {OptTensor(lse_y), dlse_y}) check_shape(t, {a.B, a.H, a.N}, "lse_y");
  const at::Tensor lx = contiguous_double(lse_x), ly = contiguous_double(lse_y);
  const at::Tensor dlx = contiguous_float(dlse_x, lse_x);
  const at::Tensor dly = contiguous_float(dlse_y, lse_y);
  BiAttentionGrad g{};
  g.do_x = tensor4(d_o.unsqueeze(1).expand({a.B, a.H, a.M, a.Dv_y}));
  g.do_y = tensor4(dz), g.o_y = tensor4(z);
  g.lse_x = lx.const_data_ptr<double>(), g.lse_y = ly.const_data_ptr<double>();
  g.dlse_x = dlx.const_data_ptr<float>(), g.dlse_y = dly.const_data_ptr<float>();
  std::vector<at::Tensor> grads;
  auto result = [&](bool need, const at::Tensor& like, const at::TensorOptions& options) -> void* {
    if (!need) return nullptr;
    grads.push_back(empty_result(like.sizes(), options));
    return grads.back().data_ptr();
  };
  g.dqk_x = g.dv_x = result(needs[0], x, x.options());
  g.dqk_y = result(needs[1], k, k.options()), g.dv_y = result(needs[2], v, v.options());
  if (needs[3]) {
    g.dbias = static_cast<float*>(result(true, *bias, bias->options().dtype(at::kFloat)));
    g.dbias_stride[0] = a.H * a.N, g.dbias_stride[1] = a.N, g.dbias_stride[3] = 1;
  }
  if (a.B * a.H > 0) kernels().bi_attention_bwd(a, g, parallel_for);
  if (needs[3]) grads.back() = grads.back().to(bias->scalar_type());
  return grads;
}

}  // namespace fmm::cpu
