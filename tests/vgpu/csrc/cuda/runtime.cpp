// The CUDA runtime API that torch 2.14 and nvcc 13 host code use, over core.h.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "core.h"
using namespace vgpu;
#define API extern "C" __attribute__((visibility("default")))
typedef cudaError_t E;
static inline E R(int e) { return (E)ret(e); }
#define STICKY()             \
  do {                       \
    if (int _s = sticky()) { \
      set_last(_s);          \
      return (E)_s;          \
    }                        \
  } while (0)
#define NEED(c, code)         \
  do {                        \
    if (!(c)) return R(code); \
  } while (0)

// registration
struct Reg {
  Module* m;
};
struct HostFn {
  Module* m;
  std::string name;
  Kernel* k = nullptr;
  int err = -1;
};
struct HostVar {
  Module* m;
  std::string name;
  size_t size;
};
static std::unordered_map<const void*, HostFn*>& fns() {
  static auto* x = new std::unordered_map<const void*, HostFn*>;
  return *x;
}
static std::unordered_map<const void*, HostFn*>& handles() {
  static auto* x = new std::unordered_map<const void*, HostFn*>;
  return *x;
}
static std::unordered_map<const void*, HostVar>& vars() {
  static auto* x = new std::unordered_map<const void*, HostVar>;
  return *x;
}
API void** __cudaRegisterFatBinary(void* wrap) {
  Lock l(g_mu);
  Reg* r = new Reg;
  r->m = new Module;
  r->m->blob = wrap;
  Dl_info i;
  if (dladdr(wrap, &i) && i.dli_fname) r->m->blob_path = i.dli_fname;
  r->m->origin = r->m->blob_path;
  return (void**)r;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void** h, const char* host, char*, const char* dev, int, uint3*,
                                uint3*, dim3*, dim3*, int*) {
  Lock l(g_mu);
  HostFn* f = new HostFn;
  f->m = ((Reg*)h)->m;
  f->name = dev;
  fns()[host] = f;
  handles()[f] = f;
}
API void __cudaRegisterVar(void** h, char* host, char*, const char* dev, int, size_t size, int,
                           int) {
  Lock l(g_mu);
  vars()[host] = HostVar{((Reg*)h)->m, dev, size};
  ((Reg*)h)->m->vars[dev] = size;
}
API void __cudaRegisterManagedVar(void**, void**, char*, const char* n, int, size_t, int, int) {
  note("managed variable %s is not supported", n);
}
static HostFn* fn_of(const void* f) {
  Lock l(g_mu);
  auto& m = fns();
  auto it = m.find(f);
  if (it != m.end()) return it->second;
  auto& h = handles();
  auto j = h.find(f);
  return j == h.end() ? nullptr : j->second;
}
static Kernel* kernel_of(const void* f, int* err) {
  HostFn* h = fn_of(f);
  if (!h) {
    *err = 98;
    return nullptr;
  }
  if (!h->k && h->err <= 0) {
    h->k = module_kernel(h->m, h->name, &h->err);
    if (!h->k) {
      Dl_info i;
      const char* lib = dladdr(f, &i) && i.dli_fname ? i.dli_fname : h->m->origin.c_str();
      note("kernel %s of %s cannot run: %s", h->name.c_str(), lib,
           h->m->why_no_ptx.empty() ? err_string(h->err) : h->m->why_no_ptx.c_str());
    }
  }
  *err = h->k ? 0 : h->err;
  return h->k;
}
struct Push {
  dim3 g, b;
  size_t s;
  void* st;
};
static thread_local std::vector<Push> t_push;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st* st) {
  t_push.push_back({g, b, s, st});
  return 0;
}
API E __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) {
  if (t_push.empty()) return R(52);
  Push p = t_push.back();
  t_push.pop_back();
  *g = p.g;
  *b = p.b;
  *s = p.s;
  *(void**)st = p.st;
  return cudaSuccess;
}
static E do_launch(const void* f, dim3 g, dim3 b, void** args, size_t s, void* st,
                   bool coop = false, const u32* cl = nullptr) {
  STICKY();
  int err;
  Kernel* k = kernel_of(f, &err);
  if (!k) return R(err);
  LaunchArgs L{{g.x, g.y, g.z}, {b.x, b.y, b.z}, {1, 1, 1}, s, st, coop};
  if (cl) memcpy(L.cluster, cl, 12);
  return R(launch(k, L, args));
}
API E cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) {
  return do_launch(f, g, b, a, s, st);
}
API E cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t s,
                                  cudaStream_t st) {
  return do_launch(f, g, b, a, s, st, true);
}
API E __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) {
  return do_launch((const void*)k, g, b, a, s, st);
}
API E __cudaLaunchKernel_ptsz(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) {
  return do_launch((const void*)k, g, b, a, s, st);
}
API E __cudaGetKernel(cudaKernel_t* out, const void* f) {
  HostFn* h = fn_of(f);
  if (!h) return R(98);
  *out = (cudaKernel_t)h;
  return cudaSuccess;
}
API E cudaGetKernel(cudaKernel_t* out, const void* f) { return __cudaGetKernel(out, f); }
API E cudaGetFuncBySymbol(cudaFunction_t* out, const void* f) {
  int e;
  Kernel* k = kernel_of(f, &e);
  if (!k) return R(e);
  *out = (cudaFunction_t)k;
  return cudaSuccess;
}
API E cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  u32 cl[3] = {1, 1, 1};
  bool coop = false;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    auto& q = c->attrs[i];
    if (q.id == cudaLaunchAttributeClusterDimension) {
      cl[0] = q.val.clusterDim.x;
      cl[1] = q.val.clusterDim.y;
      cl[2] = q.val.clusterDim.z;
    }
    if (q.id == cudaLaunchAttributeCooperative) coop = q.val.cooperative;
  }
  return do_launch(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream, coop, cl);
}
static int set_fattr(Kernel* k, int a, int v) {
  switch (a) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (v < 0 || v + (size_t)k->static_smem > arch().smem_optin) {
        note(
            "cudaFuncSetAttribute(%s, MaxDynamicSharedMemorySize, %d): the device allows %zu "
            "including %u static",
            k->name.c_str(), v, arch().smem_optin, k->static_smem);
        return 1;
      }
      k->max_dyn_smem = std::max(v, 0);
      return 0;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (v < -1 || v > 100) return 1;
      k->carveout = v;
      return 0;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      k->nonportable_cluster = v;
      return 0;
    default:
      return 0;
  }
}
API E cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int v) {
  STICKY();
  int e;
  Kernel* k = kernel_of(f, &e);
  if (!k) return R(e);
  return R(set_fattr(k, a, v));
}
API E cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
API E cudaKernelSetAttributeForDevice(cudaKernel_t f, cudaFuncAttribute a, int v, int) {
  return cudaFuncSetAttribute((const void*)f, a, v);
}
API E cudaFuncGetAttributes(cudaFuncAttributes* o, const void* f) {
  STICKY();
  int e;
  Kernel* k = kernel_of(f, &e);
  if (!k) return R(e);
  kernel_resources(k);
  memset(o, 0, sizeof *o);
  o->sharedSizeBytes = k->static_smem;
  o->maxThreadsPerBlock = k->maxntid ? k->maxntid : 1024;
  if (k->regs > 0) {
    int lim = 65536 / ((k->regs * 32 + 255) / 256 * 256) * 32;
    if (lim < o->maxThreadsPerBlock) o->maxThreadsPerBlock = lim;
  }
  o->numRegs = k->regs > 0 ? k->regs : 0;
  o->localSizeBytes = k->stack;
  o->ptxVersion = k->mod->target;
  o->binaryVersion = arch().sm;
  o->maxDynamicSharedSizeBytes = k->max_dyn_smem;
  o->preferredShmemCarveout = k->carveout;
  return cudaSuccess;
}
API E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int t, size_t s,
                                                             unsigned) {
  STICKY();
  int e;
  Kernel* k = kernel_of(f, &e);
  if (!k) return R(e);
  *n = occupancy(k, t, s);
  return cudaSuccess;
}
API E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int t, size_t s) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, t, s, 0);
}
API E cudaOccupancyAvailableDynamicSMemPerBlock(size_t* o, const void* f, int nb, int) {
  int e;
  Kernel* k = kernel_of(f, &e);
  if (!k) return R(e);
  size_t per = nb > 0 ? arch().smem_sm / nb : 0;
  *o = per > 1024 + k->static_smem ? std::min(per - 1024, arch().smem_optin) - k->static_smem : 0;
  return cudaSuccess;
}

