// The CUDA driver API for Triton's launcher, torch's lazy driver loads and cudaGetDriverEntryPoint.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "core.h"
using namespace vgpu;
#define API extern "C" __attribute__((visibility("default")))
typedef CUresult E;
#define STICKY()                         \
  do {                                   \
    if (int _s = sticky()) return (E)_s; \
  } while (0)
extern int device_attr(int, int*);
extern "C" {
struct vgpu_ver {
  const char *name, *sym;
};
extern const struct vgpu_ver vgpu_versions[];
}
// runtime functions reused here (same error numbers)
extern "C" {
int cudaEventCreateWithFlags(void**, unsigned);
int cudaEventDestroy(void*);
int cudaEventRecordWithFlags(void*, void*, unsigned);
int cudaEventQuery(void*);
int cudaEventElapsedTime(float*, void*, void*);
int cudaStreamCreateWithPriority(void**, unsigned, int);
int cudaStreamDestroy(void*);
int cudaStreamSynchronize(void*);
int cudaStreamWaitEvent(void*, void*, unsigned);
int cudaMemcpy(void*, const void*, size_t, int);
int cudaMemset(void*, int, size_t);
}

void* vgpu_driver_symbol(const char* name) {
  static void* self = [] {
    Dl_info i;
    dladdr((void*)&vgpu_driver_symbol, &i);
    return dlopen(i.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  std::string n = name;
  for (const vgpu_ver* v = vgpu_versions; v->name; v++)
    if (n == v->name) {
      n = v->sym;
      break;
    }
  return dlsym(self ? self : RTLD_DEFAULT, n.c_str());
}
API E cuGetProcAddress(const char* s, void** f, int, cuuint64_t,
                       CUdriverProcAddressQueryResult* q) {
  *f = vgpu_driver_symbol(s);
  if (q) *q = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API E cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* h) {
  if (h) *h = nullptr;
  return CUDA_SUCCESS;
}
API E cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
API E cuGetExportTable(const void** t, const CUuuid*) {
  *t = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}  // private tables: CUPTI does without
API E cuInit(unsigned) { return CUDA_SUCCESS; }
API E cuDriverGetVersion(int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
API E cuDeviceGet(CUdevice* d, int i) {
  if (i) return CUDA_ERROR_INVALID_DEVICE;
  *d = 0;
  return CUDA_SUCCESS;
}
API E cuDeviceGetCount(int* n) {
  *n = 1;
  return CUDA_SUCCESS;
}
API E cuDeviceGetName(char* s, int n, CUdevice) {
  snprintf(s, n, "%s", arch().name);
  return CUDA_SUCCESS;
}
API E cuDeviceGetUuid(CUuuid* u, CUdevice) {
  memcpy(u->bytes, "vgpu-ptx-sim-000", 16);
  return CUDA_SUCCESS;
}
API E cuDeviceTotalMem(size_t* n, CUdevice) {
  *n = mem_total();
  return CUDA_SUCCESS;
}
API E cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  if (d) return CUDA_ERROR_INVALID_DEVICE;
  device_attr(a, v);
  return CUDA_SUCCESS;
}
API E cuDeviceComputeCapability(int* a, int* b, CUdevice) {
  *a = arch().sm / 10;
  *b = arch().sm % 10;
  return CUDA_SUCCESS;
}
API E cuDeviceGetPCIBusId(char* s, int n, CUdevice) {
  snprintf(s, n, "0000:00:00.0");
  return CUDA_SUCCESS;
}
API E cuDeviceCanAccessPeer(int* v, CUdevice, CUdevice) {
  *v = 0;
  return CUDA_SUCCESS;
}
static int g_ctx_obj;
static thread_local CUcontext t_ctx = nullptr;
static CUcontext the_ctx() { return (CUcontext)&g_ctx_obj; }
API E cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = the_ctx();
  return CUDA_SUCCESS;
}
API E cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
API E cuDevicePrimaryCtxReset(CUdevice) { return CUDA_SUCCESS; }
API E cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  if (f) *f = 0;
  if (a) *a = 1;
  return CUDA_SUCCESS;
}
API E cuDevicePrimaryCtxSetFlags(CUdevice, unsigned) { return CUDA_SUCCESS; }
API E cuCtxGetCurrent(CUcontext* c) {
  *c = the_ctx();
  return CUDA_SUCCESS;
}
API E cuCtxSetCurrent(CUcontext c) {
  t_ctx = c;
  return CUDA_SUCCESS;
}
API E cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }
API E cuCtxPopCurrent(CUcontext* c) {
  if (c) *c = the_ctx();
  return CUDA_SUCCESS;
}
API E cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return CUDA_SUCCESS;
}
API E cuCtxGetFlags(unsigned* f) {
  *f = 0;
  return CUDA_SUCCESS;
}
API E cuCtxGetApiVersion(CUcontext, unsigned* v) {
  *v = 3020;
  return CUDA_SUCCESS;
}
API E cuCtxSynchronize() {
  STICKY();
  return CUDA_SUCCESS;
}
API E cuCtxGetLimit(size_t* v, CUlimit) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}
API E cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API E cuCtxGetCacheConfig(CUfunc_cache* c) {
  *c = CU_FUNC_CACHE_PREFER_NONE;
  return CUDA_SUCCESS;
}
API E cuCtxSetCacheConfig(CUfunc_cache) { return CUDA_SUCCESS; }
API E cuCtxGetStreamPriorityRange(int* a, int* b) {
  if (a) *a = 0;
  if (b) *b = -5;
  return CUDA_SUCCESS;
}
API E cuGetErrorName(E e, const char** s) {
  static thread_local std::string t;
  std::string n = err_name(e);
  *s = (t = n).c_str();
  return CUDA_SUCCESS;
}
API E cuGetErrorString(E e, const char** s) {
  *s = err_string(e);
  return CUDA_SUCCESS;
}

