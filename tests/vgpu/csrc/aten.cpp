// Every aten operator that has a CUDA kernel, on the virtual device: run the CPU kernel on CPU
// tensors that alias the same memory.  Registered at the CUDA backend key, below autograd and
// autocast, so it serves Python, C++ extensions and autograd's device threads alike.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_set>

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
extern "C" __attribute__((weak)) void vgpu_block(int action, uint64_t addr, size_t size);
extern "C" void* vgpu_host_ptr(const void* p);
namespace {
std::once_flag g_attach;
void attach() {
  std::call_once(g_attach, [] {
    if (!vgpu_block || getenv("PYTORCH_NO_CUDA_MEMORY_CACHING")) return;
    c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(
        [](const c10::CachingDeviceAllocator::TraceEntry& e) {
          using T = c10::CachingDeviceAllocator::TraceEntry;
          switch (e.action_) {
            case T::ALLOC:
              vgpu_block(0, (uint64_t)e.addr_, e.size_);
              break;
            case T::FREE_COMPLETED:
              vgpu_block(1, (uint64_t)e.addr_, e.size_);
              break;
            case T::SEGMENT_ALLOC:
              vgpu_block(2, (uint64_t)e.addr_, e.size_);
              break;
            default:
              break;
          }
        });
  });
}

Tensor cpu_alias(const Tensor& t) {
  TORCH_CHECK(t.layout() == c10::kStrided && t.has_storage(),
              "vgpu: only strided CUDA tensors are supported");
  const auto& s = t.storage();
  auto st = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), s.nbytes(),
      c10::DataPtr(vgpu_host_ptr(s.data()), c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU),
      true);
  Tensor r = at::detail::make_tensor<c10::TensorImpl>(
      std::move(st), c10::DispatchKeySet(DispatchKey::CPU), t.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) r._set_conj(true);
  if (t.is_neg()) r._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}
Tensor to_cuda(const Tensor& c) {  // a fresh CPU result -> device memory
  TORCH_CHECK_NOT_IMPLEMENTED(c.layout() == c10::kStrided, "vgpu: an operator returned a ",
                              c.layout(), " tensor; only strided CUDA tensors are supported");
  auto dev = c10::Device(c10::kCUDA, 0);
  Tensor src = c.resolve_conj().resolve_neg();
  Tensor r =
      at::empty_strided(src.sizes(), src.strides(), src.options().device(dev).pinned_memory(false));
  if (src.numel()) {
    if (src.is_non_overlapping_and_dense())
      memcpy(vgpu_host_ptr(r.mutable_data_ptr()), src.const_data_ptr(), src.nbytes());
    else
      cpu_alias(r).copy_(src);
  }
  if (c.unsafeGetTensorImpl()->is_wrapped_number())
    r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}

struct Pair {
  Tensor dev, cpu;
  const void* data;
};
// Bring a mutated argument's metadata and, after a resize, its data back to the device tensor.
void write_back(const Pair& p) {
  const Tensor &d = p.dev, &c = p.cpu;
  if (c.storage().data() != p.data) {  // the CPU kernel resized it
    if (c.sizes() != d.sizes() || c.strides() != d.strides()) {
      d.resize_(c.sizes());
      if (d.strides() != c.strides() && c.is_non_overlapping_and_dense())
        d.unsafeGetTensorImpl()->set_sizes_and_strides(c.sizes(), c.strides());
    }
    if (c.numel()) cpu_alias(d).copy_(c);
  } else if (c.sizes() != d.sizes() || c.strides() != d.strides())
    d.unsafeGetTensorImpl()->set_sizes_and_strides(c.sizes(), c.strides(), c.storage_offset());
}

