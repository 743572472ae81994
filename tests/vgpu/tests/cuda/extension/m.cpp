#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include "k.h"
using at::Tensor;
#define PRE(t)                                        \
  TORCH_CHECK(t.is_cuda(), "expected a CUDA tensor"); \
  c10::cuda::CUDAGuard guard(t.device());             \
  auto st = c10::cuda::getCurrentCUDAStream()
Tensor saxpy(double a, Tensor x, Tensor y, int64_t block) {
  PRE(x);
  auto o = y.contiguous().clone();
  auto xc = x.contiguous();
  run_saxpy(a, xc.data_ptr<float>(), o.data_ptr<float>(), o.numel(), block, st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return o;
}
void saxpy_oob(double a, Tensor x, Tensor y) {
  PRE(x);
  run_saxpy_oob(a, x.data_ptr<float>(), y.data_ptr<float>(), y.numel(), st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
Tensor rowsum(Tensor x, int64_t opt_in, bool sync) {
  PRE(x);
  auto o = at::empty({x.size(0)}, x.options());
  C10_CUDA_CHECK(
      run_rowsum(x.data_ptr<float>(), o.data_ptr<float>(), x.size(0), x.size(1), opt_in, sync, st));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return o;
}
std::tuple<Tensor, Tensor> histogram(Tensor x, int64_t bins) {
  PRE(x);
  auto h = at::zeros({bins}, x.options());
  auto w = at::zeros({bins}, x.options().dtype(at::kFloat));
  run_histogram(x.data_ptr<int>(), h.data_ptr<int>(), w.data_ptr<float>(), x.numel(), st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {h, w};
}
void hscale(Tensor x, double a) {
  PRE(x);
  run_hscale(x.data_ptr(), a, x.numel() / 2, st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
int64_t use_const(Tensor tab, Tensor y) {
  PRE(y);
  int c = run_const(tab.data_ptr<float>(), y.data_ptr<float>(), y.numel(), st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return c;
}
void bug(int64_t w, Tensor x) {
  PRE(x);
  run_bug(w, x.data_ptr(), st);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
std::vector<int64_t> kattrs() {
  int o[5];
  attrs(o);
  return {o, o + 5};
}
int64_t stream_id() { return (int64_t)c10::cuda::getCurrentCUDAStream().stream(); }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("saxpy", &saxpy);
  m.def("saxpy_oob", &saxpy_oob);
  m.def("rowsum", &rowsum);
  m.def("histogram", &histogram);
  m.def("hscale", &hscale);
  m.def("use_const", &use_const);
  m.def("bug", &bug);
  m.def("kattrs", &kattrs);
  m.def("stream_id", &stream_id);
}
