// Operand resolution and the top-level decoder (AST -> Inst).
#include "core.h"
namespace vsim {
const char* cls_names[C_N] = {
    "mma",       "wgmma",     "mufu",       "fp32",      "fp16",           "fp64",
    "int",       "cvt",       "ld_shared",  "st_shared", "ldmatrix",       "stmatrix",
    "ld_global", "st_global", "ld_local",   "st_local",  "ld_const_param", "atomic",
    "cp_async",  "tma",       "barrier",    "mbarrier",  "fence",          "branch",
    "mov",       "shfl",      "vote_redux", "call",      "other"};

void Dec::bad(const char* why) {
  fail(Fault::Unsupported, "unsupported or malformed instruction (%s) in %s, line %u: %s", why,
       F.name.c_str(), P.line, line_text(M, P.line).c_str());
}
bool Dec::take_prefix(const char* m, std::string* full) {
  size_t n = strlen(m);
  for (size_t k = 1; k < P.mods.size(); k++)
    if (!used[k] && P.mods[k].compare(0, n, m) == 0) {
      used[k] = 1;
      if (full) *full = P.mods[k];
      return true;
    }
  return false;
}
Ty Dec::take_type() {
  for (size_t k = 1; k < P.mods.size(); k++)
    if (!used[k]) {
      Ty t = parse_type(P.mods[k]);
      if (t != T_NONE) {
        used[k] = 1;
        return t;
      }
    }
  return T_NONE;
}
void Dec::done() {
  for (size_t k = 0; k < used.size(); k++)
    if (!used[k]) bad(strf("modifier .%s not understood", P.mods[k].c_str()).c_str());
}
int Dec::rounding() {
  static const struct {
    const char* n;
    int r;
  } R[] = {{"rn", R_RN},   {"rz", R_RZ},   {"rm", R_RM},   {"rp", R_RP},  {"rna", R_RNA},
           {"rni", R_RNI}, {"rzi", R_RZI}, {"rmi", R_RMI}, {"rpi", R_RPI}};
  for (auto& r : R)
    if (take(r.n)) return r.r;
  return R_NONE;
}
i32 Dec::konst(int size, u64 lo, u64 hi, int sym, i64 add) {
  if (size < 8) lo &= (1ull << (8 * size)) - 1;
  auto key = std::make_tuple(size, lo, hi, sym, add);
  auto it = M.constidx.find(key);
  if (it != M.constidx.end()) return -(i32)(SR_BYTES + it->second);
  u32 bytes = (size * 32 + 63) / 64 * 64;
  M.const_bytes += bytes;
  M.constidx[key] = M.const_bytes;
  M.consts.push_back({M.const_bytes, (u8)size, lo, hi, sym, add});
  return -(i32)(SR_BYTES + M.const_bytes);
}
u64 Dec::immbits(const Operand& o, Ty t) {
  int sz = ty_size(t);
  if (o.kind == Operand::Imm) {
    i64 v = o.neg ? -o.imm : o.imm;
    if (t == F32) {
      float f = (float)v;
      u32 b;
      memcpy(&b, &f, 4);
      return b;
    }
    if (t == F64) {
      double f = (double)v;
      u64 b;
      memcpy(&b, &f, 8);
      return b;
    }
    if ((t == F16 || t == BF16) && v != 0) bad("integer immediate for a half operand");
    return sz < 8 ? (u64)v & ((1ull << (8 * sz)) - 1) : (u64)v;
  }
  if (o.kind == Operand::FImm) {
    double d;
    if (o.fsize == 4) {
      float f;
      u32 b = o.fbits;
      memcpy(&f, &b, 4);
      if (sz == 4) return o.neg ? b ^ 0x80000000u : b;
      d = f;
    } else
      memcpy(&d, &o.fbits, 8);
    if (o.neg) d = -d;
    if (sz == 8) {
      u64 b;
      memcpy(&b, &d, 8);
      return b;
    }
    if (sz == 4) {
      float f = (float)d;
      u32 b;
      memcpy(&b, &f, 4);
      return b;
    }
    bad("float immediate size");
  }
  bad("immediate expected");
}
i64 Dec::immval(const Operand& o) {
  if (o.kind != Operand::Imm) bad("integer immediate expected");
  return o.neg ? -o.imm : o.imm;
}
i32 Dec::dst(const Operand& o, int size) {
  if (o.kind == Operand::Sink) return konst(16, 0xdead, 0, -2);
  if (o.kind != Operand::Reg) bad("destination must be a register");
  if (size && regsize(o) != size)
    bad(strf("destination register %s has the wrong size", o.name.c_str()).c_str());
  return (i32)(F.base + F.regs[o.reg].off);
}
static int sr_lookup(const std::string& n) {
  static const struct {
    const char* n;
    int s;
  } T[] = {{"%tid.x", SR_TIDX},
           {"%tid.y", SR_TIDY},
           {"%tid.z", SR_TIDZ},
           {"%ntid.x", SR_NTIDX},
           {"%ntid.y", SR_NTIDY},
           {"%ntid.z", SR_NTIDZ},
           {"%ctaid.x", SR_CTAIDX},
           {"%ctaid.y", SR_CTAIDY},
           {"%ctaid.z", SR_CTAIDZ},
           {"%nctaid.x", SR_NCTAIDX},
           {"%nctaid.y", SR_NCTAIDY},
           {"%nctaid.z", SR_NCTAIDZ},
           {"%laneid", SR_LANEID},
           {"%warpid", SR_WARPID},
           {"%nwarpid", SR_NWARPID},
           {"%smid", SR_SMID},
           {"%nsmid", SR_NSMID},
           {"%lanemask_eq", SR_LM_EQ},
           {"%lanemask_lt", SR_LM_LT},
           {"%lanemask_le", SR_LM_LE},
           {"%lanemask_gt", SR_LM_GT},
           {"%lanemask_ge", SR_LM_GE},
           {"%cluster_ctaid.x", SR_ZERO32},
           {"%cluster_ctaid.y", SR_ZERO32},
           {"%cluster_ctaid.z", SR_ZERO32},
           {"%cluster_ctarank", SR_ZERO32},
           {"%cluster_nctaid.x", SR_ONE32},
           {"%cluster_nctaid.y", SR_ONE32},
           {"%cluster_nctaid.z", SR_ONE32},
           {"%cluster_nctarank", SR_ONE32},
           {"%clusterid.x", SR_CTAIDX},
           {"%clusterid.y", SR_CTAIDY},
           {"%clusterid.z", SR_CTAIDZ},
           {"%nclusterid.x", SR_NCTAIDX},
           {"%nclusterid.y", SR_NCTAIDY},
           {"%nclusterid.z", SR_NCTAIDZ},
           {"%dynamic_smem_size", SR_DYNSMEM},
           {"%total_smem_size", SR_TOTSMEM},
           {"%gridid", SR_GRIDID64}};
  for (auto& t : T)
    if (n == t.n) return t.s;
  return -1;
}
i32 Dec::src(const Operand& o, Ty t, int* rsize, bool relaxed) {
  int sz = ty_size(t);
  if (rsize) *rsize = sz;
  switch (o.kind) {
    case Operand::Reg: {
      if (o.neg) bad("negated register operand");
      if (o.imm) bad("register with offset outside of an address");
      int rs = regsize(o);
      if (regty(o) == PRED) bad("predicate used as value");
      if (rs != sz && !(relaxed && rs > sz))
        bad(strf("operand %s has %d bytes, instruction type has %d", o.name.c_str(), rs, sz)
                .c_str());
      if (rsize) *rsize = rs;
      return (i32)(F.base + F.regs[o.reg].off);
    }
    case Operand::Imm:
    case Operand::FImm:
      return konst(sz, immbits(o, t));
    case Operand::Sym: {
      if (sz != 8 && sz != 4) bad("symbol address in an operand that is neither 32 nor 64 bit");
      const Symbol& y = M.syms[o.sym];
      if (y.sp == SP_SHARED) {
        if (std::find(F.shared_syms.begin(), F.shared_syms.end(), o.sym) == F.shared_syms.end())
          F.shared_syms.push_back(o.sym);
      } else if (sz == 4 && !(y.sp == SP_LOCAL || y.thread_param))
        bad("32-bit address of a non-shared symbol");
      if (y.is_func && y.func >= 0 && M.funcs[y.func]->has_body &&
          std::find(F.callees.begin(), F.callees.end(), y.func) == F.callees.end())
        F.callees.push_back(y.func);
      return konst(sz, 0, 0, o.sym, o.imm);
    }
    case Operand::Label: {
      int s = sr_lookup(o.name);
      if (s < 0) bad(strf("unknown identifier or special register %s", o.name.c_str()).c_str());
      int ssz = s >= SR_GRIDID64 ? 8 : 4;
      if (ssz != sz && !(ssz == 4 && sz == 2)) {
        if (ssz == 4 && sz == 8 && s >= 0) bad("64-bit read of a 32-bit special register");
        if (!relaxed) bad("special register size");
      }
      if (sz < ssz) bad("narrow read of a special register");
      if (rsize) *rsize = ssz;
      return sr_off(s);
    }
    default:
      bad("bad operand kind");
  }
}
i32 Dec::pred(const Operand& o, bool* neg) {
  if (o.kind == Operand::Imm) {
    if (neg) *neg = false;
    return konst(4, o.imm ? ~0u : 0u);
  }
  if (o.kind == Operand::Sink) return konst(16, 0xdead, 0, -2);
  if (o.kind != Operand::Reg || regty(o) != PRED) bad("predicate register expected");
  if (neg)
    *neg = o.neg;
  else if (o.neg)
    bad("unexpected !");
  return (i32)(F.base + F.regs[o.reg].off);
}
// memory operand [reg+imm], [sym+imm], [imm]
void Dec::addr(const Operand& m, i32& base, i64& off, u8& bsize, Space* sp) {
  if (m.kind != Operand::Mem || m.el.empty()) bad("memory operand expected");
  const Operand& o = m.el[0];
  off = 0;
  if (o.kind == Operand::Reg) {
    bsize = regsize(o);
    if (bsize != 4 && bsize != 8) bad("address register size");
    base = (i32)(F.base + F.regs[o.reg].off);
    off = o.imm;
    if (regty(o) == PRED) bad("address");
  } else if (o.kind == Operand::Imm) {
    base = konst(8, o.imm);
    bsize = 8;
  } else if (o.kind == Operand::Sym) {
    Operand q = o;
    off = o.imm;
    q.imm = 0;
    base = src(q, U64);
    bsize = 8;
    if (sp && M.syms[o.sym].sp == SP_PARAM) *sp = SP_PARAM;
  } else
    bad("address operand");
}

// control flow
static void h_never(Exec&, Warp&, const Inst&, u32) {
  fail(Fault::Unsupported, "internal: control instruction executed as ALU");
}
static void h_vprintf(Exec& E, Warp& w, const Inst& I, u32 m);
static void h_assertfail(Exec& E, Warp& w, const Inst& I, u32 m);
static void h_trap(Exec&, Warp&, const Inst&, u32 m) {
  fail_lane(Fault::Trap, __builtin_ctz(m), "trap executed");
}
struct ParamCopy {
  u32 from, to, size;
};

static bool decode_control(Dec& d, std::vector<std::pair<u32, std::string>>& fix) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.fn = h_never;
  if (op == "bra") {
    I.flag = d.take("uni");
    d.done();
    if (d.op(0).kind != Operand::Label) d.bad("branch target");
    I.kind = K_BRA;
    I.cls = C_BRANCH;
    fix.push_back({(u32)d.M.code.size(), d.op(0).name});
    return true;
  }
  if (op == "brx") {
    if (!d.take("idx")) d.bad("brx form");
    d.take("uni");
    d.done();
    I.a = d.src(d.op(0), U32);
    I.kind = K_BRX;
    I.cls = C_BRANCH;
    std::string t = d.op(1).name;
    size_t at = t.find('@');
    if (at != std::string::npos) t = t.substr(0, at);
    auto it = d.F.tables.find(t);
    if (it == d.F.tables.end()) d.bad("unknown branch table");
    for (auto& l : it->second.labels) {
      auto k = d.F.labels.find(l);
      if (k == d.F.labels.end()) d.bad("branch table label");
      I.x.push_back((i32)(d.F.pc0 + k->second));
    }
    return true;
  }
  if (op == "ret") {
    d.take("uni");
    d.done();
    I.kind = d.F.entry ? K_EXIT : K_RET;
    I.cls = C_BRANCH;
    return true;
  }
  if (op == "exit") {
    d.done();
    I.kind = K_EXIT;
    I.cls = C_BRANCH;
    return true;
  }
  if (op == "trap") {
    d.done();
    I.kind = K_ALU;
    I.fn = h_trap;
    return true;
  }
  if (op == "brkpt") {
    d.done();
    I.kind = K_NOP;
    return true;
  }
  if (op == "pragma" || op == "nop") {
    d.done();
    I.kind = K_NOP;
    return true;
  }
  if (op == "call") {
    d.take("uni");
    d.done();
    I.cls = C_CALL;
    size_t k = 0;
    std::vector<Operand> rets, args;
    if (d.op(0).kind == Operand::Paren) {
      rets = d.op(0).el;
      k = 1;
    }
    const Operand& t = d.op(k++);
    if (k < d.n() && d.op(k).kind == Operand::Paren) args = d.op(k++).el;
    auto psym = [&](const Operand& o) -> Symbol& {
      if (o.kind != Operand::Sym || !d.M.syms[o.sym].thread_param)
        d.bad("call argument must be a .param variable");
      return d.M.syms[o.sym];
    };
    if (t.kind == Operand::Sym && d.M.syms[t.sym].is_func) {
      std::string nm = t.name;
      int fi = d.M.funcidx.count(nm) ? d.M.funcidx[nm] : -1;
      if (fi < 0) d.bad("call of unknown function");
      Function& G = *d.M.funcs[fi];
      if (!G.has_body) {
        I.kind = K_ALU;
        if (nm == "vprintf") {
          I.fn = h_vprintf;
          I.x = {(i32)psym(args[0]).addr, (i32)psym(args[1]).addr,
                 rets.empty() ? -1 : (i32)psym(rets[0]).addr};
          return true;
        }
        if (nm == "__assertfail") {
          I.fn = h_assertfail;
          for (auto& a : args) I.x.push_back((i32)psym(a).addr);
          return true;
        }
        d.bad(strf("call of external function %s", nm.c_str()).c_str());
      }
      if (G.params.size() != args.size() || G.rets.size() != rets.size())
        d.bad("argument count mismatch");
      I.kind = K_CALL;
      I.target = fi;
      if (std::find(d.F.callees.begin(), d.F.callees.end(), fi) == d.F.callees.end())
        d.F.callees.push_back(fi);
      I.imm = args.size();
      for (size_t q = 0; q < args.size(); q++) {
        Symbol& y = psym(args[q]);
        if (y.size != G.params[q].size) d.bad("argument size mismatch");
        I.x.push_back(y.addr);
        I.x.push_back(d.M.syms[G.params[q].sym].addr);
        I.x.push_back(y.size);
      }
      for (size_t q = 0; q < rets.size(); q++) {
        Symbol& y = psym(rets[q]);
        if (y.size != G.rets[q].size) d.bad("return size mismatch");
        I.x.push_back(d.M.syms[G.rets[q].sym].addr);
        I.x.push_back(y.addr);
        I.x.push_back(y.size);
      }
      return true;
    }
    if (t.kind == Operand::Reg) {  // indirect call: I.a holds the function address; any function of
                                   // the module may be the target
      I.kind = K_CALL;
      I.flag = true;
      I.a = d.src(t, U64);
      I.imm = args.size();
      for (auto& o : args) {
        Symbol& y = psym(o);
        I.x.push_back(y.addr);
        I.x.push_back(-1);
        I.x.push_back(y.size);
      }
      for (auto& o : rets) {
        Symbol& y = psym(o);
        I.x.push_back(-1);
        I.x.push_back(y.addr);
        I.x.push_back(y.size);
      }
      for (auto& f : d.M.funcs)
        if (!f->entry && f->has_body &&
            std::find(d.F.callees.begin(), d.F.callees.end(), f->id) == d.F.callees.end())
          d.F.callees.push_back(f->id);
      return true;
    }
    d.bad("call target");
  }
  return false;
}
static std::string read_cstr(Exec& E, u64 a) {
  std::string s;
  for (int k = 0; k < 4096; k++) {
    char c = *(char*)global_ptr(E, a + k, 1, -1, "printf/assert string", false);
    if (!c) break;
    s.push_back(c);
  }
  return s;
}
static u8* gen_ptr(Exec& E, Warp& w, u64 a, u32 n, int lane) {
  if (a - LOCAL_BASE < WINDOW) {
    u64 o = a - LOCAL_BASE;
    if (o + n > E.local_bytes)
      fail_lane(Fault::Address, lane, "printf argument buffer out of bounds");
    return w.local + (size_t)lane * E.local_bytes + o;
  }
  return global_ptr(E, a, n, lane, "printf arguments", false);
}
static void h_vprintf(Exec& E, Warp& w, const Inst& I, u32 m) {
  LANES(m) {
    u8* L = w.local + (size_t)lane * E.local_bytes;
    u64 fp, ap;
    memcpy(&fp, L + I.x[0], 8);
    memcpy(&ap, L + I.x[1], 8);
    std::string f = read_cstr(E, fp), o;
    u64 q = ap;
    auto arg = [&](int n) {
      u64 v = 0;
      q = (q + n - 1) / n * n;
      memcpy(&v, gen_ptr(E, w, q, n, lane), n);
      q += n;
      return v;
    };
    for (size_t k = 0; k < f.size(); k++) {
      if (f[k] != '%') {
        o.push_back(f[k]);
        continue;
      }
      if (f[k + 1] == '%') {
        o.push_back('%');
        k++;
        continue;
      }
      size_t b = k++;
      while (k < f.size() && strchr("-+ #0123456789.*", f[k])) k++;
      int lng = 0;
      std::string spec = f.substr(b, k - b);
      while (k < f.size() && strchr("hlzjt", f[k])) {
        if (f[k] != 'h') lng++;
        k++;
      }
      char c = k < f.size() ? f[k] : 0;
      if (strchr("diouxXc", c)) {
        u64 v = arg(lng ? 8 : 4);
        if (lng)
          o += strf((spec + "ll" + c).c_str(), (long long)v);
        else if (c == 'd' || c == 'i')
          o += strf((spec + c).c_str(), (int)v);
        else
          o += strf((spec + c).c_str(), (unsigned)v);
      } else if (strchr("fFeEgGaA", c)) {
        u64 v = arg(8);
        double dv;
        memcpy(&dv, &v, 8);
        o += strf((spec + c).c_str(), dv);
      } else if (c == 's')
        o += read_cstr(E, arg(8));
      else if (c == 'p')
        o += strf("0x%llx", (unsigned long long)arg(8));
      else
        fail_lane(Fault::Unsupported, lane, "printf conversion %%%c not supported", c);
    }
    if (E.out.size() < (1u << 24)) E.out += o;
    if (I.x[2] >= 0) {
      u32 r = 1;
      memcpy(L + I.x[2], &r, 4);
    }
  }
}
static void h_assertfail(Exec& E, Warp& w, const Inst& I, u32 m) {
  int lane = __builtin_ctz(m);
  u8* L = w.local + (size_t)lane * E.local_bytes;
  u64 a[3];
  u32 ln;
  for (int k = 0; k < 2; k++) memcpy(&a[k], L + I.x[k], 8);
  memcpy(&ln, L + I.x[2], 4);
  memcpy(&a[2], L + I.x[3], 8);
  auto str = [&](u64 p) {
    try {
      return read_cstr(E, p);
    } catch (SimError&) {
      return std::string("?");
    }
  };
  fail_lane(Fault::Assert, lane, "device assertion failed: %s  (%s:%u, %s)", str(a[0]).c_str(),
            str(a[1]).c_str(), ln, str(a[2]).c_str());
}

