// sim.h over ptxsim.  Uses its C ABI for modules and launches (ps_module, ps_launch); reaches into
// core.h for two things that ABI does not offer yet: memory at given device addresses, and
// placing a module's variables.
#include "../vsim.h"

#include <set>

#include "core.h"
using namespace ptxsim;
extern "C" {
const char* ps_error();
void* ps_module(void*, const char*);
void ps_module_free(void*);
int ps_decode(void*, const char*);
const char* ps_launch(void*, const char*, const u32*, const u32*, u32, u64, u32, u64, const u8*,
                      u32, int);
}
struct PsHandle {
  std::unique_ptr<Module> M;
  Device* dev;
};  // leading members of api.cpp's
static Device* dev() {
  static Device* d = new Device;
  return d;
}
static std::string g_error;
static std::set<u64> g_const;
static void* load(const char* ptx, vsim_place_fn place, void* ctx) {
  Device* D = dev();
  D->allocs.clear();
  D->next = GLOBAL_BASE;
  void* h = ps_module(D, ptx);
  if (!h) {
    g_error = ps_error();
    D->allocs.clear();
    return nullptr;
  }
  Module& M = *((PsHandle*)h)->M;
  std::map<u64, u8*> where;
  for (auto& y : M.syms)
    if (!y.is_func && (y.sp == SP_GLOBAL || y.sp == SP_CONST) && y.addr) {
      Alloc* a = D->find(y.addr);
      if (!a) continue;
      void* p = nullptr;
      u64 at = place(ctx, y.name.c_str(), y.size, y.align, &p);
      if (!at) {
        g_error = "no memory for variable " + y.name;
        return nullptr;
      }
      memcpy(p, a->host, std::max<u64>(y.size, 1));
      y.addr = at;
      where[at] = (u8*)p;
      if (y.sp == SP_CONST) g_const.insert(y.addr);
    }
  for (auto& y : M.syms)
    for (auto& r : y.relocs) {
      Symbol& t = M.syms[r.second.first];
      u64 v = (t.is_func ? FUNC_BASE + 16ull * t.func : t.addr) + r.second.second;
      memcpy(where[y.addr] + r.first, &v, 8);
    }
  for (Alloc* a : D->allocs) {
    if (a->flags & AL_OWNED) free(a->host);
    free(a->shadow);
    delete a;
  }
  D->allocs.clear();
  M.own_allocs.clear();
  return h;
}
static void unload(void* m) {
  Module& M = *((PsHandle*)m)->M;
  for (auto& y : M.syms) g_const.erase(y.addr);
  ps_module_free(m);
}
static const char* launch(void* m, const char* kernel, const vsim_cfg* c, const void* params,
                          uint32_t n, const vsim_range* r, uint32_t nr) {
  Device* D = dev();
  std::vector<Alloc> al(nr);
  D->allocs.clear();
  for (u32 i = 0; i < nr; i++) {
    al[i] = Alloc{r[i].base,
                  r[i].size,
                  (u8*)r[i].host,
                  nullptr,
                  (u32)(r[i].readonly || g_const.count(r[i].base) ? AL_CONST : 0),
                  (int)r[i].id,
                  r[i].name ? r[i].name : ""};
    D->allocs.push_back(&al[i]);
  }
  std::vector<std::vector<u8>> sh;
  if (c->checks & VSIM_SHADOW) {
    sh.resize(nr);
    for (u32 i = 0; i < nr; i++) {
      sh[i].resize(r[i].size + 64);
      al[i].shadow = sh[i].data();
    }
  }
  if (c->cluster[0] * c->cluster[1] * c->cluster[2] > 1) {
    g_error = "thread block clusters are not supported by the simulator";
    D->allocs.clear();
    return nullptr;
  }
  const char* js = ps_launch(m, kernel, c->grid, c->block, c->smem, c->seed, c->checks,
                             c->max_insts, (const u8*)params, n, 0);
  if (!js) g_error = ps_error();
  D->allocs.clear();
  return js;
}
static const char* error() { return g_error.c_str(); }
static void tensor_map(void* out, int dt, int rank, uint64_t base, const uint64_t* dim,
                       const uint64_t* stride, const uint32_t* box, const uint32_t* es, int sw,
                       int nan) {
  static const u8 D[13] = {0, 1, 2,  3, 4,  5, 6,
                           7, 9, 10, 8, 11, 12};  // CUtensorMapDataType -> device numbering
  TMap t;
  memset(&t, 0, sizeof t);
  t.addr = base;
  t.magic = TMAP_MAGIC;
  t.dtype = D[dt];
  t.rank = rank;
  t.swizzle = sw;
  t.fill = nan;
  for (int k = 0; k < 5; k++) {
    t.dims[k] = k < rank ? (u32)dim[k] : 0;
    t.box[k] = k < rank ? box[k] : 0;
    t.estride[k] = k < rank ? es[k] : 1;
    if (k + 1 < rank) t.strides[k] = stride[k];
  }
  static_assert(sizeof t <= 128, "tensor map");
  memcpy(out, &t, sizeof t);
}
extern "C" __attribute__((visibility("default"))) const vsim_api* vsim_get() {
  static const vsim_api a{1, "ptxsim", load, unload, launch, error, tensor_map};
  return &a;
}
