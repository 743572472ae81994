// Plain CUDA (no torch), driven through ctypes by test_more.py.
#include <cooperative_groups.h>

#include <cstdio>
namespace cg = cooperative_groups;
__global__ void two_phase(int* a, int* b) {
  cg::grid_group g = cg::this_grid();
  a[g.thread_rank()] = g.thread_rank();
  g.sync();
  b[g.thread_rank()] = a[g.num_threads() - 1 - g.thread_rank()];
}
__global__ void spin(volatile int* f) { while (*f == 0); }
__global__ void dyn(float* x, int n) {
  extern __shared__ float s[];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[n - 1 - threadIdx.x];
}
struct Big {
  double d;
  char c;
  float f[5];
  long long l;
};
__global__ void structs(Big b, char c, short s, Big* o, float3 v) {
  *o = b;
  o->d += c + s + v.x + v.y + v.z;
}
static int coop_(bool coop) {
  int *a, *b;
  cudaMalloc(&a, 512);
  cudaMalloc(&b, 512);
  void* args[] = {&a, &b};
  cudaError_t e;
  if (coop)
    e = cudaLaunchCooperativeKernel((void*)two_phase, dim3(4), dim3(32), args, 0, 0);
  else {
    two_phase<<<4, 32>>>(a, b);
    e = cudaGetLastError();
  }
  int h[128];
  if (!e) e = cudaMemcpy(h, b, 512, cudaMemcpyDeviceToHost);
  return e ? -(int)e : h[0];
}
extern "C" int coop() { return coop_(true); }
extern "C" int not_coop() { return coop_(false); }
extern "C" int spinner() {
  int* a;
  cudaMalloc(&a, 512);
  cudaMemset(a, 0, 512);
  spin<<<1, 32>>>(a);
  return cudaDeviceSynchronize();
}
extern "C" int launch_ex() {
  float* a;
  cudaMalloc(&a, 256);
  float h[64];
  for (int i = 0; i < 64; i++) h[i] = i;
  cudaMemcpy(a, h, 256, cudaMemcpyHostToDevice);
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(1);
  c.blockDim = dim3(64);
  c.dynamicSmemBytes = 256;
  cudaLaunchKernelEx(&c, dyn, a, 64);
  cudaMemcpy(h, a, 256, cudaMemcpyDeviceToHost);
  return h[0];
}
extern "C" int pass_structs() {
  Big b = {1.5, 'x', {1, 2, 3, 4, 5}, 1ll << 40}, *o, r;
  cudaMallocManaged(&o, sizeof b);
  structs<<<1, 1>>>(b, 2, 300, o, make_float3(1, 2, 3));
  cudaDeviceSynchronize();
  cudaMemcpy(&r, o, sizeof r, cudaMemcpyDefault);
  return r.d == 1.5 + 2 + 300 + 6 && r.c == 'x' && r.f[4] == 5 && r.l == 1ll << 40;
}
extern "C" int bad_copies() {
  char *d, h[64];
  cudaMalloc(&d, 64);
  int n = 0;
  n += cudaMemcpy(d, h, 65, cudaMemcpyHostToDevice) == cudaErrorInvalidValue;
  n += cudaMemcpy(h, h + 8, 8, cudaMemcpyHostToDevice) == cudaErrorInvalidValue;
  n += cudaMemset(d + 60, 0, 8) == cudaErrorInvalidValue;
  n += cudaFree(d + 8) == cudaErrorInvalidValue;
  cudaFree(d);
  n += cudaFree(d) == cudaErrorInvalidValue;
  n += cudaMemcpy(h, d, 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue;
  cudaStream_t s;
  cudaStreamCreate(&s);
  n += cudaStreamSynchronize(s) == cudaSuccess;
  cudaEvent_t e, f;
  cudaEventCreate(&e);
  cudaEventCreateWithFlags(&f, cudaEventDisableTiming);
  cudaEventRecord(e, s);
  cudaEventRecord(f, s);
  float ms;
  n += cudaEventElapsedTime(&ms, e, f) == cudaErrorInvalidResourceHandle;
  return n;
}