// device
API E cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
API E cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
API E cudaSetDevice(int d) {
  if (d) return R(101);
  return (E)sticky();
}
API E cudaInitDevice(int d, unsigned, unsigned) { return d ? R(101) : cudaSuccess; }
API E cudaSetValidDevices(int*, int) { return cudaSuccess; }
API E cudaGetDeviceFlags(unsigned* f) {
  *f = 0;
  return cudaSuccess;
}
API E cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
API E cudaChooseDevice(int* d, const cudaDeviceProp*) {
  *d = 0;
  return cudaSuccess;
}
API E cudaDeviceSynchronize() {
  STICKY();
  return cudaSuccess;
}
API E cudaDeviceReset() { return (E)sticky(); }
API E cudaDeviceGetByPCIBusId(int* d, const char*) {
  *d = 0;
  return cudaSuccess;
}
API E cudaDeviceGetPCIBusId(char* s, int n, int) {
  snprintf(s, n, "0000:00:00.0");
  return cudaSuccess;
}
API E cudaDeviceGetStreamPriorityRange(int* lo, int* hi) {
  if (lo) *lo = 0;
  if (hi) *hi = -5;
  return cudaSuccess;
}
API E cudaDeviceCanAccessPeer(int* o, int, int) {
  *o = 0;
  return cudaSuccess;
}
API E cudaDeviceEnablePeerAccess(int, unsigned) { return R(217); }
API E cudaDeviceDisablePeerAccess(int) { return R(705); }
API E cudaDeviceGetP2PAttribute(int* v, cudaDeviceP2PAttr, int, int) {
  *v = 0;
  return cudaSuccess;
}
API E cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API E cudaDeviceGetLimit(size_t* v, cudaLimit) {
  *v = 1 << 20;
  return cudaSuccess;
}
API E cudaDeviceGetCacheConfig(cudaFuncCache* c) {
  *c = cudaFuncCachePreferNone;
  return cudaSuccess;
}
API E cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
API E cudaCtxResetPersistingL2Cache() { return cudaSuccess; }
API E cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API E cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API E cudaProfilerStart() { return cudaSuccess; }
API E cudaProfilerStop() { return cudaSuccess; }
int device_attr(int a, int* v) {
  const Arch& A = arch();
  int r = 0;
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      r = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      r = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      r = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      r = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      r = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      r = 49152;
      break;
    case cudaDevAttrTotalConstantMemory:
      r = 65536;
      break;
    case cudaDevAttrWarpSize:
      r = 32;
      break;
    case cudaDevAttrMaxPitch:
      r = 0x7fffffff;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      r = 65536;
      break;
    case cudaDevAttrClockRate:
      r = A.sm == 90 ? 1980000 : 1410000;
      break;
    case cudaDevAttrMemoryClockRate:
      r = A.sm == 90 ? 2619000 : 1215000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      r = 5120;
      break;
    case cudaDevAttrMultiProcessorCount:
      r = A.sms;
      break;
    case cudaDevAttrTextureAlignment:
      r = 512;
      break;
    case cudaDevAttrTexturePitchAlignment:
      r = 32;
      break;
    case cudaDevAttrIntegrated:
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrComputeMode:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrPciBusId:
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrTccDriver:
      break;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrComputePreemptionSupported:
      r = 1;
      break;
    case cudaDevAttrAsyncEngineCount:
      r = 3;
      break;
    case cudaDevAttrL2CacheSize:
      r = A.l2;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      r = 32 * A.max_warps_sm;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      r = A.smem_sm;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      r = A.sm / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      r = A.sm % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      r = A.smem_optin;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      r = A.max_blocks_sm;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      r = 1024;
      break;
    case cudaDevAttrClusterLaunch:
      r = A.sm >= 90;
      break;
    default:
      r = 0;
      break;
  }
  *v = r;
  return 0;
}
API E cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
  if (d) return R(101);
  device_attr(a, v);
  return cudaSuccess;
}
API E cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d) return R(101);
  const Arch& A = arch();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", A.name);
  memcpy(p->uuid.bytes, "vgpu-ptx-sim-000", 16);
  p->totalGlobalMem = mem_total();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 0x7fffffff;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = A.sm / 10;
  p->minor = A.sm % 10;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = A.sms;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = A.l2;
  p->maxThreadsPerMultiProcessor = 32 * A.max_warps_sm;
  p->streamPrioritiesSupported = 1;
  p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = A.smem_sm;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = A.smem_optin;
  p->maxBlocksPerMultiProcessor = A.max_blocks_sm;
  p->reservedSharedMemPerBlock = 1024;
  p->hostRegisterSupported = 1;
  p->memoryPoolsSupported = 1;
  p->clusterLaunch = A.sm >= 90;
  p->canUseHostPointerForRegisteredMem = 1;
  p->computePreemptionSupported = 1;
  return cudaSuccess;
}