// modules
API E cuModuleLoadData(CUmodule* m, const void* image) {
  STICKY();
  Module* x = module_from_image(image, "cuModuleLoadData");
  int e = module_prepare(x);
  if (e) {
    if (!x->why_no_ptx.empty()) note("cuModuleLoadData: %s", x->why_no_ptx.c_str());
    module_free(x);
    return (E)e;
  }
  *m = (CUmodule)x;
  return CUDA_SUCCESS;
}
API E cuModuleLoadDataEx(CUmodule* m, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(m, image);
}
API E cuModuleLoadFatBinary(CUmodule* m, const void* image) { return cuModuleLoadData(m, image); }
API E cuModuleLoad(CUmodule* m, const char* path) {
  FILE* f = fopen(path, "rb");
  if (!f) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string* s = new std::string;
  char b[65536];
  size_t n;
  while ((n = fread(b, 1, sizeof b, f))) s->append(b, n);
  fclose(f);
  return cuModuleLoadData(m, s->c_str());
}
API E cuModuleUnload(CUmodule m) {
  module_free((Module*)m);
  return CUDA_SUCCESS;
}
API E cuModuleGetLoadingMode(CUmoduleLoadingMode* m) {
  *m = CU_MODULE_LAZY_LOADING;
  return CUDA_SUCCESS;
}
API E cuModuleGetFunction(CUfunction* f, CUmodule m, const char* n) {
  int e;
  Kernel* k = module_kernel((Module*)m, n, &e);
  if (!k) return (E)e;
  *f = (CUfunction)k;
  return CUDA_SUCCESS;
}
API E cuModuleGetGlobal(CUdeviceptr* p, size_t* n, CUmodule m, const char* s) {
  return (E)module_symbol((Module*)m, s, (void**)p, n);
}
API E cuLibraryLoadData(CUlibrary* l, const void* code, CUjit_option*, void**, unsigned,
                        CUlibraryOption*, void**, unsigned) {
  return cuModuleLoadData((CUmodule*)l, code);
}
API E cuLibraryUnload(CUlibrary l) { return cuModuleUnload((CUmodule)l); }
API E cuLibraryGetModule(CUmodule* m, CUlibrary l) {
  *m = (CUmodule)l;
  return CUDA_SUCCESS;
}
API E cuLibraryGetKernel(CUkernel* k, CUlibrary l, const char* n) {
  return cuModuleGetFunction((CUfunction*)k, (CUmodule)l, n);
}
API E cuKernelGetFunction(CUfunction* f, CUkernel k) {
  *f = (CUfunction)k;
  return CUDA_SUCCESS;
}
API E cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  Kernel* k = (Kernel*)f;
  *v = 0;
  switch (a) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *v = k->maxntid      ? k->maxntid
           : k->reqntid[0] ? k->reqntid[0] * k->reqntid[1] * k->reqntid[2]
                           : 1024;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *v = k->static_smem;
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      kernel_resources(k);
      *v = std::max(k->regs, 0);
      break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      kernel_resources(k);
      *v = k->stack;
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
      *v = k->mod->target;
      break;
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *v = arch().sm;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *v = k->max_dyn_smem;
      break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      *v = k->carveout;
      break;
    default:
      break;
  }
  return CUDA_SUCCESS;
}
API E cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  Kernel* k = (Kernel*)f;
  switch ((int)a) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (v < 0 || v + (size_t)k->static_smem > arch().smem_optin) {
        note(
            "cuFuncSetAttribute(%s, MAX_DYNAMIC_SHARED_SIZE_BYTES, %d): the device allows %zu "
            "including %u static",
            k->name.c_str(), v, arch().smem_optin, k->static_smem);
        return CUDA_ERROR_INVALID_VALUE;
      }
      k->max_dyn_smem = v;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      k->carveout = v;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      k->nonportable_cluster = v;
      return CUDA_SUCCESS;
    case 17:
      return CUDA_ERROR_INVALID_VALUE;  // oversized shared memory: later hardware only
    default:
      return CUDA_SUCCESS;
  }
}
API E cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API E cuFuncGetModule(CUmodule* m, CUfunction f) {
  *m = (CUmodule)((Kernel*)f)->mod;
  return CUDA_SUCCESS;
}
API E cuFuncGetName(const char** n, CUfunction f) {
  *n = ((Kernel*)f)->name.c_str();
  return CUDA_SUCCESS;
}
API E cuFuncLoad(CUfunction) { return CUDA_SUCCESS; }
API E cuFuncGetParamInfo(CUfunction f, size_t i, size_t* off, size_t* n) {
  Kernel* k = (Kernel*)f;
  if (i >= k->params.size()) return CUDA_ERROR_INVALID_VALUE;
  *off = k->params[i].off;
  if (n) *n = k->params[i].size;
  return CUDA_SUCCESS;
}
static E go(CUfunction f, const LaunchArgs& L, void** params, void** extra) {
  STICKY();
  Kernel* k = (Kernel*)f;
  if (!k || k->name.empty()) return CUDA_ERROR_INVALID_HANDLE;
  if (!params && extra) {
    const void* p = nullptr;
    size_t n = 0;
    for (void** e = extra; *e != CU_LAUNCH_PARAM_END; e += 2) {
      if (*e == CU_LAUNCH_PARAM_BUFFER_POINTER)
        p = e[1];
      else if (*e == CU_LAUNCH_PARAM_BUFFER_SIZE)
        n = *(size_t*)e[1];
    }
    return (E)ret(launch(k, L, nullptr, p, n));
  }
  return (E)ret(launch(k, L, params));
}
API E cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                     unsigned bz, unsigned sm, CUstream s, void** p, void** x) {
  return go(f, LaunchArgs{{gx, gy, gz}, {bx, by, bz}, {1, 1, 1}, sm, s, false}, p, x);
}
API E cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                unsigned by, unsigned bz, unsigned sm, CUstream s, void** p) {
  return go(f, LaunchArgs{{gx, gy, gz}, {bx, by, bz}, {1, 1, 1}, sm, s, true}, p, nullptr);
}
API E cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** p, void** x) {
  LaunchArgs L{{c->gridDimX, c->gridDimY, c->gridDimZ},
               {c->blockDimX, c->blockDimY, c->blockDimZ},
               {1, 1, 1},
               c->sharedMemBytes,
               c->hStream,
               false};
  for (unsigned i = 0; i < c->numAttrs; i++) {
    auto& a = c->attrs[i];
    if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      L.cluster[0] = a.value.clusterDim.x;
      L.cluster[1] = a.value.clusterDim.y;
      L.cluster[2] = a.value.clusterDim.z;
    }
    if (a.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) L.cooperative = a.value.cooperative;
  }
  return go(f, L, p, x);
}
API E cuLaunchHostFunc(CUstream, CUhostFn f, void* u) {
  f(u);
  return CUDA_SUCCESS;
}
API E cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction f, int t, size_t s) {
  *n = occupancy((Kernel*)f, t, s);
  return CUDA_SUCCESS;
}
API E cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, CUfunction f, int t, size_t s,
                                                           unsigned) {
  *n = occupancy((Kernel*)f, t, s);
  return CUDA_SUCCESS;
}
API E cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
  int b = occupancy((Kernel*)f, c->blockDimX * c->blockDimY * c->blockDimZ, c->sharedMemBytes);
  unsigned cl = 1;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      cl = c->attrs[i].value.clusterDim.x * c->attrs[i].value.clusterDim.y *
           c->attrs[i].value.clusterDim.z;
  *n = b * arch().sms / std::max(cl, 1u);
  return CUDA_SUCCESS;
}
API E cuOccupancyMaxPotentialClusterSize(int* n, CUfunction f, const CUlaunchConfig*) {
  *n = ((Kernel*)f)->nonportable_cluster ? 16 : 8;
  return CUDA_SUCCESS;
}
API E cuOccupancyMaxPotentialBlockSize(int* g, int* b, CUfunction f, CUoccupancyB2DSize, size_t s,
                                       int lim) {
  int best = 0;
  for (int t = 1024; t >= 32; t -= 32) {
    if (lim && t > lim) continue;
    int o = occupancy((Kernel*)f, t, s);
    if (o * t > best) {
      best = o * t;
      *b = t;
      *g = o * arch().sms;
    }
  }
  return CUDA_SUCCESS;
}

