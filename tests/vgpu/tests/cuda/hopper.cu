#include <cuda_fp16.h>

#include <cstdint>
#define SM(p) ((uint32_t)__cvta_generic_to_shared(p))
struct alignas(64) TM {
  char b[128];
};
__device__ void minit(uint64_t* m, int c) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SM(m)), "r"(c) : "memory");
}
__device__ void expect(uint64_t* m, int n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SM(m)), "r"(n)
               : "memory");
}
__device__ void arrive(uint64_t* m) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SM(m)) : "memory");
}
__device__ void wait(uint64_t* m, int par) {
  uint32_t ok;
  do
    asm volatile(
        "{ .reg .pred q; mbarrier.try_wait.parity.shared::cta.b64 q, [%1], %2; selp.u32 %0, 1, 0, "
        "q; }"
        : "=r"(ok)
        : "r"(SM(m)), "r"(par)
        : "memory");
  while (!ok);
}
template <int R>
__device__ void tload(void* d, const TM* t, uint64_t* m, const int* c) {
  if (R == 1)
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3}], [%2];" ::"r"(SM(d)),
        "l"(t), "r"(SM(m)), "r"(c[0])
        : "memory");
  if (R == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(SM(d)),
        "l"(t), "r"(SM(m)), "r"(c[0]), "r"(c[1])
        : "memory");
  if (R == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(SM(d)),
        "l"(t), "r"(SM(m)), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
  if (R == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(SM(d)),
        "l"(t), "r"(SM(m)), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
        : "memory");
  if (R == 5)
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(SM(d)),
        "l"(t), "r"(SM(m)), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
}
template <int R>
__device__ void dump(const TM* t, char* o, int n, const int* cc) {
  extern __shared__ __align__(1024) char s[];
  __shared__ uint64_t m;
  int c[5];
  for (int k = 0; k < 5; k++) c[k] = cc[k];
  if (threadIdx.x == 0) minit(&m, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&m, n);
    tload<R>(s, t, &m, c);
  }
  wait(&m, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) o[i] = s[i];
}
extern "C" __global__ void dump1(const __grid_constant__ TM t, char* o, int n, const int* c) {
  dump<1>(&t, o, n, c);
}
extern "C" __global__ void dump2(const __grid_constant__ TM t, char* o, int n, const int* c) {
  dump<2>(&t, o, n, c);
}
extern "C" __global__ void dump3(const __grid_constant__ TM t, char* o, int n, const int* c) {
  dump<3>(&t, o, n, c);
}
extern "C" __global__ void dump4(const __grid_constant__ TM t, char* o, int n, const int* c) {
  dump<4>(&t, o, n, c);
}
extern "C" __global__ void dump5(const __grid_constant__ TM t, char* o, int n, const int* c) {
  dump<5>(&t, o, n, c);
}
// mode 0 ok, 1 missing proxy fence, 2 missing barrier, 3 reduce add, 4 smem reused before
// wait_group.read
template <int MODE>
__device__ void tstore(const TM* t, float v, int x, int y) {
  __shared__ __align__(1024) float s[32 * 16];
  for (int i = threadIdx.x; i < 512; i += blockDim.x) s[i] = v + i;
  if (MODE != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (MODE != 2) __syncthreads();
  if (threadIdx.x == 0) {
    if (MODE == 3)
      asm volatile(
          "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
          "[%1];" ::"l"(t),
          "r"(SM(s)), "r"(x), "r"(y)
          : "memory");
    else
      asm volatile(
          "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
              t),
          "r"(SM(s)), "r"(x), "r"(y)
          : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (MODE == 4) s[3] = -1;
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    if (MODE == 0) s[3] = -1;
  }
}
extern "C" __global__ void ts_ok(const __grid_constant__ TM t, float v, int x, int y) {
  tstore<0>(&t, v, x, y);
}
extern "C" __global__ void ts_nofence(const __grid_constant__ TM t, float v, int x, int y) {
  tstore<1>(&t, v, x, y);
}
extern "C" __global__ void ts_nobar(const __grid_constant__ TM t, float v, int x, int y) {
  tstore<2>(&t, v, x, y);
}
extern "C" __global__ void ts_red(const __grid_constant__ TM t, float v, int x, int y) {
  tstore<3>(&t, v, x, y);
}
extern "C" __global__ void ts_reuse(const __grid_constant__ TM t, float v, int x, int y) {
  tstore<4>(&t, v, x, y);
}
// warp-specialised ring: warp 0 produces with bulk copies, warps 1..4 consume.
// MODE 0 ok, 1 consumers skip the full wait, 2 producer skips the empty wait, 3 wrong byte count, 4
// no sync after init, 5 too many arrivals
template <int MODE>
__device__ void ring(const float* x, float* o, int n) {
  __shared__ __align__(128) float s[3][128];
  __shared__ uint64_t full[3], empty[3];
  int wp = threadIdx.x / 32, t = threadIdx.x - 32;
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; k++) {
      minit(&full[k], 1);
      minit(&empty[k], MODE == 5 ? 1 : 4);
    }
  if (MODE != 4) __syncthreads();
  if (wp == 0) {
    if (threadIdx.x == 0)
      for (int i = 0; i < n; i++) {
        int k = i % 3;
        if (i >= 3 && MODE != 2) wait(&empty[k], (i / 3 - 1) & 1);
        expect(&full[k], MODE == 3 ? 516 : 512);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(SM(s[k])),
            "l"(x + i * 128), "r"(512), "r"(SM(&full[k]))
            : "memory");
      }
  } else
    for (int i = 0; i < n; i++) {
      int k = i % 3;
      if (MODE != 1) wait(&full[k], (i / 3) & 1);
      o[i * 128 + t] = s[k][127 - t];
      __syncwarp();
      if (t % 32 == 0) arrive(&empty[k]);
    }
}
extern "C" __global__ void ring_ok(const float* x, float* o, int n) { ring<0>(x, o, n); }
extern "C" __global__ void ring_nofull(const float* x, float* o, int n) { ring<1>(x, o, n); }
extern "C" __global__ void ring_noempty(const float* x, float* o, int n) { ring<2>(x, o, n); }
extern "C" __global__ void ring_bytes(const float* x, float* o, int n) { ring<3>(x, o, n); }
extern "C" __global__ void ring_noinit(const float* x, float* o, int n) { ring<4>(x, o, n); }
extern "C" __global__ void ring_arr(const float* x, float* o, int n) { ring<5>(x, o, n); }
extern "C" __global__ void cpmbar(const float* x, float* o) {
  __shared__ float s[128];
  __shared__ uint64_t m;
  int t = threadIdx.x;
  if (t == 0) minit(&m, 128);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SM(&s[t])), "l"(x + t) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SM(&m)) : "memory");
  wait(&m, 0);
  o[t] = s[127 - t];
}
// one warpgroup m64n8k16: A (64x16) and B (8x16) K-major without swizzle. MODE 1: read before wait,
// 2: no proxy fence, 3: smem overwritten before the wait; 4: D ignored, 5: D - A B, 6: D + (-A)
// (-B), D starting at 5, 6, 7, 8
template <int MODE>
__device__ void wg(const half* a, const half* b, float* o) {
  __shared__ __align__(1024) half sa[64 * 16], sb[8 * 16];
  int t = threadIdx.x;
  for (int i = t; i < 1024; i += 128) {
    int r = i / 16, c = i % 16;
    sa[(r / 8) * 128 + (c / 8) * 64 + (r % 8) * 8 + c % 8] = a[i];
  }
  for (int i = t; i < 128; i += 128) {
    int r = i / 16, c = i % 16;
    sb[(c / 8) * 64 + r * 8 + c % 8] = b[i];
  }
  if (MODE != 2) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t da = ((uint64_t)(SM(sa) >> 4)) | (8ull << 16) | (16ull << 32),
           db = ((uint64_t)(SM(sb) >> 4)) | (8ull << 16) | (16ull << 32);
  float d0 = MODE > 3 ? 5 : 0, d1 = MODE > 3 ? 6 : 0, d2 = MODE > 3 ? 7 : 0, d3 = MODE > 3 ? 8 : 0;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "{ .reg .pred acc; setp.ne.u32 acc, %6, 4; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
      "{%0,%1,%2,%3}, %4, %5, acc, %7, %8, 0, 0; }"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "l"(da), "l"(db), "n"(MODE), "n"(MODE > 4 ? -1 : 1), "n"(MODE > 5 ? -1 : 1)
      : "memory");
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (MODE == 1) asm volatile("add.f32 %0, %0, 0f3F800000;" : "+f"(d0));
  if (MODE == 3) sa[t] = 0;
  asm volatile("wgmma.wait_group.sync.aligned 0;"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)::"memory");
  int r = (t / 32) * 16 + (t % 32) / 4, c = (t % 4) * 2;
  o[r * 8 + c] = d0;
  o[r * 8 + c + 1] = d1;
  o[(r + 8) * 8 + c] = d2;
  o[(r + 8) * 8 + c + 1] = d3;
}
extern "C" __global__ void wg_ok(const half* a, const half* b, float* o) { wg<0>(a, b, o); }
extern "C" __global__ void wg_early(const half* a, const half* b, float* o) { wg<1>(a, b, o); }
extern "C" __global__ void wg_nofence(const half* a, const half* b, float* o) { wg<2>(a, b, o); }
extern "C" __global__ void wg_fresh(const half* a, const half* b, float* o) { wg<4>(a, b, o); }
extern "C" __global__ void wg_minus(const half* a, const half* b, float* o) { wg<5>(a, b, o); }
extern "C" __global__ void wg_twice(const half* a, const half* b, float* o) { wg<6>(a, b, o); }
extern "C" __global__ void wg_over(const half* a, const half* b, float* o) { wg<3>(a, b, o); }
// bulk copy of 512 bytes to global memory: MODE 0 store, 1 f32 add, 2 no proxy fence, 3 min of u32,
// 4 f16 add
template <int MODE>
__device__ void bulk(void* g, float v) {
  __shared__ __align__(128) float s[128];
  __half* h = (__half*)s;
  int t = threadIdx.x;
  if (MODE == 4) {
    for (int k = 0; k < 2; k++) h[2 * t + k] = __float2half(v + t);
  } else if (MODE == 3)
    ((uint32_t*)s)[t] = (uint32_t)v + t;
  else
    s[t] = v + t;
  if (MODE != 2) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (t) return;
  if (MODE == 1)
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 512;" ::"l"(g),
        "r"(SM(s))
        : "memory");
  else if (MODE == 3)
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.u32 [%0], [%1], 512;" ::"l"(g),
        "r"(SM(s))
        : "memory");
  else if (MODE == 4)
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%0], [%1], 512;" ::"l"(
            g),
        "r"(SM(s))
        : "memory");
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 512;" ::"l"(g), "r"(SM(s))
                 : "memory");
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
}
extern "C" __global__ void bulk_st(float* g, float v) { bulk<0>(g, v); }
extern "C" __global__ void bulk_add(float* g, float v) { bulk<1>(g, v); }
extern "C" __global__ void bulk_nofence(float* g, float v) { bulk<2>(g, v); }
extern "C" __global__ void bulk_min(void* g, float v) { bulk<3>(g, v); }
extern "C" __global__ void bulk_addh(void* g, float v) { bulk<4>(g, v); }
extern "C" __global__ void redvec(float* g, float* a) {
  int t = threadIdx.x;
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(g + 4 * (t % 8)),
               "f"(1.f), "f"(2.f), "f"((float)t), "f"(.5f)
               : "memory");
  float x, y;
  asm volatile("atom.relaxed.gpu.global.add.v2.f32 {%0, %1}, [%2], {%3, %4};"
               : "=f"(x), "=f"(y)
               : "l"(a), "f"(1.f), "f"(2.f)
               : "memory");
  a[2 + t] = x + 100 * y;
}
extern "C" __global__ void cluster1(int* o) {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  o[threadIdx.x] = s[63 - threadIdx.x] + r;
}
