#include <cuda_fp16.h>
#include <cuda_pipeline.h>
extern "C" __global__ void copy(const float* x, float* o, int n, int extra) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + extra) o[i] = x[i];
}
extern "C" __global__ void rd_before(const float* x, float* o) {
  o[threadIdx.x] = x[(int)threadIdx.x - 1];
}
extern "C" __global__ void misalign(const char* x, float* o) {
  o[threadIdx.x] = *(const float*)(x + 4 * threadIdx.x + 2);
}
extern "C" __global__ void vec_oob(const float4* x, float4* o, int n) {
  int i = threadIdx.x;
  if (i < n) o[i] = x[i];
}
template <bool SYNC>
__device__ void turn(const float* x, float* o) {
  __shared__ float s[256];
  int t = threadIdx.x;
  s[t ^ 3] = x[t];
  if (SYNC) __syncthreads();
  o[t] = s[(t + 100) % 256];
}
extern "C" __global__ void turn_ok(const float* x, float* o) { turn<true>(x, o); }
extern "C" __global__ void turn_bad(const float* x, float* o) { turn<false>(x, o); }
template <bool SYNC>
__device__ void war(const float* x, float* o) {
  __shared__ float s[128];
  int t = threadIdx.x;
  float a = 0;
  s[t] = x[t];
  __syncthreads();
  for (int k = 0; k < 3; k++) {
    a += s[(t + 37) & 127];
    if (SYNC) __syncthreads();
    s[t] = a;
    __syncthreads();
  }
  o[t] = a;
}
extern "C" __global__ void war_ok(const float* x, float* o) { war<true>(x, o); }
extern "C" __global__ void war_bad(const float* x, float* o) { war<false>(x, o); }
extern "C" __global__ void waw_bad(float* o) {
  __shared__ float s[1];
  if (threadIdx.x % 32 == 0) s[0] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = s[0];
}
template <int W>
__device__ void cpa(const float* x, float* o) {
  __shared__ float s[2][128];
  int t = threadIdx.x;
  for (int k = 0; k < 2; k++) {
    __pipeline_memcpy_async(&s[k][t], &x[k * 128 + t], 4);
    __pipeline_commit();
  }
  __pipeline_wait_prior(W);
  __syncthreads();
  o[t] = s[0][127 - t] + (W == 0 ? s[1][t] : 0.f);
}
extern "C" __global__ void cpa_ok(const float* x, float* o) { cpa<0>(x, o); }
extern "C" __global__ void cpa_ok1(const float* x, float* o) { cpa<1>(x, o); }
extern "C" __global__ void cpa_bad(const float* x, float* o) { cpa<2>(x, o); }
extern "C" __global__ void cpa_nosync(const float* x, float* o) {
  __shared__ float s[128];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[t], &x[t], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  o[t] = s[127 - t];
}
extern "C" __global__ void cpa_late(float* x, float* o) {
  __shared__ float s[32];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[t], &x[t], 4);
  __pipeline_commit();
  x[t] = -1;
  __pipeline_wait_prior(0);
  __syncwarp();
  o[t] = s[t];
}
extern "C" __global__ void cpa_over(const float* x, float* o) {
  __shared__ float s[32];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[t], &x[t], 4);
  __pipeline_commit();
  s[t] = 2;
  __pipeline_wait_prior(0);
  o[t] = s[t];
}
extern "C" __global__ void uninit(float* o) {
  __shared__ float s[128];
  int t = threadIdx.x;
  if (t != 77) s[t] = t;
  __syncthreads();
  o[t] = s[t];
}
extern "C" __global__ void divbar(float* o) {
  __shared__ float s[64];
  int t = threadIdx.x;
  if (t < 16) {
    s[t] = t;
    __syncthreads();
    s[t + 16] = 1;
  } else {
    s[t + 16] = t;
  }
  __syncthreads();
  o[t] = s[t & 15];
}
extern "C" __global__ void skipbar(float* o) {
  int t = threadIdx.x;
  if (t < 32) asm volatile("bar.sync 0;");
  asm volatile("bar.sync 1, 128;");
  o[t] = t;
}
extern "C" __global__ void exited(float* o) {
  int t = threadIdx.x;
  if (t >= 40) return;
  __syncthreads();
  o[t] = t;
}
extern "C" __global__ void badshfl(int* o) {
  int t = threadIdx.x;
  if (t < 16) o[t] = __shfl_sync(0xffffffffu, t, 3);
  __syncwarp();
  o[t] += 1;
}
extern "C" __global__ void wrongmask(int* o) {
  int t = threadIdx.x;
  if (t < 16) o[t] = __shfl_sync(0xffu, t, 3);
}
extern "C" __global__ void loop(int* o) {
  volatile int* p = o;
  while (*p == 0) {
  }
}
extern "C" __global__ void local_oob(int* o, int k) {
  int a[8];
  for (int i = 0; i < 8; i++) a[i] = o[i];
  o[threadIdx.x] = a[k];
}
template <bool S>
__device__ void wsum(const float* x, float* o) {
  __shared__ float s[32];
  int t = threadIdx.x;
  s[t] = x[t];
  for (int k = 16; k; k >>= 1) {
    if (S) __syncwarp();
    float v = s[(t + k) & 31];
    if (S) __syncwarp();
    s[t] += v;
  }
  o[t] = s[t];
}
extern "C" __global__ void wsum_ok(const float* x, float* o) { wsum<true>(x, o); }
extern "C" __global__ void wsum_bad(const float* x, float* o) { wsum<false>(x, o); }
extern "C" __global__ void constw(const int* o) {}