// errors
API E cudaGetLastError() {
  int e = sticky() ? sticky() : get_last();
  set_last(0);
  return (E)e;
}
API E cudaPeekAtLastError() {
  if (int s = sticky()) return (E)s;
  return (E)get_last();
}
API const char* cudaGetErrorName(E e) { return err_name(e); }
API const char* cudaGetErrorString(E e) { return err_string(e); }

// memory
API E cudaMalloc(void** p, size_t n) {
  STICKY();
  NEED(p, 1);
  return R(mem_alloc(n, MK_DEVICE, p));
}
// Succeeds in a broken context too (hardware returns the sticky error): torch frees tensors in
// destructors and would terminate the process.
API E cudaFree(void* p) {
  if (!p) return (E)sticky();
  return R(mem_free(p, MK_DEVICE));
}
API E cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API E cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(p, n);
}
API E cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API E cudaMallocManaged(void** p, size_t n, unsigned) {
  STICKY();
  return R(mem_alloc(n, MK_MANAGED, p));
}
API E cudaMallocPitch(void** p, size_t* pitch, size_t w, size_t h) {
  *pitch = (w + 511) / 512 * 512;
  return cudaMalloc(p, *pitch * h);
}
API E cudaMallocHost(void** p, size_t n) {
  STICKY();
  return R(mem_alloc(n, MK_HOST, p));
}
API E cudaHostAlloc(void** p, size_t n, unsigned) {
  STICKY();
  return R(mem_alloc(n, MK_HOST, p));
}
API E cudaFreeHost(void* p) { return R(mem_free(p, MK_HOST)); }
API E cudaHostRegister(void* p, size_t n, unsigned) { return R(host_register(p, n)); }
API E cudaHostUnregister(void* p) { return R(host_unregister(p)); }
API E cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  if (!mem_find((u64)h)) return R(1);
  *d = h;
  return cudaSuccess;
}
API E cudaHostGetFlags(unsigned* f, void*) {
  *f = 0;
  return cudaSuccess;
}
API E cudaMemGetInfo(size_t* f, size_t* t) {
  STICKY();
  *t = mem_total();
  *f = mem_total() - mem_used();
  return cudaSuccess;
}
API E cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  Range* r = mem_find((u64)p);
  if (!r) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    a->hostPointer = (void*)p;
    return cudaSuccess;
  }
  a->type = r->kind == MK_HOST      ? cudaMemoryTypeHost
            : r->kind == MK_MANAGED ? cudaMemoryTypeManaged
                                    : cudaMemoryTypeDevice;
  a->device = 0;
  a->devicePointer = (void*)p;
  a->hostPointer = r->kind == MK_HOST || r->kind == MK_MANAGED ? (void*)p : nullptr;
  return cudaSuccess;
}
static int check_copy(void* d, const void* s, size_t n, int kind, const char* what) {
  if (!n) return 0;
  if (!d || !s) return 1;
  if (kind < 0 || kind > 4) return 21;
  bool dd = kind == 1 || kind == 3, sd = kind == 2 || kind == 3;
  int e = mem_check(d, n, what, dd);
  if (!e) e = mem_check(s, n, what, sd);
  return e;
}
API E cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  STICKY();
  if (int e = check_copy(d, s, n, k, "cudaMemcpy")) return R(e);
  memmove(hp(d), hp(s), n);
  return cudaSuccess;
}
API E cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) {
  STICKY();
  if (int e = check_copy(d, s, n, k, "cudaMemcpyAsync")) return R(e);
  memmove(hp(d), hp(s), n);
  return cudaSuccess;
}
API E cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) {
  return cudaMemcpyAsync(d, s, n, cudaMemcpyDeviceToDevice, st);
}
API E cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) {
  return cudaMemcpy(d, s, n, cudaMemcpyDeviceToDevice);
}
API E cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                        cudaMemcpyKind k, cudaStream_t) {
  STICKY();
  if (w > dp || w > sp) return R(12);
  if (!w || !h) return cudaSuccess;
  if (int e = check_copy(d, s, 1, k, "cudaMemcpy2D")) return R(e);
  if (int e =
          check_copy((char*)d + dp * (h - 1), (const char*)s + sp * (h - 1), w, k, "cudaMemcpy2D"))
    return R(e);
  for (size_t i = 0; i < h; i++) memmove(hp((char*)d + i * dp), hp((const char*)s + i * sp), w);
  return cudaSuccess;
}
API E cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                   cudaMemcpyKind k) {
  return cudaMemcpy2DAsync(d, dp, s, sp, w, h, k, 0);
}
API E cudaMemset(void* d, int v, size_t n) {
  STICKY();
  if (int e = mem_check(d, n, "cudaMemset", true)) return R(e);
  if (n) memset(hp(d), v, n);
  return cudaSuccess;
}
API E cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { return cudaMemset(d, v, n); }
API E cudaMemset2DAsync(void* d, size_t p, int v, size_t w, size_t h, cudaStream_t) {
  STICKY();
  if (w && h) {
    if (int e = mem_check(d, p * (h - 1) + w, "cudaMemset2D", true)) return R(e);
    for (size_t i = 0; i < h; i++) memset(hp((char*)d + i * p), v, w);
  }
  return cudaSuccess;
}
API E cudaMemset2D(void* d, size_t p, int v, size_t w, size_t h) {
  return cudaMemset2DAsync(d, p, v, w, h, 0);
}
static int symbol(const void* s, void** p, size_t* n) {
  Lock l(g_mu);
  auto it = vars().find(s);
  if (it == vars().end()) return 13;
  int e = module_symbol(it->second.m, it->second.name, p, n);
  return e == 500 ? 13 : e;
}
API E cudaGetSymbolAddress(void** p, const void* s) {
  STICKY();
  return R(symbol(s, p, nullptr));
}
API E cudaGetSymbolSize(size_t* n, const void* s) { return R(symbol(s, nullptr, n)); }
API E cudaMemcpyToSymbolAsync(const void* s, const void* src, size_t n, size_t off, cudaMemcpyKind,
                              cudaStream_t) {
  STICKY();
  void* p;
  size_t sz;
  if (int e = symbol(s, &p, &sz)) return R(e);
  if (off + n > sz) return R(1);
  memcpy(hp((char*)p + off), hp(src), n);
  return cudaSuccess;
}
API E cudaMemcpyToSymbol(const void* s, const void* src, size_t n, size_t off, cudaMemcpyKind k) {
  return cudaMemcpyToSymbolAsync(s, src, n, off, k, 0);
}
API E cudaMemcpyFromSymbolAsync(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind,
                                cudaStream_t) {
  STICKY();
  void* p;
  size_t sz;
  if (int e = symbol(s, &p, &sz)) return R(e);
  if (off + n > sz) return R(1);
  memcpy(hp(d), hp((char*)p + off), n);
  return cudaSuccess;
}
API E cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind k) {
  return cudaMemcpyFromSymbolAsync(d, s, n, off, k, 0);
}
API E cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }
API E cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}