const std::unordered_set<std::string> kMixed = {"aten::copy_",
                                                "aten::_copy_from",
                                                "aten::_copy_from_and_resize",
                                                "aten::index",
                                                "aten::index_put_",
                                                "aten::_index_put_impl_",
                                                "aten::_unsafe_index",
                                                "aten::_unsafe_index_put",
                                                "aten::_fused_adam_",
                                                "aten::_fused_adamw_",
                                                "aten::_fused_sgd_",
                                                "aten::_fused_adagrad_",
                                                "aten::_amp_foreach_non_finite_check_and_unscale_",
                                                "aten::_amp_update_scale_",
                                                "aten::_cudnn_rnn",
                                                "aten::_ctc_loss",
                                                "aten::_ctc_loss_backward",
                                                "aten::set_",
                                                "aten::_foreach_copy_",
                                                "aten::segment_reduce",
                                                "aten::_embedding_bag",
                                                "aten::multi_margin_loss",
                                                "aten::nested",
                                                "aten::_pack_padded_sequence",
                                                "aten::is_set_to",
                                                "aten::_assert_async",
                                                "aten::masked_fill",
                                                "aten::masked_fill_"};

uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}
// One draw of the device generator's (seed, offset) names a CPU stream, so that manual_seed,
// get_state/set_state and fork_rng behave as on a device.
uint64_t draw(const std::optional<at::Generator>& g0) {
  at::Generator g =
      g0.has_value() && g0->defined() ? *g0 : at::cuda::detail::getDefaultCUDAGenerator(0);
  TORCH_CHECK(g.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
  auto* cg = at::check_generator<at::CUDAGeneratorImpl>(g);
  std::lock_guard<std::mutex> l(cg->mutex_);
  at::PhiloxCudaState s = cg->philox_cuda_state(4);
  return mix(s.seed_.val * 0x9E3779B97F4A7C15ull + s.offset_.val + 1);
}
std::mutex g_rng;
struct CpuGen {
  at::Generator g;
  Tensor saved;
  std::unique_lock<std::mutex> l;
  bool on = false;
  void use(uint64_t seed) {
    l = std::unique_lock<std::mutex>(g_rng);
    g = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> q(g.mutex());
    saved = g.get_state();
    g.set_current_seed(seed);
    on = true;
  }
  ~CpuGen() {
    if (on) {
      std::lock_guard<std::mutex> q(g.mutex());
      g.set_state(saved);
    }
  }
};

void sticky_check() { C10_CUDA_CHECK(cudaPeekAtLastError()); }

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  {
    cudaError_t e = cudaPeekAtLastError();
    if (e != cudaSuccess) {
      C10_CUDA_CHECK(e);
    }
  }
  const auto& schema = op.schema();
  size_t n = schema.arguments().size();
  size_t base = stack->size() - n;
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::CPU))
    TORCH_CHECK_NOT_IMPLEMENTED(false, "vgpu: ", op.operator_name(),
                                " has no CPU kernel, so the virtual device cannot run it");
  at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<Pair> pairs;
  std::vector<size_t> mutated;
  pairs.reserve(8);
  bool rng = op.hasTag(at::Tag::nondeterministic_seeded), gen_arg = false;
  const Tensor* cpu_dim = nullptr;
  bool any_dev = false;
  auto conv = [&](const Tensor& t, bool mut) -> Tensor {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      if (t.dim() > 0 && t.device().is_cpu()) cpu_dim = &t;
      return t;
    }
    any_dev = true;
    for (size_t i = 0; i < pairs.size(); i++)
      if (pairs[i].dev.is_same(t)) {
        if (mut) mutated.push_back(i);
        return pairs[i].cpu;
      }
    Tensor c = cpu_alias(t);
    if (mut) mutated.push_back(pairs.size());
    pairs.push_back({t, c, c.storage().data()});
    return c;
  };
  for (size_t i = 0; i < n; i++) {
    IValue& v = (*stack)[base + i];
    const auto& arg = schema.arguments()[i];
    bool mut = arg.alias_info() && arg.alias_info()->isWrite();
    if (v.isTensor())
      v = conv(v.toTensor(), mut);
    else if (v.isTensorList()) {
      auto l = v.toTensorVector();
      c10::List<Tensor> o;
      o.reserve(l.size());
      for (auto& t : l) o.push_back(conv(t, mut));
      v = o;
    } else if (v.isOptionalTensorList()) {
      auto l = v.toOptionalTensorList();
      c10::List<std::optional<Tensor>> o;
      for (size_t k = 0; k < l.size(); k++) {
        std::optional<Tensor> t = l.get(k);
        o.push_back(t.has_value() ? std::optional<Tensor>(conv(*t, mut)) : t);
      }
      v = o;
    } else if (v.isDevice() && v.toDevice().is_cuda())
      v = c10::Device(c10::kCPU);
    else if (v.isGenerator()) {
      auto g = v.toGenerator();
      gen_arg = true;
      v = at::detail::createCPUGenerator(draw(g));
    } else if (v.isNone() && arg.type()->kind() == c10::TypeKind::OptionalType &&
               arg.type()->castRaw<c10::OptionalType>()->getElementType()->kind() ==
                   c10::TypeKind::GeneratorType) {
      gen_arg = true;
      v = at::detail::createCPUGenerator(draw(std::nullopt));
    } else if (arg.name() == "pin_memory" && v.isBool())
      v = IValue();
  }
  if (cpu_dim && any_dev && !kMixed.count(op.operator_name().name))
    TORCH_CHECK(false,
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and cpu! (when checking arguments of ",
                op.operator_name(), ")");
  CpuGen cg;
  if (rng && !gen_arg) cg.use(draw(std::nullopt));
  op.callBoxed(stack);
  for (size_t i : mutated) write_back(pairs[i]);
  size_t m = schema.returns().size();
  size_t rb = stack->size() - m;
  auto back = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& p : pairs)
      if (p.cpu.is_same(t)) return p.dev;
    if (t.has_storage())
      for (auto& p : pairs)
        if (t.storage().unsafeGetStorageImpl() == p.cpu.storage().unsafeGetStorageImpl() &&
            t.storage().data() == p.data)
          return p.dev.as_strided(t.sizes(), t.strides(), t.storage_offset());
    return to_cuda(t);
  };
  for (size_t i = 0; i < m; i++) {
    IValue& v = (*stack)[rb + i];
    if (v.isTensor())
      v = back(v.toTensor());
    else if (v.isTensorList()) {
      auto l = v.toTensorVector();
      c10::List<Tensor> o;
      for (auto& t : l) o.push_back(back(t));
      v = o;
    }
  }
}