// memory
API E cuMemGetInfo(size_t* f, size_t* t) {
  STICKY();
  *t = mem_total();
  *f = mem_total() - mem_used();
  return CUDA_SUCCESS;
}
API E cuMemAlloc(CUdeviceptr* p, size_t n) {
  STICKY();
  return (E)mem_alloc(n, MK_DEVICE, (void**)p);
}
API E cuMemAllocAsync(CUdeviceptr* p, size_t n, CUstream) { return cuMemAlloc(p, n); }
API E cuMemAllocManaged(CUdeviceptr* p, size_t n, unsigned) {
  STICKY();
  return (E)mem_alloc(n, MK_MANAGED, (void**)p);
}
API E cuMemFree(CUdeviceptr p) { return (E)mem_free((void*)p, MK_DEVICE); }
API E cuMemFreeAsync(CUdeviceptr p, CUstream) { return cuMemFree(p); }
API E cuMemAllocHost(void** p, size_t n) { return (E)mem_alloc(n, MK_HOST, p); }
API E cuMemHostAlloc(void** p, size_t n, unsigned) { return (E)mem_alloc(n, MK_HOST, p); }
API E cuMemFreeHost(void* p) { return (E)mem_free(p, MK_HOST); }
API E cuMemHostGetDevicePointer(CUdeviceptr* d, void* p, unsigned) {
  if (!mem_find((u64)p)) return CUDA_ERROR_INVALID_VALUE;
  *d = (CUdeviceptr)p;
  return CUDA_SUCCESS;
}
API E cuMemGetAddressRange(CUdeviceptr* b, size_t* n, CUdeviceptr p) {
  Range* r = mem_find(p);
  if (!r) return CUDA_ERROR_NOT_FOUND;
  if (b) *b = r->base;
  if (n) *n = r->size;
  return CUDA_SUCCESS;
}
API E cuMemcpy(CUdeviceptr d, CUdeviceptr s, size_t n) {
  return (E)cudaMemcpy((void*)d, (void*)s, n, 4);
}
API E cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream) { return cuMemcpy(d, s, n); }
API E cuMemcpyHtoD(CUdeviceptr d, const void* s, size_t n) {
  return (E)cudaMemcpy((void*)d, s, n, 1);
}
API E cuMemcpyHtoDAsync(CUdeviceptr d, const void* s, size_t n, CUstream) {
  return cuMemcpyHtoD(d, s, n);
}
API E cuMemcpyDtoH(void* d, CUdeviceptr s, size_t n) { return (E)cudaMemcpy(d, (void*)s, n, 2); }
API E cuMemcpyDtoHAsync(void* d, CUdeviceptr s, size_t n, CUstream) {
  return cuMemcpyDtoH(d, s, n);
}
API E cuMemcpyDtoD(CUdeviceptr d, CUdeviceptr s, size_t n) {
  return (E)cudaMemcpy((void*)d, (void*)s, n, 3);
}
API E cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream) {
  return cuMemcpyDtoD(d, s, n);
}
template <class T>
static E fill(CUdeviceptr d, T v, size_t n) {
  STICKY();
  if (int e = mem_check((void*)d, n * sizeof(T), "cuMemset", true)) return (E)e;
  for (size_t i = 0; i < n; i++) ((T*)hp(d))[i] = v;
  return CUDA_SUCCESS;
}
API E cuMemsetD8(CUdeviceptr d, unsigned char v, size_t n) { return fill<unsigned char>(d, v, n); }
API E cuMemsetD16(CUdeviceptr d, unsigned short v, size_t n) {
  return fill<unsigned short>(d, v, n);
}
API E cuMemsetD32(CUdeviceptr d, unsigned v, size_t n) { return fill<unsigned>(d, v, n); }
API E cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream) {
  return fill<unsigned char>(d, v, n);
}
API E cuMemsetD16Async(CUdeviceptr d, unsigned short v, size_t n, CUstream) {
  return fill<unsigned short>(d, v, n);
}
API E cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, CUstream) {
  return fill<unsigned>(d, v, n);
}
API E cuPointerGetAttribute(void* o, CUpointer_attribute a, CUdeviceptr p) {
  Range* r = mem_find(p);
  if (!r) return CUDA_ERROR_INVALID_VALUE;
  switch (a) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *(CUcontext*)o = the_ctx();
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)o = r->kind == MK_HOST ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *(CUdeviceptr*)o = p;
      break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (r->kind != MK_HOST) return CUDA_ERROR_INVALID_VALUE;
      *(void**)o = (void*)p;
      break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      *(unsigned long long*)o = r->id;
      break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *(unsigned*)o = r->kind == MK_MANAGED;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *(int*)o = 0;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *(void**)o = (void*)r->base;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *(size_t*)o = r->size;
      break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
      *(unsigned*)o = 1;
      break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      *(unsigned*)o = 0;
      break;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}