void decode_function(Module& M, int fi) {
  Function& F = *M.funcs[fi];
  if (F.decoded) return;
  if (!F.has_body) fail(Fault::Unsupported, "function %s has no body", F.name.c_str());
  F.pc0 = M.code.size();
  std::vector<std::pair<u32, std::string>> fix;
  for (size_t k = 0; k < F.code.size(); k++) {
    const PInst& P = F.code[k];
    Inst I;
    I.line = P.line;
    I.src = &P;
    Dec d(M, F, P, I);
    if (P.guard >= 0) {
      if (F.regs[P.guard].ty != PRED) d.bad("guard is not a predicate");
      I.guard = F.base + F.regs[P.guard].off;
      I.guard_neg = P.guard_neg;
    }
    if (!(decode_control(d, fix) || (I.fn = nullptr, decode_alu(d)) || decode_cvt(d) ||
          decode_mem(d) || decode_warp(d) || decode_tensor(d) || decode_wgmma(d) ||
          decode_async(d)))
      d.bad("unknown opcode");
    if (!I.fn && I.kind != K_NOP) d.bad("no handler");
    M.code.push_back(I);
  }
  Inst end;
  end.kind = F.entry ? K_EXIT : K_RET;
  end.cls = C_BRANCH;
  end.line = F.code.empty() ? 0 : F.code.back().line;
  end.fn = h_never;
  M.code.push_back(end);
  F.npc = M.code.size() - F.pc0;
  M.code_func.resize(M.code.size(), fi);
  for (auto& x : fix) {
    auto it = F.labels.find(x.second);
    if (it == F.labels.end())
      fail(Fault::Unsupported, "undefined label %s in %s (line %u)", x.second.c_str(),
           F.name.c_str(), M.code[x.first].line);
    M.code[x.first].target = F.pc0 + it->second;
  }
  F.decoded = true;
  for (size_t k = 0; k < F.callees.size(); k++) decode_function(M, F.callees[k]);
}
}  // namespace vsim
