#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
struct Base {
  __device__ virtual float f(float x) const = 0;
};
struct A : Base {
  float k;
  __device__ A(float k) : k(k) {}
  __device__ float f(float x) const override { return x * k; }
};
struct B : Base {
  float k;
  __device__ B(float k) : k(k) {}
  __device__ float f(float x) const override { return x + k; }
};
extern "C" __global__ void virt(const float* x, float* o) {
  A a(3.f);
  B b(10.f);
  const Base* p = (threadIdx.x % 3) ? (const Base*)&a : (const Base*)&b;
  o[threadIdx.x] = p->f(x[threadIdx.x]);
}
typedef float (*fp)(float);
__device__ __noinline__ float f0(float x) { return x * x; }
__device__ __noinline__ float f1(float x) { return -x; }
__device__ fp table[2] = {f0, f1};
extern "C" __global__ void fptr(const float* x, float* o) {
  o[threadIdx.x] = table[threadIdx.x & 1](x[threadIdx.x]);
}
extern "C" __global__ void fp8(const float* x, float* o, int n) {
  int i = threadIdx.x;
  __nv_fp8_e4m3 a(x[i]);
  __nv_fp8_e5m2 b(x[i]);
  o[i] = float(a);
  o[n + i] = float(b);
  __nv_fp8x2_e4m3 c(make_float2(x[i], -x[i]));
  float2 d = float2(c);
  o[2 * n + i] = d.x;
  o[3 * n + i] = d.y;
}
extern "C" __global__ void loads(const float4* x, const double2* d, float* o) {
  int i = threadIdx.x;
  float4 a = __ldg(x + i), b = __ldcs(x + i), c = __ldcg(x + i);
  double2 e = d[i];
  __stcs(o + i, a.x + b.y + c.z + (float)e.y);
  __stwt(o + 64 + i, a.w);
  ((volatile float*)o)[128 + i] = __ldlu((const float*)x + i);
}
extern "C" __global__ void wide(const double* x, double* o, long long* q) {
  int i = threadIdx.x;
  double v = x[i];
  for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(~0u, v, k);
  o[i] = v;
  long long z = __shfl_down_sync(~0u, (long long)i << 40, 1);
  q[i] = z;
  q[32 + i] = __ballot_sync(~0u, i % 3 == 0);
  q[64 + i] = __match_all_sync(~0u, i / 64, (int*)&o[32]);
  q[96 + i] = __fns(0xf0f0, 4, 2);
  q[128 + i] = __reduce_xor_sync(0xffu << (i & 24), i);
}
extern "C" __global__ void simd(const unsigned* a, const unsigned* b, unsigned* o, int n) {
  int i = threadIdx.x;
  unsigned x = a[i], y = b[i];
  o[i] = __vabsdiffu4(x, y);
  o[n + i] = __vmaxs2(x, y);
  o[2 * n + i] = __vcmpgtu4(x, y);
  o[3 * n + i] = __vavgu4(x, y);
  o[4 * n + i] = __vsubss2(x, y);
  o[5 * n + i] = __viaddmax_s32(x, y, 5);
  o[6 * n + i] = __vimin3_s32(x, y, 77);
  o[7 * n + i] = __vadd2(x, y);
}
extern "C" __global__ void fmath(const float* x, float* o, int n) {
  int i = threadIdx.x;
  float v = x[i];
  o[i] = __expf(v);
  o[n + i] = __logf(fabsf(v));
  o[2 * n + i] = __sinf(v);
  o[3 * n + i] = __fdividef(v, 3.f);
  o[4 * n + i] = rsqrtf(fabsf(v));
  o[5 * n + i] = fmaxf(v, 0.25f) + fminf(v, -0.5f);
  o[6 * n + i] = fmodf(v, 0.7f);
  o[7 * n + i] = ldexpf(v, 5);
  o[8 * n + i] = copysignf(2.f, v);
  o[9 * n + i] = (float)isnan(v) + isinf(v) * 2 + signbit(v) * 4;
  o[10 * n + i] = remainderf(v, 0.3f);
  o[11 * n + i] = erfcf(v);
  o[12 * n + i] = lgammaf(fabsf(v) + 1);
  o[13 * n + i] = cbrtf(v);
  o[14 * n + i] = nearbyintf(v * 4);
  o[15 * n + i] = atan2f(v, 0.3f);
  float tt;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tt) : "f"(v));
  o[16 * n + i] = tt;
  o[17 * n + i] = hypotf(v, 1.f);
}
extern "C" __global__ void b128(const uint4* x, uint4* o) {
  uint4 v;
  asm volatile(
      "{ .reg .b128 t; .reg .b64 a, b; ld.global.b128 t, [%4]; mov.b128 {a, b}, t; mov.b64 {%0, "
      "%1}, a; mov.b64 {%2, %3}, b; }"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(x + threadIdx.x));
  o[threadIdx.x] = v;
}
extern "C" __global__ void nest(int* o) {
  int r;
  asm("{ .reg .u32 t; .reg .pred p; mov.u32 t, %1; setp.gt.u32 p, t, 5; @p bra L1; mov.u32 %0, 1; "
      "bra L2; L1: mov.u32 %0, 2; L2: }"
      : "=r"(r)
      : "r"(threadIdx.x));
  int q;
  asm("{ .reg .u32 t; .reg .pred p; mov.u32 t, %1; setp.gt.u32 p, t, 9; @p bra L1; mov.u32 %0, 10; "
      "bra L2; L1: mov.u32 %0, 20; L2: }"
      : "=r"(q)
      : "r"(threadIdx.x));
  o[threadIdx.x] = r + q;
}
extern "C" __global__ void grid3(int* o) {
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z),
      t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z),
      n = blockDim.x * blockDim.y * blockDim.z;
  o[b * n + t] = b * 1000 + threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z;
}
extern "C" __global__ void hist(const unsigned char* x, int* o, int n) {
  __shared__ int h[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) h[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&h[x[i]], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    if (h[i]) atomicAdd(&o[i], h[i]);
}
extern "C" __global__ void lastblock(const float* x, float* part, unsigned* ticket, float* o,
                                     int n) {
  __shared__ unsigned mine;
  int l = threadIdx.x;
  float v = 0;
  for (int i = n - 1 - blockIdx.x * 32 - l; i >= 0; i -= gridDim.x * 32) v += x[i];
  for (int k = 1; k < 32; k *= 2) v += __shfl_xor_sync(~0u, v, k);
  if (l == 5) {
    part[blockIdx.x] = v;
    __threadfence();
    mine = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncwarp();
  if (mine + 1 < gridDim.x) return;
  v = l < gridDim.x ? __ldcg(part + l) : 0;
  for (int k = 1; k < 32; k *= 2) v += __shfl_xor_sync(~0u, v, k);
  if (l == 0) {
    *o = v;
    *ticket = 0;
  }
}
extern "C" __global__ void bank(float* o, int stride) {
  __shared__ float s[32 * 33];
  int t = threadIdx.x;
  for (int k = t; k < 32 * 33; k += 32) s[k] = k;
  __syncwarp();
  o[t] = s[t * stride];
}
extern "C" __global__ void strided(const float* x, float* o, int st) {
  o[threadIdx.x] = x[threadIdx.x * st];
}
