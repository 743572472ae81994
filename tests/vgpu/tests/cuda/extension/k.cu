#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>

#include "k.h"
__global__ void saxpy(float a, const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
__global__ void saxpy_oob(float a, const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = a * x[i] + y[i];
}
// sum of each row of x [rows, n]; the row is staged in dynamic shared memory
template <bool SYNC>
__global__ void rowsum(const float* x, float* out, int n) {
  extern __shared__ float row[];
  const float* p = x + (size_t)blockIdx.x * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = p[i];
  if (SYNC) __syncthreads();
  __shared__ float part[32];
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += row[n - 1 - i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffff, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffff, s, o);
    if (!threadIdx.x) out[blockIdx.x] = s;
  }
}
__global__ void histogram(const int* x, int* h, float* w, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(h + x[i], 1);
    atomicAdd(w + x[i], 0.5f);
  }
}
__global__ void hscale(__half2* x, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = __hmul2(x[i], __float2half2_rn(a));
}
__constant__ float c_tab[8];
__device__ int g_calls = 5;
__global__ void use_const(float* y) {
  y[threadIdx.x] = c_tab[threadIdx.x % 8];
  if (!threadIdx.x) atomicAdd(&g_calls, 1);
}
__global__ void uninit(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void misaligned(char* p) { *(int*)(p + 1) = 7; }
__global__ void trap_k(int* p) {
  if (threadIdx.x == 3) asm volatile("trap;");
  p[threadIdx.x] = 1;
}
__global__ void assert_k(const int* p) { assert(p[threadIdx.x] > 0); }
__global__ void diverge(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 40) {
    s[threadIdx.x] = 1;
    __syncthreads();
  } else {
    s[threadIdx.x] = 2;
    asm volatile("bar.sync 1, 64;");
  }
  y[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void null_k(float* y, const float* p) { y[threadIdx.x] = p[threadIdx.x]; }
__global__ void __launch_bounds__(128) bounded(float* y) { y[threadIdx.x] = 1.f; }
__global__ void hello(int n) {
  if (threadIdx.x < n) printf("hello from thread %d of block %d\n", threadIdx.x, blockIdx.x);
}

void run_saxpy(float a, const float* x, float* y, int n, int block, cudaStream_t s) {
  saxpy<<<(n + block - 1) / block, block, 0, s>>>(a, x, y, n);
}
void run_saxpy_oob(float a, const float* x, float* y, int n, cudaStream_t s) {
  saxpy_oob<<<(n + 256) / 256, 256, 0, s>>>(a, x, y, n);
}
cudaError_t run_rowsum(const float* x, float* o, int rows, int n, int opt_in, bool sync,
                       cudaStream_t s) {
  auto f = sync ? rowsum<true> : rowsum<false>;
  size_t sm = n * sizeof(float);
  if (opt_in) {
    cudaError_t e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         opt_in > 1 ? opt_in : (int)sm);
    if (e) return e;
  }
  f<<<rows, 256, sm, s>>>(x, o, n);
  return cudaSuccess;
}
void run_histogram(const int* x, int* h, float* w, int n, cudaStream_t s) {
  histogram<<<(n + 127) / 128, 128, 0, s>>>(x, h, w, n);
}
void run_hscale(void* x, float a, int n, cudaStream_t s) {
  hscale<<<(n + 127) / 128, 128, 0, s>>>((__half2*)x, a, n);
}
int run_const(const float* tab, float* y, int n, cudaStream_t s) {
  cudaMemcpyToSymbolAsync(c_tab, tab, 32, 0, cudaMemcpyHostToDevice, s);
  use_const<<<1, n, 0, s>>>(y);
  int c = 0;
  cudaMemcpyFromSymbol(&c, g_calls, 4);
  return c;
}
void run_bug(int which, void* p, cudaStream_t s) {
  switch (which) {
    case 0:
      uninit<<<1, 64, 0, s>>>((float*)p);
      break;
    case 1:
      misaligned<<<1, 1, 0, s>>>((char*)p);
      break;
    case 2:
      trap_k<<<1, 32, 0, s>>>((int*)p);
      break;
    case 3:
      assert_k<<<1, 32, 0, s>>>((int*)p);
      break;
    case 4:
      diverge<<<1, 64, 0, s>>>((float*)p);
      break;
    case 5:
      null_k<<<1, 32, 0, s>>>((float*)p, nullptr);
      break;
    case 6:
      bounded<<<1, 256, 0, s>>>((float*)p);
      break;
    case 7:
      null_k<<<1, 2048, 0, s>>>((float*)p, (float*)p);
      break;
    case 8:
      hello<<<2, 32, 0, s>>>(2);
      break;
    case 9:
      null_k<<<0, 32, 0, s>>>((float*)p, (float*)p);
      break;
  }
}
void attrs(int* out) {
  cudaFuncAttributes a;
  cudaFuncGetAttributes(&a, (const void*)rowsum<true>);
  out[0] = a.numRegs;
  out[1] = a.sharedSizeBytes;
  out[2] = a.maxThreadsPerBlock;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(out + 3, rowsum<true>, 256, 40000);
  out[4] = a.maxDynamicSharedSizeBytes;
}