int64_t sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                   double, bool, std::optional<double>, bool) {
  return 0;
}  // math
// scaled_dot_product_attention picks its backend through a stub that cannot be replaced: the whole
// (composite) operator becomes the differentiable math path.
Tensor sdpa(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
            double p, bool causal, std::optional<double> scale, bool gqa) {
  std::optional<Tensor> m = mask;
  if (m.has_value() && m->defined() && m->scalar_type() == at::kBool)
    m = at::zeros_like(*m, m->options().dtype(q.scalar_type()))
            .masked_fill_(m->logical_not(), -std::numeric_limits<double>::infinity());
  return std::get<0>(
      at::_scaled_dot_product_attention_math(q, k, v, m, p, causal, std::nullopt, scale, gqa));
}
bool no_cudnn_ctc(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, int64_t) {
  return false;
}
bool no_cudnn_ctc_t(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t) {
  return false;
}
bool no_miopen_ctc(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, int64_t) {
  return false;
}
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& go, const Tensor& x, at::IntArrayRef ns,
                                             const Tensor& rstd, const std::optional<Tensor>& w,
                                             std::array<bool, 2> mask) {
  std::vector<int64_t> in, lead;
  for (int64_t d = 0; d < x.dim(); d++) (d < x.dim() - (int64_t)ns.size() ? lead : in).push_back(d);
  Tensor xf = x.to(rstd.scalar_type()), g = go.to(rstd.scalar_type()), h = xf * rstd,
         gw = w.has_value() && w->defined() ? g * w->to(rstd.scalar_type()) : g, gx, gwt;
  if (mask[0]) gx = (rstd * (gw - h * (gw * h).mean(in, true))).to(x.scalar_type());
  if (mask[1] && w.has_value() && w->defined()) {
    gwt = g * h;
    if (!lead.empty()) gwt = gwt.sum(lead);
    gwt = gwt.to(w->scalar_type());
  }
  return {gx, gwt};
}
// Recurrent cells exist only as CUDA kernels; composed here from ordinary operators.
using OT = std::optional<Tensor>;
using T2 = std::tuple<Tensor, Tensor>;
using T3 = std::tuple<Tensor, Tensor, Tensor>;
using T5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
bool has(const OT& t) { return t.has_value() && t->defined(); }
T3 lstm_cell(const Tensor& ig, const Tensor& hg, const Tensor& cx, const OT& ib, const OT& hb) {
  Tensor g = ig + hg;
  if (has(ib)) g = g + *ib;
  if (has(hb)) g = g + *hb;
  auto c = g.chunk(4, 1);
  Tensor i = c[0].sigmoid(), f = c[1].sigmoid(), n = c[2].tanh(), o = c[3].sigmoid(),
         cy = f * cx + i * n;
  return {o * cy.tanh(), cy, at::cat({i, f, n, o}, 1)};
}
T3 lstm_cell_backward(const OT& ghy, const OT& gcy, const Tensor& cx, const Tensor& cy,
                      const Tensor& ws, bool bias) {
  auto c = ws.chunk(4, 1);
  Tensor i = c[0], f = c[1], n = c[2], o = c[3], t = cy.tanh(),
         gh = has(ghy) ? *ghy : at::zeros_like(cx), gc = gh * o * (1 - t * t);
  if (has(gcy)) gc = gc + *gcy;
  Tensor gg = at::cat(
      {gc * n * i * (1 - i), gc * cx * f * (1 - f), gc * i * (1 - n * n), gh * t * o * (1 - o)}, 1);
  return {gg, gc * f, bias ? gg.sum(0) : Tensor()};
}
T2 gru_cell(const Tensor& ig, const Tensor& hg, const Tensor& hx, const OT& ib, const OT& hb) {
  Tensor a = has(ib) ? ig + *ib : ig, b = has(hb) ? hg + *hb : hg;
  auto x = a.chunk(3, 1), h = b.chunk(3, 1);
  Tensor r = (x[0] + h[0]).sigmoid(), z = (x[1] + h[1]).sigmoid(), n = (x[2] + r * h[2]).tanh();
  return {n + z * (hx - n), at::cat({r, z, n, hx, h[2]}, 1)};
}
T5 gru_cell_backward(const Tensor& gy, const Tensor& ws, bool bias) {
  auto c = ws.chunk(5, 1);
  Tensor r = c[0], z = c[1], n = c[2], hx = c[3], hn = c[4];
  Tensor gz = gy * (hx - n) * (1 - z) * z, gn = gy * (1 - z) * (1 - n * n),
         gr = gn * hn * (1 - r) * r, gi = at::cat({gr, gz, gn}, 1),
         gh = at::cat({gr, gz, gn * r}, 1);
  return {gi, gh, gy * z, bias ? gi.sum(0) : Tensor(), bias ? gh.sum(0) : Tensor()};
}
// Products of 16-bit factors in fp32 exist only as CUDA kernels.
Tensor& bmm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  return at::bmm_out(out, a.to(type), b.to(type));
}
Tensor& baddbmm_dtype_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType type,
                          const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return at::baddbmm_out(out, c, a.to(type), b.to(type), beta, alpha);
}
const char* kKeep[] = {"aten::empty",
                       "aten::empty_strided",
                       "aten::resize_",
                       "aten::set_",
                       "aten::record_stream",
                       "aten::is_set_to",
                       "aten::_efficientzerotensor",
                       "aten::_pin_memory",
                       "aten::is_pinned",
                       "aten::as_strided",
                       "aten::view",
                       "aten::_reshape_alias",
                       "aten::unfold",
                       "aten::_fused_sdp_choice",
                       "aten::_has_same_storage_numel",
                       "aten::_conj_physical_keep"};
