#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#define SA(p) ((uint32_t)__cvta_generic_to_shared(p))
typedef uint32_t u32;
template <int N, bool T>
__device__ void ldsm(u32* r, u32 a) {
  if (N == 1 && !T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(a)
                 : "memory");
  if (N == 1 && T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(a)
                 : "memory");
  if (N == 2 && !T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a)
                 : "memory");
  if (N == 2 && T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a)
                 : "memory");
  if (N == 4 && !T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
  if (N == 4 && T)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}
// N 8x8 matrices with rows of `pitch` bytes; lane l receives N registers; the same from plain loads
// follows
template <int N, bool T>
__device__ void lds(const uint4* x, u32* o, int pitch) {
  extern __shared__ uint4 dyn[];
  char* s = (char*)dyn;
  int l = threadIdx.x;
  for (int i = l; i < 8 * N; i += 32) *(uint4*)(s + i * pitch) = x[i];
  __syncwarp();
  u32 r[4] = {};
  ldsm<N, T>(r, SA(s + (l % (8 * N)) * pitch));
  for (int j = 0; j < N; j++) {
    o[j * 32 + l] = r[j];
    u32 h[2];
    for (int e = 0; e < 2; e++) {
      int row = T ? 2 * (l % 4) + e : l / 4, col = T ? l / 4 : 2 * (l % 4) + e;
      h[e] = *(uint16_t*)(s + (8 * j + row) * pitch + 2 * col);
    }
    o[(N + j) * 32 + l] = h[0] | h[1] << 16;
  }
}
#define LDS(n)                                                                                 \
  extern "C" __global__ void lds##n(const uint4* x, u32* o, int p) { lds<n, false>(x, o, p); } \
  extern "C" __global__ void lds##n##t(const uint4* x, u32* o, int p) { lds<n, true>(x, o, p); }
