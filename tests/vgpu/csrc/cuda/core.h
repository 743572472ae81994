// vgpu core: device memory, modules, launches, sticky errors.  runtime.cpp and driver.cpp
// are thin CUDA front ends over it; ../vsim.h is the only door to the simulator.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct vsim_module;
namespace vgpu {
typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

struct Arch {
  int sm;
  int sms;
  size_t smem_sm, smem_optin, l2;
  int max_blocks_sm, max_warps_sm;
  const char* name;
};
const Arch& arch();
const char* env(const char* name, const char* dflt = "");
std::string strf(const char* f, ...) __attribute__((format(printf, 1, 2)));
std::string in_temp(const char* name);  // of a file or folder in TMPDIR or the system's own

extern std::recursive_mutex& g_mu;
typedef std::lock_guard<std::recursive_mutex> Lock;

// memory
enum MemKind { MK_DEVICE, MK_HOST, MK_MANAGED, MK_MODULE };
struct Range {
  u64 base = 0;
  size_t size = 0, mapped = 0;
  MemKind kind = MK_DEVICE;
  u64 id = 0;
  bool pooled = false, readonly = false;
  std::string name;
};
// Returns 0 or a CUDA error code.
int mem_alloc(size_t n, MemKind kind, void** out, const char* name = "");
int mem_free(void* p, MemKind kind);
int host_register(void* p, size_t n);
int host_unregister(void* p);
Range* mem_find(u64 addr);  // allocation containing addr
int mem_check(const void* p, size_t n, const char* what, bool must_dev);  // copy bounds
size_t mem_used(), mem_total(), mem_peak();
bool in_arena(const void* p);
// Where the bytes of a pointer are: device addresses are not mapped, their memory is at a fixed
// distance, so host code that dereferences a device pointer faults as on hardware.
u8* hp(const void* p);
inline u8* hp(u64 p) { return hp((const void*)p); }
std::string mem_describe(u64 addr);

// modules
struct KParam {
  u32 size, align, off;
};
struct Kernel {
  struct Module* mod = nullptr;
  std::string name;
  std::vector<KParam> params;
  u32 param_bytes = 0;
  u32 reqntid[3] = {0, 0, 0}, maxntid = 0, static_smem = 0, minctas = 0, reqcluster[3] = {0, 0, 0};
  int max_dyn_smem = 49152, carveout = -1;
  bool nonportable_cluster = false, grid_sync = false;
  int regs = -1, spill = 0, stack = 0;  // from ptxas, on demand
};
struct Module {
  std::string ptx, origin;
  int target = 0;
  vsim_module* sim = nullptr;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  bool parsed = false;
  void* blob = nullptr;  // registered fatbin not yet looked at
  std::string why_no_ptx;
  std::string blob_path;
  std::map<std::string, Range> syms;
  bool ptxas_done = false;
  std::map<std::string, size_t> vars;
  void* grid_ws = nullptr;
};
int module_prepare(Module*);  // fatbin -> PTX -> simulator; 0 or CUDA error
Module* module_from_image(const void* image, const std::string& origin);
void module_free(Module*);
Kernel* module_kernel(Module*, const std::string& name, int* err);
int module_symbol(Module*, const std::string& name, void** addr, size_t* size);
void kernel_resources(Kernel*);
std::string pick_ptx(const void* fatbin, const std::string& path, std::string& why, int* target);
void parse_ptx(Module*);

// launches
struct LaunchArgs {
  u32 grid[3], block[3], cluster[3];
  size_t smem;
  void* stream;
  bool cooperative;
};
int launch(Kernel*, const LaunchArgs&, void** args, const void* packed = nullptr,
           size_t packed_n = 0);
int encode_tensor_map(void* out, int dtype, int rank, u64 base, const uint64_t* dim,
                      const uint64_t* stride, const u32* box, const u32* es, int swizzle, int nan);
int occupancy(Kernel*, int threads, size_t dyn);

// errors
int sticky();  // 0 or the error that broke the context
void set_sticky(int code, const std::string& report);
// The calling thread's last error; reset_all() voids every thread's.
struct Last {
  int code = 0;
  unsigned epoch = 0;
};
extern thread_local Last t_last;
extern std::atomic<unsigned> g_epoch;
inline void set_last(int e) {
  t_last.code = e;
  t_last.epoch = g_epoch;
}
inline int get_last() { return t_last.epoch == g_epoch ? t_last.code : 0; }
inline int ret(int e) {
  if (e) set_last(e);
  return e;
}
void note(const char* f, ...) __attribute__((format(printf, 1, 2)));  // one line on stderr
const char *err_name(int), *err_string(int);
void reset_all();

struct Stream {
  u32 magic = 0x57a3;
  int prio = 0;
  unsigned flags = 0;
  u64 id = 0;
};
struct Event {
  u32 magic = 0xe7e7;
  unsigned flags = 0;
  bool recorded = false;
  double t = 0;
};
double now_ms();
extern int g_arch_override;
std::string jesc(const std::string&);
}  // namespace vgpu