// memory pools: one pool that is the device heap
static int g_pool;
API E cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)&g_pool;
  return cudaSuccess;
}
API E cudaDeviceGetMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)&g_pool;
  return cudaSuccess;
}
API E cudaDeviceSetMemPool(int, cudaMemPool_t) { return cudaSuccess; }
API E cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API E cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr a, void* v) {
  if (a >= cudaMemPoolAttrReservedMemCurrent || a == cudaMemPoolAttrReleaseThreshold)
    *(uint64_t*)v = a == cudaMemPoolAttrReleaseThreshold ? 0
                    : (a == cudaMemPoolAttrReservedMemHigh || a == cudaMemPoolAttrUsedMemHigh)
                        ? mem_peak()
                        : mem_used();
  else
    *(int*)v = 1;
  return cudaSuccess;
}
API E cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API E cudaMemPoolGetAccess(cudaMemAccessFlags* f, cudaMemPool_t, cudaMemLocation*) {
  *f = cudaMemAccessFlagsProtReadWrite;
  return cudaSuccess;
}
API E cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API E cudaMemPoolCreate(cudaMemPool_t* p, const cudaMemPoolProps*) {
  *p = (cudaMemPool_t)&g_pool;
  return cudaSuccess;
}
API E cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
API E cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* v) {
  *(uint64_t*)v = 0;
  return cudaSuccess;
}
API E cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }
API E cudaDeviceGraphMemTrim(int) { return cudaSuccess; }