LDS(1) LDS(2) LDS(4) extern "C" __global__ void ldgen(const uint4* x, u32* o) {  // generic address
  __shared__ uint4 s[8];
  int l = threadIdx.x;
  if (l < 8) s[l] = x[l];
  __syncwarp();
  u32 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.b16 {%0}, [%1];"
               : "=r"(r)
               : "l"(&s[l & 7])
               : "memory");
  o[l] = r;
}
extern "C" __global__ void ldodd(u32* o) {
  __shared__ uint4 s[9];
  int l = threadIdx.x;
  for (int i = l; i < 36; i += 32) ((u32*)s)[i] = i;
  __syncwarp();
  u32 r[4];
  ldsm<1, false>(r, SA(s) + (l & 7) * 16 + 8);
  o[l] = r[0];
}
extern "C" __global__ void ldpart(u32* o) {
  __shared__ uint4 s[8];
  int l = threadIdx.x;
  ((u32*)s)[l] = l;
  __syncwarp();
  u32 r[4] = {};
  if (l < 16) ldsm<1, false>(r, SA(&s[l & 7]));
  o[l] = r[0];
}
// ---- mma: a [16][K], b [8][K] (column-major B), c and d [16][8]
template <int KB>
__device__ void frags(const char* a, const char* b, u32* fa,
                      u32* fb) {  // KB: bytes of a row (16 or 32)
  __shared__ uint4 sa[32], sb[16];
  int l = threadIdx.x, q = KB / 16;
  for (int i = l; i < 16 * q; i += 32) sa[i] = ((const uint4*)a)[i];
  for (int i = l; i < 8 * q; i += 32) sb[i] = ((const uint4*)b)[i];
  __syncwarp();
  if (KB == 32) {
    ldsm<4, false>(fa, SA(&sa[(l % 16) * 2 + l / 16]));
    ldsm<2, false>(fb, SA(&sb[(l % 8) * 2 + (l / 8) % 2]));
  } else {
    ldsm<2, false>(fa, SA(&sa[l % 16]));
    ldsm<1, false>(fb, SA(&sb[l % 8]));
  }
}
#define AT(i) (threadIdx.x / 4 + 8 * ((i) / 2)) * 8 + threadIdx.x % 4 * 2 + (i) % 2
#define M16(name, ty, sh)                                                                       \
  __device__ void name(float* d, const u32* a, const u32* b, const float* c) {                  \
    asm volatile("mma.sync.aligned." sh ".row.col.f32." ty "." ty                               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"               \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), \
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));                                            \
  }
#define M8(name, ty, sh)                                                                         \
  __device__ void name(float* d, const u32* a, const u32* b, const float* c) {                   \
    asm volatile("mma.sync.aligned." sh ".row.col.f32." ty "." ty                                \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                            \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
M16(f16_full, "f16", "m16n8k16")
M8(f16_half, "f16", "m16n8k8")
M16(bf16_full, "bf16", "m16n8k16")
M8(bf16_half, "bf16", "m16n8k8")
M16(tf32_full, "tf32", "m16n8k8")
M8(tf32_half, "tf32", "m16n8k4")
#define MM(ty)                                                                                  \
  extern "C" __global__ void ty##_two(const char* a, const char* b, const float* c, float* d1,  \
                                      float* d2) {                                              \
    u32 fa[4], fb[2];                                                                           \
    frags<32>(a, b, fa, fb);                                                                    \
    float x[4], y[4], z[4];                                                                     \
    for (int i = 0; i < 4; i++) x[i] = c[AT(i)];                                                \
    ty##_full(y, fa, fb, x);                                                                    \
    for (int i = 0; i < 4; i++) d1[AT(i)] = y[i];                                               \
    ty##_half(z, fa, fb, x);                                                                    \
    ty##_half(z, fa + 2, fb + 1, z);                                                            \
    for (int i = 0; i < 4; i++) d2[AT(i)] = z[i];                                               \
  }                                                                                             \
  extern "C" __global__ void ty##_one(const char* a, const char* b, const float* c, float* d) { \
    u32 fa[4], fb[2];                                                                           \
    frags<16>(a, b, fa, fb);                                                                    \
    float x[4], y[4];                                                                           \
    for (int i = 0; i < 4; i++) x[i] = c[AT(i)];                                                \
    ty##_half(y, fa, fb, x);                                                                    \
    for (int i = 0; i < 4; i++) d[AT(i)] = y[i];                                                \
  }
MM(f16)
MM(bf16)
MM(tf32)
// f16 accumulators, loaded with ldmatrix
extern "C" __global__ void f16_acc(const char* a, const char* b, const uint4* c, u32* d) {
  __shared__ uint4 sc[16];
  u32 fa[4], fb[2], fc[2], r[2];
  int l = threadIdx.x;
  frags<16>(a, b, fa, fb);
  if (l < 16) sc[l] = c[l];
  __syncwarp();
  ldsm<2, false>(fc, SA(&sc[l % 16]));
  __syncwarp();
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%5,%6};"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(fa[0]), "r"(fa[1]), "r"(fb[0]), "r"(fc[0]), "r"(fc[1]));
  for (int i = 0; i < 2; i++) d[(l / 4 + 8 * i) * 4 + l % 4] = r[i];
}
extern "C" __global__ void movm(const uint4* x, u32* o) {
  __shared__ uint4 s[8];
  int l = threadIdx.x;
  if (l < 8) s[l] = x[l];
  __syncwarp();
  u32 r[4], t;
  ldsm<1, false>(r, SA(&s[l & 7]));
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(r[0]));
  o[l] = t;
  ldsm<1, true>(r, SA(&s[l & 7]));
  o[32 + l] = r[0];
}
// ---- cp.async: lane l copies W bytes, n[l] of them from x + at[l]
template <int W>
__device__ void cpz(const char* x, const long long* at, const int* n, char* o) {
  __shared__ __align__(16) char s[32 * 16];
  int l = threadIdx.x;
  for (int i = l; i < 32 * W; i += 32) s[i] = 0x55;
  __syncwarp();
  if (W == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SA(s + l * W)),
                 "l"(x + at[l]), "r"(n[l])
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(SA(s + l * W)),
                 "l"(x + at[l]), "n"(W), "r"(n[l])
                 : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  for (int i = l; i < 32 * W; i += 32) o[i] = s[i];
}
extern "C" __global__ void cpz4(const char* x, const long long* at, const int* n, char* o) {
  cpz<4>(x, at, n, o);
}
extern "C" __global__ void cpz8(const char* x, const long long* at, const int* n, char* o) {
  cpz<8>(x, at, n, o);
}
extern "C" __global__ void cpz16(const char* x, const long long* at, const int* n, char* o) {
  cpz<16>(x, at, n, o);
}
template <int W>
__device__ void cpi(const char* x, int k, char* o) {
  __shared__ __align__(16) char s[32 * 16];
  int l = threadIdx.x;
  if (W == 16)
    asm volatile(
        "{ .reg .pred p; setp.ge.s32 p, %2, %3; cp.async.cg.shared.global [%0], [%1], 16, p; }" ::
            "r"(SA(s + l * W)),
        "l"(x + l * W), "r"(l), "r"(k)
        : "memory");
  else
    asm volatile(
        "{ .reg .pred p; setp.ge.s32 p, %3, %4; cp.async.ca.shared.global [%0], [%1], %2, p; }" ::
            "r"(SA(s + l * W)),
        "l"(x + l * W), "n"(W), "r"(l), "r"(k)
        : "memory");
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
  for (int i = l; i < 32 * W; i += 32) o[i] = s[i];
}
extern "C" __global__ void cpi4(const char* x, int k, char* o) { cpi<4>(x, k, o); }
extern "C" __global__ void cpi8(const char* x, int k, char* o) { cpi<8>(x, k, o); }
extern "C" __global__ void cpi16(const char* x, int k, char* o) { cpi<16>(x, k, o); }
extern "C" __global__ void half_exp(const u32* x, const u32* y, u32* o, int n) {
  int i = threadIdx.x;
  u32 a = x[i], b = y[i], r;
  asm("ex2.approx.f16x2 %0, %1;" : "=r"(r) : "r"(a));
  o[i] = r;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(r) : "r"(a));
  o[n + i] = r;
  asm("fma.rn.relu.f16x2 %0, %1, %1, %2;" : "=r"(r) : "r"(a), "r"(a));
  o[2 * n + i] = r;
  asm("ex2.approx.ftz.bf16x2 %0, %1;" : "=r"(r) : "r"(b));
  o[3 * n + i] = r;
  asm("tanh.approx.bf16x2 %0, %1;" : "=r"(r) : "r"(b));
  o[4 * n + i] = r;
  asm("fma.rn.bf16x2 %0, %1, %1, %2;" : "=r"(r) : "r"(b), "r"(b));
  o[5 * n + i] = r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(b), "r"(0x3f803f80u));
  o[6 * n + i] = r;
}
// ---- redux over the lanes of a quarter, a half and the warp
template <int Q>
__device__ void rdx(const int* x, int* o) {
  int l = threadIdx.x, v = x[l], r;
  u32 m = Q == 32 ? ~0u : ((1u << Q) - 1) << (l / Q * Q);
#define RX(k, op)                                                           \
  asm volatile("redux.sync." op " %0, %1, %2;" : "=r"(r) : "r"(v), "r"(m)); \
  o[k * 32 + l] = r;
  RX(0, "add.s32")
  RX(1, "add.u32")
  RX(2, "min.s32")
  RX(3, "min.u32")
  RX(4, "max.s32") RX(5, "max.u32") RX(6, "and.b32") RX(7, "or.b32") RX(8, "xor.b32")
}
extern "C" __global__ void rdx8(const int* x, int* o) { rdx<8>(x, o); }
extern "C" __global__ void rdx16(const int* x, int* o) { rdx<16>(x, o); }
extern "C" __global__ void rdx32(const int* x, int* o) { rdx<32>(x, o); }
extern "C" __global__ void rdxbad(int* o) {
  int r;
  asm volatile("redux.sync.add.s32 %0, %1, %2;" : "=r"(r) : "r"(1), "r"(0xff));
  o[threadIdx.x] = r;
}
// ---- lanes of one warp: the kernels are right with S and racy without
template <bool S>
__device__ void fence() {
  if (S)
    __syncwarp();
  else
    asm volatile("" ::: "memory");
}
template <bool S>
__device__ void l_ldsm(const uint4* x, u32* o) {
  __shared__ uint4 s[8];
  int l = threadIdx.x;
  ((u32*)s)[l] = ((const u32*)x)[l];
  fence<S>();
  u32 r[4];
  ldsm<1, true>(r, SA(&s[l & 7]));
  o[l] = r[0];
}
template <bool S>
__device__ void l_cpa(const uint4* x, u32* o) {
  __shared__ u32 s[32];
  int l = threadIdx.x;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.wait_all;" ::"r"(SA(&s[l])),
               "l"((const u32*)x + l)
               : "memory");
  fence<S>();
  o[l] = s[l ^ 5];
}
template <bool S>
__device__ void l_cpw(const uint4* x, u32* o) {
  __shared__ u32 s[32];
  int l = threadIdx.x;
  s[l] = l;
  __syncwarp();
  u32 v = s[31 - l];
  fence<S>();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.wait_all;" ::"r"(SA(&s[l])),
               "l"((const u32*)x + l)
               : "memory");
  o[l] = v + s[l];
}
template <bool S>
__device__ void l_many(const uint4* x, u32* o) {
  __shared__ u32 s[2];
  int l = threadIdx.x;
  if (l < 2) s[l] = l + 7;
  __syncwarp();
  u32 v = s[0];
  fence<S>();
  if (l == 31) s[0] = 100;
  __syncwarp();
  o[l] = v + s[0];
}
template <bool S>
__device__ void l_loop(const uint4* x, u32* o) {
  __shared__ u32 s[40];
  volatile u32* p = s;
  int l = threadIdx.x;
#pragma unroll 1
  for (int k = 0; k < 4; k++) {
    p[l + k] = l * 10 + k;
    fence<S>();
  }
  __syncwarp();
  o[l] = p[l + 3];
}
template <bool S>
__device__ void l_same(const uint4* x, u32* o) {
  __shared__ u32 s[1];
  volatile u32* p = s;
  int l = threadIdx.x;
  if (l & 1)
    p[0] = 9;
  else
    p[0] = 9;
  __syncwarp();
  o[l] = p[0];
}
#define L_(n)                                                                  \
  extern "C" __global__ void n##_ok(const uint4* x, u32* o) { n<true>(x, o); } \
  extern "C" __global__ void n##_bad(const uint4* x, u32* o) { n<false>(x, o); }