API E cuPointerSetAttribute(const void*, CUpointer_attribute, CUdeviceptr) { return CUDA_SUCCESS; }

// streams and events
API E cuStreamCreate(CUstream* s, unsigned f) {
  return (E)cudaStreamCreateWithPriority((void**)s, f, 0);
}
API E cuStreamCreateWithPriority(CUstream* s, unsigned f, int p) {
  return (E)cudaStreamCreateWithPriority((void**)s, f, p);
}
API E cuStreamDestroy(CUstream s) { return (E)cudaStreamDestroy(s); }
API E cuStreamSynchronize(CUstream s) { return (E)cudaStreamSynchronize(s); }
API E cuStreamQuery(CUstream s) { return (E)cudaStreamSynchronize(s); }
API E cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) {
  return (E)cudaStreamWaitEvent(s, e, f);
}
API E cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* s) {
  *s = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
API E cuStreamGetCtx(CUstream, CUcontext* c) {
  *c = the_ctx();
  return CUDA_SUCCESS;
}
API E cuEventCreate(CUevent* e, unsigned f) { return (E)cudaEventCreateWithFlags((void**)e, f); }
API E cuEventDestroy(CUevent e) { return (E)cudaEventDestroy(e); }
API E cuEventRecord(CUevent e, CUstream s) { return (E)cudaEventRecordWithFlags(e, s, 0); }
API E cuEventQuery(CUevent e) { return (E)cudaEventQuery(e); }
API E cuEventSynchronize(CUevent e) { return (E)cudaEventQuery(e); }
API E cuEventElapsedTime(float* t, CUevent a, CUevent b) {
  return (E)cudaEventElapsedTime(t, a, b);
}

// Tensor maps: validated here as the driver does, encoded by the simulator.
API E cuTensorMapEncodeTiled(CUtensorMap* tm, CUtensorMapDataType dt, cuuint32_t rank, void* base,
                             const cuuint64_t* dim, const cuuint64_t* stride, const cuuint32_t* box,
                             const cuuint32_t* es, CUtensorMapInterleave il, CUtensorMapSwizzle sw,
                             CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill oob) {
  static const int esz[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 1, 1, 1};
  auto bad = [&](const char* w) {
    note("cuTensorMapEncodeTiled: %s", w);
    return CUDA_ERROR_INVALID_VALUE;
  };
  if (arch().sm < 90) return bad("tensor maps need sm_90");
  if (!tm || (u64)tm & 63) return bad("the descriptor must be 64-byte aligned");
  if (rank < 1 || rank > 5) return bad("rank must be 1..5");
  if ((unsigned)dt > 12) return bad("data type not supported");
  if (!base || (u64)base & 15) return bad("the global address must be 16-byte aligned");
  if (il != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return bad("interleave is not supported by the virtual device");
  if ((unsigned)sw > 3) return bad("swizzle mode not supported");
  u64 inner = (u64)box[0] * esz[dt];
  if (inner & 15) return bad("boxDim[0] * element size must be a multiple of 16");
  static const u64 lim[] = {1u << 20, 32, 64, 128};
  if (inner > lim[sw]) return bad("boxDim[0] * element size exceeds the swizzle span");
  for (u32 i = 0; i < rank; i++) {
    if (!dim[i] || dim[i] > (1ull << 32)) return bad("globalDim out of range");
    if (!box[i] || box[i] > 256) return bad("boxDim must be 1..256");
    if (!es[i] || es[i] > 8) return bad("elementStrides must be 1..8");
    if (i + 1 < rank) {
      if (stride[i] & 15 || stride[i] >= (1ull << 40))
        return bad("globalStrides must be multiples of 16 below 2^40");
    }
  }
  memset(tm, 0, 128);
  if (int e = encode_tensor_map(tm, dt, rank, (u64)base, (const uint64_t*)dim,
                                (const uint64_t*)stride, box, es, sw, oob))
    return (E)e;
  return CUDA_SUCCESS;
}