// streams: everything runs at once, in call order
static u64 g_sid = 1;
static Stream* st(cudaStream_t s) { return (u64)s <= 2 ? nullptr : (Stream*)s; }
static bool bad(cudaStream_t s) {
  Stream* q = st(s);
  return q && q->magic != 0x57a3;
}
API E cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int pr) {
  STICKY();
  Stream* q = new Stream;
  q->flags = f;
  q->prio = pr;
  q->id = ++g_sid;
  *s = (cudaStream_t)q;
  return cudaSuccess;
}
API E cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) {
  return cudaStreamCreateWithPriority(s, f, 0);
}
API E cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API E cudaStreamDestroy(cudaStream_t s) {
  if (bad(s) || !st(s)) return R(400);
  st(s)->magic = 0;
  delete st(s);
  return cudaSuccess;
}
API E cudaStreamSynchronize(cudaStream_t s) {
  STICKY();
  return bad(s) ? R(400) : cudaSuccess;
}
API E cudaStreamQuery(cudaStream_t s) {
  STICKY();
  return bad(s) ? R(400) : cudaSuccess;
}
API E cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  STICKY();
  return bad(s) || !e || ((Event*)e)->magic != 0xe7e7 ? R(400) : cudaSuccess;
}
API E cudaStreamGetPriority(cudaStream_t s, int* p) {
  *p = st(s) ? st(s)->prio : 0;
  return cudaSuccess;
}
API E cudaStreamGetFlags(cudaStream_t s, unsigned* f) {
  *f = st(s) ? st(s)->flags : 0;
  return cudaSuccess;
}
API E cudaStreamGetId(cudaStream_t s, unsigned long long* i) {
  *i = st(s) ? st(s)->id : 0;
  return cudaSuccess;
}
API E cudaStreamGetDevice(cudaStream_t, int* d) {
  *d = 0;
  return cudaSuccess;
}
API E cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* u, unsigned) {
  f(s, (E)sticky(), u);
  return cudaSuccess;
}
API E cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* u) {
  STICKY();
  f(u);
  return cudaSuccess;
}
API E cudaStreamAttachMemAsync(cudaStream_t, void*, size_t, unsigned) { return cudaSuccess; }
API E cudaStreamSetAttribute(cudaStream_t, cudaStreamAttrID, const cudaStreamAttrValue*) {
  return cudaSuccess;
}
API E cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return (E)sticky();
}
API E cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id,
                               cudaGraph_t* g, const cudaGraphNode_t** d,
                               const cudaGraphEdgeData** ed, size_t* n) {
  *s = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (g) *g = nullptr;
  if (d) *d = nullptr;
  if (ed) *ed = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API E cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  *m = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
API E cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  note("CUDA graph capture is not supported on the virtual device (cudaStreamBeginCapture)");
  return R(801);
}

