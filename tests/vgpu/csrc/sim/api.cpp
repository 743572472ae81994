// The C table of ../vsim.h over the simulator: modules, launches, counters as JSON, faults.
#include <chrono>

#include "../vsim.h"
#include "core.h"
using namespace vsim;

struct vsim_module {
  std::unique_ptr<Module> M{new Module};
};
static std::string g_text, g_fault_text;
static vsim_fault g_fault;

static const char* const kKindNames[] = {"ok",    "address",     "alignment", "uninit", "race",
                                         "async", "barrier",     "deadlock",  "trap",   "assert",
                                         "limit", "unsupported", "invalid"};
static_assert(sizeof kKindNames / sizeof *kKindNames == VSIM_FAULT_KINDS);
static_assert((int)Fault::Invalid == VSIM_INVALID && (int)Fault::Race == VSIM_DATA_RACE);

static void keep(const SimError& e) {
  g_fault_text = e.msg;
  g_fault = vsim_fault{};
  g_fault.kind = (int)e.kind;
  g_fault.name = kKindNames[(int)e.kind];
  g_fault.text = g_fault_text.c_str();
  g_fault.line = e.line;
  g_fault.has_thread = e.has_thread;
  g_fault.has_address = e.has_address;
  g_fault.address = e.address;
  std::copy(e.cta, e.cta + 3, g_fault.cta);
  std::copy(e.thread, e.thread + 3, g_fault.thread);
}
static const vsim_fault* fault() { return &g_fault; }

