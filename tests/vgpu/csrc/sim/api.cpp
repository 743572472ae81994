// Plain C ABI used by the Python package.
#include <chrono>

#include "core.h"
using namespace ptxsim;
struct PsHandle {
  std::unique_ptr<Module> M;
  Device* dev;
  std::string err, info;
  std::vector<std::string> names;
};
static std::string g_err;
static thread_local std::string g_json;
extern "C" {
const char* ps_error() { return g_err.c_str(); }
void* ps_device_new() { return new Device; }
void ps_device_free(void* d) { delete (Device*)d; }
u64 ps_alloc(void* d, void* host, u64 size, u64 align, u32 flags, const char* name, u64 misalign,
             int* id) {
  Alloc* a = ((Device*)d)->add((u8*)host, size, align, flags, name, misalign);
  *id = a->id;
  return a->base;
}
void ps_free(void* d, int id) { ((Device*)d)->remove(id); }
// shadow: counts of bytes read / written / either since the last clear
int ps_shadow(void* d, int id, u64* out, int clear) {
  for (auto a : ((Device*)d)->allocs)
    if (a->id == id) {
      u64 r = 0, w = 0, e = 0;
      for (u64 k = 0; k < a->size; k++) {
        r += a->shadow[k] & 1;
        w += a->shadow[k] >> 1 & 1;
        e += a->shadow[k] != 0;
      }
      out[0] = r;
      out[1] = w;
      out[2] = e;
      if (clear) memset(a->shadow, 0, a->size);
      return 0;
    }
  return -1;
}
int ps_shadow_copy(void* d, int id, u8* out) {
  for (auto a : ((Device*)d)->allocs)
    if (a->id == id) {
      memcpy(out, a->shadow, a->size);
      return 0;
    }
  return -1;
}
void* ps_module(void* dev, const char* text) {
  try {
    std::unique_ptr<PsHandle> h(new PsHandle);
    h->M.reset(new Module);
    h->dev = (Device*)dev;
    h->M->dev = h->dev;
    parse_module(*h->M, text);
    Module& M = *h->M;
    for (auto& y : M.syms)
      if (!y.is_func && (y.sp == SP_GLOBAL || y.sp == SP_CONST)) {
        if (y.is_extern && !y.size) continue;
        Alloc* a = h->dev->add(nullptr, std::max<u64>(y.size, 1), std::max<u32>(y.align, 16),
                               AL_OWNED | (y.sp == SP_CONST ? AL_CONST : 0), y.name, 0);
        y.addr = a->base;
        if (!y.init.empty()) memcpy(a->host, y.init.data(), y.init.size());
        M.own_allocs.push_back(a->id);
      }
    for (auto& y : M.syms)
      for (auto& r : y.relocs) {
        Symbol& t = M.syms[r.second.first];
        u64 v = (t.is_func ? FUNC_BASE + 16ull * t.func : t.addr) + r.second.second;
        Alloc* a = h->dev->find(y.addr);
        memcpy(a->host + r.first, &v, 8);
      }
    return h.release();
  } catch (SimError& e) {
    g_err = e.msg;
    return nullptr;
  } catch (std::exception& e) {
    g_err = std::string("internal: ") + e.what();
    return nullptr;
  }
}
void ps_module_free(void* p) {
  PsHandle* h = (PsHandle*)p;
  for (int id : h->M->own_allocs) h->dev->remove(id);
  delete h;
}
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
const char* ps_kernels(void* p) {
  Module& M = *((PsHandle*)p)->M;
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
  g_json = s + "]";
  return g_json.c_str();
}
const char* ps_symbols(void* p) {
  Module& M = *((PsHandle*)p)->M;
  std::string s = "[";
  bool first = true;
  for (auto& y : M.syms)
    if (!y.is_func && (y.sp == SP_GLOBAL || y.sp == SP_CONST) && y.addr) {
      s += strf("%s{\"name\":\"%s\",\"addr\":%llu,\"size\":%llu}", first ? "" : ",",
                jesc(y.name).c_str(), (unsigned long long)y.addr, (unsigned long long)y.size);
      first = false;
    }
  g_json = s + "]";
  return g_json.c_str();
}
int ps_copy(void* d, u64 addr, void* host, u64 n, int to_dev) {
  Alloc* a = ((Device*)d)->find(addr);
  if (!a || addr + n > a->base + a->size) {
    g_err = "copy out of range";
    return -1;
  }
  if (to_dev)
    memcpy(a->host + (addr - a->base), host, n);
  else
    memcpy(host, a->host + (addr - a->base), n);
  return 0;
}
// decode only: returns 0 when every instruction of the kernel is supported
int ps_decode(void* p, const char* kernel) {
  try {
    Module& M = *((PsHandle*)p)->M;
    auto it = M.funcidx.find(kernel);
    if (it == M.funcidx.end()) fail("no kernel %s", kernel);
    decode_function(M, it->second);
    return 0;
  } catch (SimError& e) {
    g_err = e.msg;
    return -1;
  }
}

const char* ps_launch(void* p, const char* kernel, const u32* grid, const u32* block, u32 smem,
                      u64 seed, u32 checks, u64 max_insts, const u8* params, u32 nparams,
                      int profile) {
  PsHandle* h = (PsHandle*)p;
  Module& M = *h->M;
  Exec E;
  try {
    auto it = M.funcidx.find(kernel);
    if (it == M.funcidx.end()) fail("no kernel %s", kernel);
    Function& F = *M.funcs[it->second];
    decode_function(M, it->second);
    memset(&E.st, 0, sizeof E.st);
    E.M = &M;
    E.D = h->dev;
    E.F = &F;
    for (int k = 0; k < 3; k++) {
      E.cfg.grid[k] = grid[k];
      E.cfg.block[k] = block[k];
      if (!grid[k] || !block[k]) fail("empty grid or block");
    }
    E.cfg.smem = smem;
    E.cfg.max_insts = max_insts;
    E.cfg.checks = checks;
    E.chk_race = checks & CHK_RACE;
    E.chk_init = checks & CHK_INIT;
    E.shadow = checks & CHK_SHADOW;
    E.chk_lanes = checks & CHK_LANES;
    u32 nt = block[0] * block[1] * block[2];
    if (nt > 1024) fail("%u threads per block exceed 1024", nt);
    if (F.reqntid[0] && (F.reqntid[0] * F.reqntid[1] * F.reqntid[2] != nt))
      fail("kernel requires %u x %u x %u threads per block", F.reqntid[0], F.reqntid[1],
           F.reqntid[2]);
    if (F.maxntid[0] && nt > F.maxntid[0] * F.maxntid[1] * F.maxntid[2])
      fail("block exceeds .maxntid");
    if (F.cluster[0] * F.cluster[1] * F.cluster[2] != 1)
      fail("kernel %s needs clusters of %ux%ux%u CTAs: only cluster size 1 is supported",
           F.name.c_str(), F.cluster[0], F.cluster[1], F.cluster[2]);
    E.rng = seed * 0x9E3779B97F4A7C15ull + 0x1234567890abcdefull;
    if (!E.rng) E.rng = 1;
    for (int k = 0; k < 8; k++) E.rand();
    if (nparams != F.param_bytes)
      fail("kernel %s takes %u parameter bytes, %u given", kernel, F.param_bytes, nparams);
    E.params.assign(params, params + nparams);
    E.params.resize(nparams + 32, 0);
    E.params.resize(nparams);
    Alloc pa{PARAM_BASE, nparams, E.params.data(), nullptr, AL_CONST, 0, "kernel parameters"};
    std::vector<u8> psh(nparams + 64);
    pa.shadow = psh.data();
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
    if (off + smem > 227 * 1024) fail("%u bytes of shared memory exceed 227 KiB", off + smem);
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
    if (profile) {
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
    g_json = j;
    return g_json.c_str();
  } catch (SimError& e) {
    g_err = e.msg;
    if (!E.out.empty()) g_err += "\n  printf output so far: " + E.out.substr(0, 2000);
    return nullptr;
  } catch (std::exception& e) {
    g_err = std::string("internal: ") + e.what();
    return nullptr;
  }
}
const char* ps_line(void* p, u32 n) {
  g_json = line_text(*((PsHandle*)p)->M, n);
  return g_json.c_str();
}
}