// events
API E cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  STICKY();
  Event* v = new Event;
  v->flags = f;
  *e = (cudaEvent_t)v;
  return cudaSuccess;
}
API E cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API E cudaEventDestroy(cudaEvent_t e) {
  Event* v = (Event*)e;
  if (!v || v->magic != 0xe7e7) return R(400);
  v->magic = 0;
  delete v;
  return cudaSuccess;
}
API E cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  STICKY();
  Event* v = (Event*)e;
  if (!v || v->magic != 0xe7e7 || bad(s)) return R(400);
  v->recorded = true;
  v->t = now_ms();
  return cudaSuccess;
}
API E cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
API E cudaEventQuery(cudaEvent_t e) {
  STICKY();
  return !e || ((Event*)e)->magic != 0xe7e7 ? R(400) : cudaSuccess;
}
API E cudaEventSynchronize(cudaEvent_t e) { return cudaEventQuery(e); }
API E cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  STICKY();
  Event *x = (Event*)a, *y = (Event*)b;
  if (!x || !y || !x->recorded || !y->recorded || (x->flags | y->flags) & cudaEventDisableTiming)
    return R(400);
  *ms = (float)(y->t - x->t);
  return cudaSuccess;
}
API E cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) {
  note("CUDA IPC is not supported on the virtual device");
  return R(801);
}
API E cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) {
  note("CUDA IPC is not supported on the virtual device");
  return R(801);
}