const char* kExtra[] = {"aten::copy_",
                        "aten::convolution",
                        "aten::_convolution",
                        "aten::convolution_backward",
                        "aten::_pack_padded_sequence",
                        "aten::nonzero_numpy_keep"};

int g_count = 0;
void install() {
  std::unordered_set<std::string> keep(std::begin(kKeep), std::end(kKeep)),
      extra(std::begin(kExtra), std::end(kExtra));
  struct Quiet : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } quiet;
  c10::WarningUtils::WarningHandlerGuard g(&quiet);
  static torch::Library* lib = new torch::Library(
      torch::Library::IMPL, "aten", c10::make_optional(DispatchKey::CUDA), __FILE__, __LINE__);
  auto& D = c10::Dispatcher::singleton();
  for (const auto& name : D.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    if (keep.count(name.name)) continue;
    auto op = D.findOp(name);
    if (!op.has_value() || !op->hasSchema()) continue;
    if (!op->hasKernelForDispatchKey(DispatchKey::CUDA) && !(extra.count(name.name))) continue;
    bool view = false;
    for (const auto& r : op->schema().returns())
      if (r.alias_info() && !r.alias_info()->isWrite()) view = true;
    if (view || name.name.rfind("aten::_thnn_fused_", 0) == 0 ||
        ((name.name == "aten::bmm" || name.name == "aten::baddbmm") &&
         name.overload_name == "dtype_out") ||
        name.name == "aten::_use_cudnn_ctc_loss" || name.name == "aten::_use_miopen_ctc_loss" ||
        name.name == "aten::_fused_rms_norm_backward")
      continue;
    std::string nm =
        name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    lib->impl(nm.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    g_count++;
  }
  lib->impl("_fused_sdp_choice", torch::CppFunction::makeFromUnboxedFunction(&sdp_choice));
  lib->impl("_thnn_fused_lstm_cell", torch::CppFunction::makeFromUnboxedFunction(&lstm_cell));
  lib->impl("_thnn_fused_lstm_cell_backward_impl",
            torch::CppFunction::makeFromUnboxedFunction(&lstm_cell_backward));
  lib->impl("_thnn_fused_gru_cell", torch::CppFunction::makeFromUnboxedFunction(&gru_cell));
  lib->impl("_thnn_fused_gru_cell_backward",
            torch::CppFunction::makeFromUnboxedFunction(&gru_cell_backward));
  lib->impl("bmm.dtype_out", torch::CppFunction::makeFromUnboxedFunction(&bmm_dtype_out));
  lib->impl("baddbmm.dtype_out", torch::CppFunction::makeFromUnboxedFunction(&baddbmm_dtype_out));
  lib->impl("_use_miopen_ctc_loss", torch::CppFunction::makeFromUnboxedFunction(&no_miopen_ctc));
  lib->impl("_use_miopen_ctc_loss.Tensor",
            torch::CppFunction::makeFromUnboxedFunction(&no_cudnn_ctc_t));
  lib->impl("_fused_rms_norm_backward",
            torch::CppFunction::makeFromUnboxedFunction(&rms_norm_backward));
  lib->impl("_use_cudnn_ctc_loss", torch::CppFunction::makeFromUnboxedFunction(&no_cudnn_ctc));
  lib->impl("_use_cudnn_ctc_loss.Tensor",
            torch::CppFunction::makeFromUnboxedFunction(&no_cudnn_ctc_t));
  lib->impl("scaled_dot_product_attention", torch::CppFunction::makeFromUnboxedFunction(&sdpa));
  static torch::Library* alib =
      new torch::Library(torch::Library::IMPL, "aten",
                         c10::make_optional(DispatchKey::AutogradCUDA), __FILE__, __LINE__);
  alib->impl("scaled_dot_product_attention", torch::CppFunction::makeFromUnboxedFunction(&sdpa));
  at::globalContext().setUserEnabledCuDNN(false);  // cuDNN never runs here
}
}  // namespace
extern "C" __attribute__((visibility("default"))) int vgpu_aten_install() {
  if (!g_count) install();
  return g_count;
}
extern "C" __attribute__((visibility("default"))) void vgpu_aten_attach() {
  try {
    attach();
  } catch (const std::exception&) {
    fprintf(stderr,
            "vgpu: this allocator backend has no trace hook: bounds are checked per device "
            "allocation\n");
  }
}