L_(l_ldsm)
L_(l_cpa)
L_(l_cpw)
L_(l_many)
L_(l_loop)
L_(l_same)
#if __CUDA_ARCH__ >= 900
template <int N, bool T>
__device__ void sts(const u32* x, u32* o,
                    int pitch) {  // o: the shared bytes, then the same from plain stores
  extern __shared__ uint4 dyn[];
  char* s = (char*)dyn;
  int l = threadIdx.x, n = 8 * N * pitch;
  u32 r[4] = {};
  for (int q = 0; q < 2; q++) {
    for (int i = l; i < n / 4; i += 32) ((u32*)s)[i] = 0x7777;
    __syncwarp();
    for (int j = 0; j < N; j++) r[j] = x[j * 32 + l];
    u32 a = SA(s + (l % (8 * N)) * pitch);
    if (q) {
      for (int j = 0; j < N; j++)
        for (int e = 0; e < 2; e++) {
          int row = T ? 2 * (l % 4) + e : l / 4, col = T ? l / 4 : 2 * (l % 4) + e;
          *(uint16_t*)(s + (8 * j + row) * pitch + 2 * col) = r[j] >> 16 * e;
        }
    } else if (N == 1 && !T)
      asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(a), "r"(r[0])
                   : "memory");
    else if (N == 1)
      asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(a), "r"(r[0])
                   : "memory");
    else if (N == 2 && !T)
      asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(a), "r"(r[0]),
                   "r"(r[1])
                   : "memory");
    else if (N == 2)
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(a),
                   "r"(r[0]), "r"(r[1])
                   : "memory");
    else if (!T)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a),
                   "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                   : "memory");
    else
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a),
          "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
          : "memory");
    __syncwarp();
    for (int i = l; i < n / 4; i += 32) o[q * (n / 4) + i] = ((u32*)s)[i];
    __syncwarp();
  }
}
#define STS(n)                                                                               \
  extern "C" __global__ void sts##n(const u32* x, u32* o, int p) { sts<n, false>(x, o, p); } \
  extern "C" __global__ void sts##n##t(const u32* x, u32* o, int p) { sts<n, true>(x, o, p); }
STS(1) STS(2) STS(4) extern "C" __global__ void ststrip(const uint4* x, uint4* o) {
  __shared__ uint4 s[32], t[32];
  int l = threadIdx.x;
  s[l] = x[l];
  __syncwarp();
  u32 r[4];
  ldsm<4, true>(r, SA(&s[l]));
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SA(&t[l])),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
  __syncwarp();
  o[l] = t[l];
}
#endif