// driver entry points and libraries
void* vgpu_driver_symbol(const char* name);
API E cudaGetDriverEntryPointByVersion(const char* n, void** f, unsigned, unsigned long long,
                                       cudaDriverEntryPointQueryResult* q) {
  *f = vgpu_driver_symbol(n);
  if (q) *q = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : R(500);
}
API E cudaGetDriverEntryPoint(const char* n, void** f, unsigned long long fl,
                              cudaDriverEntryPointQueryResult* q) {
  return cudaGetDriverEntryPointByVersion(n, f, 13000, fl, q);
}
API E cudaLibraryLoadData(cudaLibrary_t* o, const void* code, cudaJitOption*, void**, unsigned,
                          cudaLibraryOption*, void**, unsigned) {
  STICKY();
  *o = (cudaLibrary_t)module_from_image(code, "cudaLibraryLoadData");
  return cudaSuccess;
}
API E cudaLibraryUnload(cudaLibrary_t l) {
  module_free((Module*)l);
  return cudaSuccess;
}
API E cudaLibraryGetKernel(cudaKernel_t* o, cudaLibrary_t l, const char* n) {
  int e;
  Kernel* k = module_kernel((Module*)l, n, &e);
  if (!k) return R(e);
  Lock g(g_mu);
  HostFn* f = new HostFn;
  f->m = (Module*)l;
  f->name = n;
  f->k = k;
  f->err = 0;
  handles()[f] = f;
  *o = (cudaKernel_t)f;
  return cudaSuccess;
}
namespace vgpu {
#include "errors.h"
}
