#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cassert>
#include <cstdint>
#include <cstdio>
namespace cg = cooperative_groups;
extern "C" __global__ void block_sum(const float* x, float* o, int n) {
  __shared__ float part[256];
  int t = threadIdx.x, per = (n + gridDim.x - 1) / gridDim.x,
      end = min(n, (int)(blockIdx.x + 1) * per);
  float s = 0;  // a contiguous slice per block
  for (int i = blockIdx.x * per + t; i < end; i += 256) s += x[i];
  part[t] = s;
  __syncthreads();
  if (t >= 32) return;
  for (int k = 1; k < 8; k++) s += part[t + 32 * k];
  for (int k = 1; k < 16; k *= 2) s += __shfl_down_sync(~0u, s, k);
  s += __shfl_xor_sync(~0u, s, 16);
  if (t == 0) atomicAdd(o, s);
}
extern "C" __global__ void coop(const int* x, int* o) {
  cg::thread_block b = cg::this_thread_block();
  auto t = cg::tiled_partition<16>(b);
  int v = x[b.thread_rank()];
  o[b.thread_rank()] = cg::reduce(t, v, cg::plus<int>());
  b.sync();
  auto w = cg::tiled_partition<32>(b);
  o[128 + b.thread_rank()] = w.shfl_up(v, 3);
  o[256 + b.thread_rank()] = w.any(v > 90) * 2 + w.all(v >= 0);
  o[384 + b.thread_rank()] = __popc(w.ballot(v & 1));
  if (v & 1) {
    auto a = cg::coalesced_threads();
    o[512 + b.thread_rank()] = a.size() * 100 + a.thread_rank();
  } else
    o[512 + b.thread_rank()] = -1;
  o[640 + b.thread_rank()] = __reduce_max_sync(~0u, v) + __reduce_add_sync(~0u, v & 3);
  o[768 + b.thread_rank()] = __match_any_sync(~0u, v & 3);
}
extern "C" __global__ void shfls(const int* x, int* o) {
  int l = threadIdx.x, v = x[l];
  o[l] = __shfl_sync(~0u, v, (l * 7) & 31);
  o[32 + l] = __shfl_up_sync(~0u, v, 5, 16);
  o[64 + l] = __shfl_down_sync(~0u, v, 3, 8);
  o[96 + l] = __shfl_xor_sync(~0u, v, 9);
  o[128 + l] = __shfl_sync(~0u, v, 2, 8);
}
extern "C" __global__ void pipe(const float4* x, float4* o, int n) {
  __shared__ float4 s[2][64];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[0][t], &x[t], 16);
  __pipeline_commit();
  for (int i = 0; i < n; i++) {
    if (i + 1 < n) __pipeline_memcpy_async(&s[(i + 1) & 1][t], &x[(i + 1) * 64 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float4 v = s[i & 1][63 - t];
    o[i * 64 + t] = v;
    __syncthreads();
  }
}
extern "C" __global__ void pipe_zfill(const float* x, float* o) {
  __shared__ float s[128];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[t], &x[t], 4, t < 100 ? 0 : 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  o[t] = s[127 - t];
}
extern "C" __global__ void halfs(const half2* a, const half2* b, half2* o, float* f, int n) {
  int i = threadIdx.x;
  half2 x = a[i], y = b[i];
  o[i] = __hadd2(x, y);
  o[n + i] = __hmul2(x, y);
  o[2 * n + i] = __hfma2(x, y, x);
  o[3 * n + i] = __hmax2(x, y);
  o[4 * n + i] = __hsub2(x, y);
  o[5 * n + i] = h2exp2(x);
  o[6 * n + i] = __hneg2(__habs2(x));
  o[7 * n + i] = __hge2(x, y);
  o[8 * n + i] = h2rcp(y);
  o[9 * n + i] = __floats2half2_rn(__half2float(x.x) * 3.f, __half2float(x.y));
  f[i] = __hgt(x.x, y.x) ? __half2float(x.y) : (float)__half2int_rn(y.x);
  f[n + i] = __hlt(x.y, y.y);
}
extern "C" __global__ void bfs(const __nv_bfloat162* a, const __nv_bfloat162* b, __nv_bfloat162* o,
                               float* f, int n) {
  int i = threadIdx.x;
  __nv_bfloat162 x = a[i], y = b[i];
  o[i] = __hadd2(x, y);
  o[n + i] = __hmul2(x, y);
  o[2 * n + i] = __hfma2(x, y, x);
  o[3 * n + i] = __hmin2(x, y);
  o[4 * n + i] = __float22bfloat162_rn(make_float2(1.0f / 3 * i, -i));
  f[i] = __low2float(x) + __high2float(y);
}
extern "C" __global__ void atom(int* o, unsigned* u, float* f, double* d, unsigned long long* q,
                                half2* h) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  __shared__ int sh[4];
  if (threadIdx.x < 4) sh[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&sh[t & 3], t);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&o[threadIdx.x], sh[threadIdx.x]);
  atomicMax(&o[4], t);
  atomicMin(&o[5], -t);
  atomicXor(&o[6], 1 << (t & 31));
  atomicOr(&o[7], 1 << (t & 7));
  atomicAnd(&o[8], ~(1 << (t & 3)));
  atomicInc(&u[0], 10);
  atomicDec(&u[1], 7);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(q, 1ull << 33);
  atomicExch(&u[2], 77u);
  atomicCAS(&u[3], 5u, 9u);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  int old = atomicAdd(&o[9], 1);
  atomicMax(&o[10], old);
}
extern "C" __global__ void mutex(int* lock, int* cnt) {
  volatile int* c = cnt;
  for (int left = 3; left > 0;)
    if (!atomicCAS(lock, 0, 1)) {
      __threadfence();
      *c = *c + 1;
      __threadfence();
      atomicExch(lock, 0);
      left--;
    }
}
__device__ __noinline__ float poly(float x, int n) {
  float r = 1;
  for (int i = 0; i < n; i++) r = r * x + i;
  return r;
}
struct S {
  float a;
  int b;
  double c;
  char d[3];
};
__device__ __noinline__ S mk(S s, int k) {
  s.a += k;
  s.b *= 2;
  s.d[k % 3] = 'z';
  return s;
}
__constant__ int ctab[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ float gtab[4] = {0.5f, 1.5f, 2.5f, 3.5f};
__device__ int gcount = 41;
extern "C" __global__ void calls(const float* x, float* o, const __grid_constant__ S s) {
  int i = threadIdx.x;
  o[i] = poly(x[i], i % 7);
  S r = mk(s, i);
  o[32 + i] = r.a + r.b + (float)r.c + r.d[0] + r.d[1] + r.d[2];
  o[64 + i] = ctab[i & 7] + gtab[i & 3];
  if (i == 0) gcount++;
  float loc[16];
  for (int k = 0; k < 16; k++) loc[k] = x[(i + k) & 31];
  int j = ((int)(x[i] * 100)) & 15;
  o[96 + i] = loc[j] + loc[(j * 3) & 15];
  switch (i % 9) {
    case 0:
      o[128 + i] = sinf(x[i]);
      break;
    case 1:
      o[128 + i] = x[i] * 2;
      break;
    case 2:
      o[128 + i] = logf(fabsf(x[i]) + 1);
      break;
    case 3:
      o[128 + i] = 3;
      break;
    case 4:
      o[128 + i] = expf(x[i]);
      break;
    case 5:
      o[128 + i] = sqrtf(fabsf(x[i]));
      break;
    case 6:
      o[128 + i] = powf(fabsf(x[i]), 1.5f);
      break;
    case 7:
      o[128 + i] = tanhf(x[i]);
      break;
    default:
      o[128 + i] = -x[i];
  }
}
extern "C" __global__ void ints(const int* a, const int* b, long long* o, int n) {
  int i = threadIdx.x;
  int x = a[i], y = b[i];
  unsigned ux = x, uy = y;
  long long X = x, Y = (long long)y << 7;
  o[i] = x / y;
  o[n + i] = ux % uy;
  o[2 * n + i] = X * Y;
  o[3 * n + i] = __mulhi(x, y);
  o[4 * n + i] = __popc(ux) + 100 * __clz(x) + 10000 * __ffs(x);
  o[5 * n + i] = __brev(ux);
  o[6 * n + i] = __byte_perm(ux, uy, 0x3715);
  o[7 * n + i] = __funnelshift_l(ux, uy, x & 63);
  o[8 * n + i] = (X * 1000003) / (y | 1);
  o[9 * n + i] = __dp4a(x, y, 5);
  o[10 * n + i] = __sad(x, y, 7);
  o[11 * n + i] = (short)x * (short)y;
  o[12 * n + i] = __umul64hi(X * X, Y * Y);
  o[13 * n + i] = (unsigned char)(x >> 3) - (signed char)y;
  o[14 * n + i] = abs(x) + min(x, y) - max(ux, uy);
  o[15 * n + i] = (long long)((__int128)X * Y >> 40);
  o[16 * n + i] = __vadd4(ux, uy);
  o[17 * n + i] = __rhadd(x, y);
  o[18 * n + i] = (uint64_t)X >> (y & 63);
}
extern "C" __global__ void rounding(const float* a, const float* b, float* o, double* d, int n) {
  int i = threadIdx.x;
  float x = a[i], y = b[i];
  o[i] = __fadd_rz(x, y);
  o[n + i] = __fmul_ru(x, y);
  o[2 * n + i] = __fmaf_rd(x, y, x);
  o[3 * n + i] = __fdiv_rn(x, y);
  o[4 * n + i] = __frcp_ru(y);
  o[5 * n + i] = __fsqrt_rd(fabsf(x));
  o[6 * n + i] = __float2int_rd(x);
  o[7 * n + i] = __float2uint_rz(x);
  o[8 * n + i] = __double2float_rz((double)x * y);
  o[9 * n + i] = __saturatef(x);
  o[10 * n + i] = rintf(x) + truncf(y);
  d[i] = __dadd_ru(x, (double)y * 1e-20);
  d[n + i] = sin((double)x) * exp((double)y) + cbrt((double)x);
}
extern "C" __global__ void prints(int k) {
  if (threadIdx.x == 1) printf("k=%d f=%.2f s=%s u=%llu\n", k, 1.5, "abc", 1ull << 40);
  assert(k != 13);
  if (k == 14) __trap();
}
extern "C" __global__ void diverge(int* o) {
  int t = threadIdx.x, s = 0;
  for (int i = 0; i < t % 13; i++) {
    if (i & 1)
      s += __popc(__activemask()) > 0;
    else {
      s += 2;
      if (t & 4) continue;
      s += 3;
    }
  }
  __syncwarp();
  o[t] = s + 100 * (__ballot_sync(~0u, t & 1) == 0xaaaaaaaa);
}
extern "C" __global__ void named(int* o) {
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t < 64) {
    s[t] = t * 3;
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    o[t - 64] = s[127 - t];
  }
  int c = __syncthreads_count(t & 1);
  if (t < 64)
    o[64 + t] = c + 1000 * __syncthreads_and(t >= 0) + 2000 * 0;
  else
    __syncthreads_and(t >= 0);
}
extern "C" __global__ void smemdyn(float* o) {
  extern __shared__ float4 d[];
  __shared__ float st[33];
  float* f = (float*)d;
  int t = threadIdx.x;
  f[t] = t;
  st[t % 33] = 1;
  __syncthreads();
  if (t < 32) {
    float4 v = d[t];
    o[t] = v.x + v.y + v.z + v.w + st[t];
  }
}