static vsim_module* load(const char* text, vsim_place_fn place, void* ctx) {
  try {
    std::unique_ptr<vsim_module> h(new vsim_module);
    Module& M = *h->M;
    parse_module(M, text);
    std::map<u64, u8*> bytes;
    for (auto& y : M.syms) {
      if (y.is_func || (y.sp != SP_GLOBAL && y.sp != SP_CONST) || (y.is_extern && !y.size))
        continue;
      u64 size = std::max<u64>(y.size, 1);
      void* host = nullptr;
      y.addr =
          place(ctx, y.name.c_str(), size, std::max<u32>(y.align, 16), y.sp == SP_CONST, &host);
      if (!y.addr) fail(Fault::Invalid, "no memory for variable %s", y.name.c_str());
      memset(host, 0, size);
      memcpy(host, y.init.data(), y.init.size());
      bytes[y.addr] = (u8*)host;
    }
    for (auto& y : M.syms)
      for (auto& r : y.relocs) {
        Symbol& t = M.syms[r.second.first];
        u64 v = (t.is_func ? FUNC_BASE + 16ull * t.func : t.addr) + r.second.second;
        memcpy(bytes.at(y.addr) + r.first, &v, 8);
      }
    return h.release();
  } catch (SimError& e) {
    keep(e);
  } catch (std::exception& e) {
    keep(SimError{Fault::Unsupported, std::string("internal: ") + e.what()});
  }
  return nullptr;
}
static void unload(vsim_module* m) { delete m; }
static std::string jesc(const std::string& s) {
  std::string o;
  for (char c : s) {
    if (c == '"' || c == '\\') {
      o.push_back('\\');
      o.push_back(c);
    } else if (c == '\n')
      o += "\\n";
    else if ((unsigned char)c < 32)
      o += strf("\\u%04x", c);
    else
      o.push_back(c);
  }
  return o;
}
static const char* kernels(vsim_module* m) {
  Module& M = *m->M;
  std::string s = "[";
  bool first = true;
  for (auto& f : M.funcs)
    if (f->entry && f->has_body) {
      if (!first) s += ",";
      first = false;
      s += strf("{\"name\":\"%s\",\"reqntid\":[%u,%u,%u],\"params\":[", jesc(f->name).c_str(),
                f->reqntid[0], f->reqntid[1], f->reqntid[2]);
      for (size_t k = 0; k < f->params.size(); k++)
        s += strf("%s{\"type\":\"%s\",\"size\":%u,\"align\":%u,\"offset\":%u}", k ? "," : "",
                  type_name(f->params[k].ty), f->params[k].size, f->params[k].align,
                  f->params[k].off);
      s += strf("],\"param_bytes\":%u}", f->param_bytes);
    }
  g_text = s + "]";
  return g_text.c_str();
}
static int decode(vsim_module* m, const char* kernel) {
  try {
    auto it = m->M->funcidx.find(kernel);
    if (it == m->M->funcidx.end()) fail(Fault::Invalid, "no kernel %s", kernel);
    decode_function(*m->M, it->second);
    return 0;
  } catch (SimError& e) {
    keep(e);
    return -1;
  }
}
static const char* launch(vsim_module* m, const vsim_launch* L) {
  Module& M = *m->M;
  const char* kernel = L->kernel;
  const u32 *grid = L->grid, *block = L->block;
  const u32 smem = L->smem, nparams = L->param_bytes, checks = L->checks;
  const u8* params = (const u8*)L->params;
  Device D;
  Exec E;
  try {
    if (L->cluster[0] * L->cluster[1] * L->cluster[2] > 1)
      fail(Fault::Unsupported, "thread block clusters are not supported");
    for (u32 k = 0; k < L->num_ranges; k++) {
      const vsim_range& r = L->ranges[k];
      D.allocs.push_back(
          {r.base, r.size, (u8*)r.host, r.map, r.readonly != 0, r.name ? r.name : "memory"});
    }
    auto it = M.funcidx.find(kernel);
    if (it == M.funcidx.end()) fail(Fault::Invalid, "no kernel %s", kernel);
    Function& F = *M.funcs[it->second];
    decode_function(M, it->second);
    memset(&E.st, 0, sizeof E.st);
    E.M = &M;
    E.D = &D;
    E.F = &F;
    for (int k = 0; k < 3; k++) {
      E.cfg.grid[k] = grid[k];
      E.cfg.block[k] = block[k];
      if (!grid[k] || !block[k]) fail(Fault::Invalid, "empty grid or block");
    }
    E.cfg.smem = smem;
    E.cfg.max_insts = L->max_insts;
    E.cfg.checks = checks;
    E.chk_race = checks & VSIM_RACE;
    E.chk_init = checks & VSIM_INIT;
    E.chk_lanes = checks & VSIM_LANES;
    u32 nt = block[0] * block[1] * block[2];
    if (nt > 1024) fail(Fault::Invalid, "%u threads per block exceed 1024", nt);
    if (F.reqntid[0] && (F.reqntid[0] * F.reqntid[1] * F.reqntid[2] != nt))
      fail(Fault::Invalid, "kernel requires %u x %u x %u threads per block", F.reqntid[0],
           F.reqntid[1], F.reqntid[2]);
    if (F.maxntid[0] && nt > F.maxntid[0] * F.maxntid[1] * F.maxntid[2])
      fail(Fault::Invalid, "block exceeds .maxntid");
    if (F.cluster[0] * F.cluster[1] * F.cluster[2] != 1)
      fail(Fault::Unsupported,
           "kernel %s needs clusters of %ux%ux%u CTAs: only cluster size 1 is supported",
           F.name.c_str(), F.cluster[0], F.cluster[1], F.cluster[2]);
    E.rng = L->seed * 0x9E3779B97F4A7C15ull + 0x1234567890abcdefull;
    if (!E.rng) E.rng = 1;
    for (int k = 0; k < 8; k++) E.rand();
    if (nparams != F.param_bytes)
      fail(Fault::Invalid, "kernel %s takes %u parameter bytes, %u given", kernel, F.param_bytes,
           nparams);
    E.params.assign(params, params + nparams);
    E.params.resize(nparams + 32, 0);
    E.params.resize(nparams);
    Alloc pa{PARAM_BASE, nparams, E.params.data(), nullptr, true, "kernel parameters"};
    E.param_alloc = &pa;
    // shared-memory layout: static variables of this kernel and its callees, then dynamic
    E.smem_addr.assign(M.syms.size(), 0);
    u32 off = 0, dynal = 16;
    std::vector<int> fs{F.id}, stat, dyn;
    for (size_t k = 0; k < fs.size(); k++) {
      Function& G = *M.funcs[fs[k]];
      for (int c : G.callees)
        if (std::find(fs.begin(), fs.end(), c) == fs.end()) fs.push_back(c);
      for (int s : G.shared_syms) {
        auto& v = M.syms[s].size ? stat : dyn;
        if (std::find(v.begin(), v.end(), s) == v.end()) v.push_back(s);
      }
    }
    std::sort(stat.begin(), stat.end());
    for (int s : stat) {
      Symbol& y = M.syms[s];
      off = (off + y.align - 1) / y.align * y.align;
      E.smem_addr[s] = SMEM_START + off;
      off += y.size;
    }
    for (int s : dyn) dynal = std::max(dynal, M.syms[s].align);
    if (!dyn.empty() || smem) off = (off + dynal - 1) / dynal * dynal;
    for (int s : dyn) E.smem_addr[s] = SMEM_START + off;
    E.st.smem_static = off;
    E.st.smem_dynamic = smem;
    if (off + smem > 227 * 1024)
      fail(Fault::Invalid, "%u bytes of shared memory exceed 227 KiB", off + smem);
    E.local_bytes = (M.local_bytes + 15) / 16 * 16;
    E.code = M.code.data();
    E.count.assign(M.code.size(), 0);
    auto t0 = std::chrono::steady_clock::now();
    E.cur_w = nullptr;
    run_launch(E);
    double sec = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    u64 cls[C_N] = {0};
    std::map<std::string, std::pair<u64, double>> mma;
    std::map<std::string, u64> ops;
    double flops = 0;
    for (size_t k = 0; k < E.count.size(); k++)
      if (E.count[k]) {
        const Inst& I = E.code[k];
        cls[I.cls] += E.count[k];
        if (I.stat != 0xffffffff) {
          auto& s = M.mmastats[I.stat];
          auto& q = mma[s.name];
          q.first += E.count[k];
          q.second += E.count[k] * s.flops;
          flops += E.count[k] * s.flops;
        }
        if (I.src) ops[I.src->mods[0]] += E.count[k];
      }
    Stats& s = E.st;
    std::string j = "{";
    auto put = [&](const char* n, u64 v) { j += strf("\"%s\":%llu,", n, (unsigned long long)v); };
    put("warp_insts", s.warp_insts);
    put("thread_insts", s.thread_insts);
    put("predicated_off", s.predicated_off);
    put("divergent_branches", s.divergent_branches);
    put("wgmma_early_moves", s.wgmma_early_moves);
    put("global_load_sectors", s.g_ld_sectors);
    put("global_store_sectors", s.g_st_sectors);
    put("global_atomic_sectors", s.g_atom_sectors);
    put("global_load_bytes", s.g_ld_bytes);
    put("global_store_bytes", s.g_st_bytes);
    put("global_load_requests", s.g_ld_req);
    put("global_store_requests", s.g_st_req);
    put("shared_requests", s.s_req);
    put("shared_bytes", s.s_bytes);
    put("shared_wavefronts", s.s_wavefronts);
    put("shared_ideal_wavefronts", s.s_ideal);
    put("shared_bank_conflicts", s.s_conflicts);
    put("shared_load_wavefronts", s.s_ld_wave);
    put("shared_store_wavefronts", s.s_st_wave);
    put("cp_async_bytes", s.cp_async_bytes);
    put("cp_async_global_bytes", s.cp_async_global_bytes);
    put("tma_load_bytes", s.tma_bytes);
    put("tma_store_bytes", s.tma_store_bytes);
    put("local_bytes", s.l_bytes);
    put("smem_static", s.smem_static);
    put("smem_dynamic", s.smem_dynamic);
    put("smem_max_touched", s.smem_max_touched);
    put("ctas", s.ctas);
    put("barriers_completed", s.barriers);
    put("max_resident_ctas", s.max_resident);
    {
      static const char* nm[8] = {"none_K", "none_MN", "128B_K", "128B_MN",
                                  "64B_K",  "64B_MN",  "32B_K",  "32B_MN"};
      j += "\"wgmma_operands\":{";
      for (int k = 0; k < 8; k++)
        j += strf("%s\"%s\":%llu", k ? "," : "", nm[k], (unsigned long long)s.wg_modes[k]);
      j += "},";
    }
    j += "\"classes\":{";
    for (int k = 0; k < C_N; k++)
      j += strf("%s\"%s\":%llu", k ? "," : "", cls_names[k], (unsigned long long)cls[k]);
    j += "},\"mma\":{";
    bool f1 = true;
    for (auto& q : mma) {
      j += strf("%s\"%s\":{\"count\":%llu,\"flops\":%.0f}", f1 ? "" : ",", q.first.c_str(),
                (unsigned long long)q.second.first, q.second.second);
      f1 = false;
    }
    j += strf("},\"mma_flops\":%.0f,\"ops\":{", flops);
    f1 = true;
    for (auto& q : ops) {
      j += strf("%s\"%s\":%llu", f1 ? "" : ",", q.first.c_str(), (unsigned long long)q.second);
      f1 = false;
    }
    j += "}";
    if (checks & VSIM_LINE_COUNTS) {
      j += ",\"lines\":{";
      std::map<u32, u64> L;
      for (size_t k = 0; k < E.count.size(); k++)
        if (E.count[k]) L[E.code[k].line] += E.count[k];
      f1 = true;
      for (auto& q : L) {
        j += strf("%s\"%u\":%llu", f1 ? "" : ",", q.first, (unsigned long long)q.second);
        f1 = false;
      }
      j += "}";
    }
    j += strf(",\"seconds\":%.6f,\"printf\":\"%s\"}", sec, jesc(E.out).c_str());
    g_text = j;
    return g_text.c_str();
  } catch (SimError& e) {
    if (!E.out.empty()) e.msg += "\n  printf output so far: " + E.out.substr(0, 2000);
    keep(e);
  } catch (std::exception& e) {
    keep(SimError{Fault::Unsupported, std::string("internal: ") + e.what()});
  }
  return nullptr;
}
static void tensor_map(void* out, int dtype, int rank, uint64_t base, const uint64_t* dim,
                       const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride,
                       int swizzle, int fill_nan) {
  // CUtensorMapDataType -> the numbering of tensormap.replace
  static const u8 kTypes[13] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  TMap t;
  memset(&t, 0, sizeof t);
  static_assert(sizeof t <= 128, "tensor map");
  t.addr = base;
  t.magic = TMAP_MAGIC;
  t.dtype = kTypes[dtype];
  t.rank = rank;
  t.swizzle = swizzle;
  t.fill = fill_nan;
  for (int k = 0; k < 5; k++) {
    t.dims[k] = k < rank ? (u32)dim[k] : 0;
    t.box[k] = k < rank ? box[k] : 0;
    t.estride[k] = k < rank ? element_stride[k] : 1;
    if (k + 1 < rank) t.strides[k] = stride[k];
  }
  memset(out, 0, 128);
  memcpy(out, &t, sizeof t);
}
extern "C" __attribute__((visibility("default"))) const vsim_api* vsim_get(uint32_t version) {
  static const vsim_api api{VSIM_VERSION, "vsim", load,  unload,    kernels,
                            decode,       launch, fault, tensor_map};
  return version == VSIM_VERSION ? &api : nullptr;
}
