// Shared types of the simulator. Layers: parser -> decode -> instruction handlers
// (alu, cvt, mem, warp, tensor, async, wgmma) -> sched -> the C table of vsim.h (api).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace vsim {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef unsigned __int128 u128;
static const u32 FULL = 0xffffffffu;
static const u32 NOREG = 0x7fffffffu;

enum class Fault {
  Ok,
  Address,
  Alignment,
  Uninit,
  Race,
  Async,
  Barrier,
  Deadlock,
  Trap,
  Assert,
  Limit,
  Unsupported,
  Invalid
};
// Everything that ends a launch. lane: -1 the first active one, -2 none in particular.
struct SimError {
  Fault kind;
  std::string msg;
  int lane = -1;
  bool has_address = false;
  u64 address = 0;
  // filled in by run_launch
  u32 line = 0;
  bool has_thread = false;
  u32 cta[3] = {0, 0, 0}, thread[3] = {0, 0, 0};
};
[[noreturn]] void fail(Fault kind, const char* fmt, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_lane(Fault kind, int lane, const char* fmt, ...)
    __attribute__((format(printf, 3, 4)));
// with the global address that the report should explain
[[noreturn]] void fail_at(Fault kind, int lane, u64 address, const char* fmt, ...)
    __attribute__((format(printf, 4, 5)));
std::string strf(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

// types
enum Ty : u8 {
  T_NONE,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  F16X2,
  BF16,
  BF16X2,
  F32,
  F64,
  TF32,
  PRED,
  E4M3,
  E5M2,
  E4M3X2,
  E5M2X2,
  U16X2,
  S16X2,
  F32X2,
  S4,
  U4,
  B1,
  E2M1X2
};
Ty parse_type(const std::string& s);  // T_NONE when s is not a type
const char* type_name(Ty t);
int ty_size(Ty t);  // bytes of a register of that type (pred: 4)
inline bool ty_signed(Ty t) { return t >= S8 && t <= S64; }
inline bool ty_float(Ty t) { return (t >= F16 && t <= TF32) || t == F32X2; }

enum Space : u8 { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST };

// simulated address map (generic 64-bit addresses)
static const u64 PARAM_BASE = 0x00007c0000000000ull;   // kernel parameters
static const u64 LOCAL_BASE = 0x00007d0000000000ull;   // generic window on thread-local memory
static const u64 SHARED_BASE = 0x00007e0000000000ull;  // generic window on shared memory
static const u64 WINDOW = 0x0000000001000000ull;       // 16 MiB windows
static const u64 GLOBAL_BASE = 0x00007f0000000000ull;
static const u64 FUNC_BASE = 0x00007b0000000000ull;  // function "addresses" (indirect calls)
static const u32 SMEM_START = 1024;                  // first usable shared address (as on sm_90)

// AST
struct Operand {
  enum Kind : u8 { None, Reg, Imm, FImm, Sym, Vec, Mem, Sink, Label, Paren } kind = None;
  bool neg = false;         // !p  or -reg
  u8 fsize = 0;             // FImm: 4 (0f), 8 (0d), 0 (decimal)
  int reg = -1;             // Reg: register id within the function
  i64 imm = 0;              // Imm value / Mem offset / Sym offset
  u64 fbits = 0;            // FImm raw bits (double bits when fsize==0)
  std::string name;         // symbol / label / special register
  int sym = -1;             // module symbol id
  std::vector<Operand> el;  // Vec elements / Mem: [base, extra...]
};
struct PInst {
  u32 line = 0;
  int guard = -1;
  bool guard_neg = false;
  std::string op;                 // full mnemonic
  std::vector<std::string> mods;  // pieces split at '.'; mods[0] = base opcode
  std::vector<Operand> ops;
  int pipe = -1;  // ops index after which a '|' occurred (dst|pred)
};
struct RegInfo {
  std::string name;
  Ty ty;
  u32 off;
};
struct Symbol {
  std::string name;
  Space sp = SP_GLOBAL;
  Ty ty = B8;
  u32 align = 1;
  u64 size = 0;
  bool is_extern = false;
  bool is_func = false;
  int func = -1;
  bool thread_param = false;
  std::vector<u8> init;
  std::vector<std::pair<u32, std::pair<int, i64>>> relocs;  // (offset,(sym,addend)), 8 bytes
  std::vector<std::pair<u32, std::pair<std::string, i64>>> pending;
  u64 addr = 0;  // global/const: simulated address; local/param: offset in thread memory
  int owner = -1;
};
struct Param {
  std::string name;
  Ty ty;
  u32 size, align, off;
  int sym;
};
struct BranchTable {
  std::vector<std::string> labels;
  std::vector<u32> pcs;
};

struct Inst;
struct Exec;
struct Warp;
typedef void (*Handler)(Exec&, Warp&, const Inst&, u32 mask);

enum Kind : u8 { K_ALU, K_BRA, K_BRX, K_CALL, K_RET, K_EXIT, K_CTL, K_NOP };
// K_CTL handlers return through w.ctl: they may block or yield.

enum Cls : u8 {
  C_MMA,
  C_WGMMA,
  C_MUFU,
  C_FP32,
  C_FP16,
  C_FP64,
  C_INT,
  C_CVT,
  C_LDS,
  C_STS,
  C_LDSM,
  C_STSM,
  C_LDG,
  C_STG,
  C_LDL,
  C_STL,
  C_LDC,
  C_ATOM,
  C_CPASYNC,
  C_TMA,
  C_BAR,
  C_MBAR,
  C_FENCE,
  C_BRANCH,
  C_MOV,
  C_SHFL,
  C_VOTE,
  C_CALL,
  C_OTHER,
  C_N
};
extern const char* cls_names[C_N];

struct Inst {
  Handler fn = nullptr;
  i32 d = NOREG, a = NOREG, b = NOREG, c = NOREG, e = NOREG,
      f = NOREG;  // byte offsets from the warp register base
  i32 guard = NOREG;
  bool guard_neg = false;
  Kind kind = K_ALU;
  Cls cls = C_OTHER;
  Ty t0 = T_NONE, t1 = T_NONE, t2 = T_NONE;
  u8 ds = 0, as = 0, bs = 0, cs = 0;             // register sizes of d/a/b/c
  u8 op = 0, op2 = 0, rnd = 0, vec = 1, sz = 0;  // handler specific
  Space sp = SP_GENERIC;
  bool ftz = false, sat = false, neg = false, flag = false, flag2 = false, aligned = false;
  u8 sync = 0;
  i32 memb = NOREG;  // 1: whole warp must be converged, 2: lanes of memb must be
  i64 imm = 0;
  i64 imm2 = 0;
  u32 target = 0;
  std::vector<i32> x;  // extra register offsets (vectors)
  u32 line = 0;
  u32 stat = 0xffffffff;  // index of an mma statistics entry
  const PInst* src = nullptr;
};

struct Function {
  std::string name;
  bool entry = false;
  bool has_body = false;
  int id = -1;
  int sym = -1;
  std::vector<Param> params, rets;
  u32 param_bytes = 0;
  std::vector<RegInfo> regs;
  u32 frame = 0;  // bytes of register frame
  std::vector<PInst> code;
  std::map<u32, std::string> text_lines;
  std::map<std::string, u32> labels;  // unique (scoped) label -> instruction index
  std::map<std::string, BranchTable> tables;
  std::map<std::string, std::vector<std::string>> calltargets;
  u32 cluster[3] = {1, 1, 1};
  u32 reqntid[3] = {0, 0, 0};
  u32 maxntid[3] = {0, 0, 0};
  // decoded
  bool decoded = false;
  u32 base = 0;
  u32 pc0 = 0;
  u32 npc = 0;
  std::vector<int> callees;
  std::vector<int> shared_syms;
};

struct ConstEnt {
  u32 off;
  u8 size;
  u64 lo, hi;
  int sym;
  i64 addend;
};  // off: distance below the register base

// A range of device memory; shadow, if any, takes 1 (read) and 2 (written) per byte.
struct Alloc {
  u64 base, size;
  u8* host;
  u8* shadow;
  bool readonly;
  const char* name;
};
struct Device {
  std::vector<Alloc> allocs;  // sorted by base, disjoint
  Alloc* find(u64 addr) {
    size_t lo = 0, hi = allocs.size();
    while (lo < hi) {
      size_t m = (lo + hi) / 2;
      if (allocs[m].base <= addr)
        lo = m + 1;
      else
        hi = m;
    }
    if (!lo) return nullptr;
    Alloc* a = &allocs[lo - 1];
    return addr - a->base < a->size ? a : nullptr;
  }
  Alloc* nearest(u64 addr);
};

struct MmaStat {
  std::string name;
  double flops;
};
struct Module {
  std::string text;
  std::vector<std::string> lines;
  std::vector<Symbol> syms;
  std::unordered_map<std::string, int> symidx;
  std::vector<std::unique_ptr<Function>> funcs;
  std::unordered_map<std::string, int> funcidx;
  int target_sm = 0;
  bool target_a = false;
  std::string version;
  // decode products
  std::vector<Inst> code;
  std::vector<int> code_func;
  std::vector<ConstEnt> consts;
  std::map<std::tuple<int, u64, u64, int, i64>, u32> constidx;
  u32 const_bytes = 0;
  std::map<std::string, i32> special_off;
  u32 func_bytes = 0, local_bytes = 0;
  std::vector<MmaStat> mmastats;
  int sym(const std::string& n) const {
    auto it = symidx.find(n);
    return it == symidx.end() ? -1 : it->second;
  }
};
void parse_module(Module& M, const std::string& text);
void decode_function(Module& M, int f);
std::string line_text(const Module& M, u32 line);

// special registers kept in the constant area below the register base
enum SpecialReg {
  SR_TIDX,
  SR_TIDY,
  SR_TIDZ,
  SR_NTIDX,
  SR_NTIDY,
  SR_NTIDZ,
  SR_CTAIDX,
  SR_CTAIDY,
  SR_CTAIDZ,
  SR_NCTAIDX,
  SR_NCTAIDY,
  SR_NCTAIDZ,
  SR_LANEID,
  SR_WARPID,
  SR_NWARPID,
  SR_SMID,
  SR_NSMID,
  SR_LM_EQ,
  SR_LM_LT,
  SR_LM_LE,
  SR_LM_GT,
  SR_LM_GE,
  SR_ZERO32,
  SR_ONE32,
  SR_DYNSMEM,
  SR_TOTSMEM,
  SR_GRIDID64,
  SR_ZERO64,
  SR_N
};
static const u32 SR_BYTES = SR_N * 256;  // each slot 256 bytes (room for 64-bit)
inline i32 sr_off(int s) { return -(i32)SR_BYTES + s * 256; }

// machine state
enum GState : u8 { G_READY, G_WSYNC, G_WBAR };
struct Group {
  u32 pc, mask;
  GState st;
  u32 need;
};

struct AsyncCopy {
  u64 seq;
  u32 mask;
  u32 grp[32];
  u32 dst[32];
  u64 src[32];
  u8 ssz[32];
  u8 size;
  u32 line;
  u32 pc;
};

struct WgmmaOp {
  u32 pc;
  u32 grp;
  u64 da, db;
  bool scale_d;
  bool move;
  u32 mask;
};  // move: deferred register copy of a pending accumulator

static const int MAXW = 33;  // 32 warps + 1 async agent
struct VC {
  u32 c[MAXW];
};

struct Warp {
  u8* R = nullptr;  // register base
  u8* buf = nullptr;
  u32 id = 0, live = 0, pc = 0, mask = 0;
  u32 minother = 0xffffffff;
  std::vector<Group> others;  // groups other than the running one
  bool has_cur = false;
  u8 ctl = 0;  // set by K_CTL handlers
  bool fair = false;
  u32 since = 0;
  std::vector<u32> ret[32];
  u8* local = nullptr;  // 32 * local_bytes
  std::vector<AsyncCopy> async;
  u32 commit_cnt[32] = {0};
  std::vector<WgmmaOp> wg;
  u32 wg_commit = 0;
  bool wg_any = false;  // wgmap: registers of outstanding wgmma
  u32 bulk_commit[32] = {0};
  u64 async_seq = 0;
  std::vector<u8> wgmap;
  bool done = false, blocked = false, spinning = false;
  u32 cl_phase = 0;
  u64 wsync = 0,
      serial =
          1;  // serial: instructions issued; wsync: serial at the last synchronisation of lanes
  u64 spin_epoch = 0;
  VC vc;
  u32 clock = 1;
  VC fvc;
  u32 fence_clock = 0;  // fvc / fence_clock: state at the last fence.proxy.async
  u32 tid0 = 0;
  template <class T>
  T* r(i32 off) {
    return reinterpret_cast<T*>(R + off);
  }
  u32& pr(i32 off) { return *reinterpret_cast<u32*>(R + off); }
};
enum { CTL_NEXT = 0, CTL_BLOCK = 1, CTL_YIELD = 2, CTL_STAY = 3 };

struct BarWait {
  int warp;
  u32 mask, pc;
};
struct Barrier {
  bool active = false, implicit = false;
  u32 expect = 0, arrived = 0, lanes = 0;
  std::vector<BarWait> waiting;
  VC vc;
  u32 red_and = 1, red_or = 0, red_popc = 0;
};
struct MBar {
  u32 addr;
  u32 count;
  i32 pending;
  i64 tx;
  u64 phase;
  VC vc, vc_done;
};

struct TMap {
  u64 addr;
  u32 magic;
  u8 dtype, rank, interleave, swizzle, fill, oob, pad0, pad1;
  u32 dims[5];
  u32 pad2;
  u64 strides[4];
  u32 box[5];
  u32 estride[5];
};  // 128-byte tensor map (private encoding)
static const u32 TMAP_MAGIC = 0x50414d54;
enum { TO_LOAD, TO_STORE, TO_TLOAD, TO_TSTORE, TO_CPARRIVE };
struct TmaOp {
  int kind, warp, lane, red, rank;
  Ty rty;
  u32 pc, smem, bytes, mbar, group;
  u64 gaddr, seq;
  i32 coord[5];
  u32 mask;
  TMap tm;
  bool read_done;
  std::vector<u8> data;
};

struct Cta {
  u32 idx[3];
  u64 lin;
  std::vector<Warp> warps;
  std::vector<u8> smem;
  u32 smem_size = 0;  // valid shared addresses: [SMEM_START, smem_size)
  // checks (checks.cpp)
  std::vector<u8> init;  // 0 uninit 1 init 2 cp.async pending 3 tma pending 4 mbarrier
  std::vector<u32> wr_stamp;
  std::vector<u8> wr_warp;
  std::vector<u32> rd_gran;
  std::vector<std::vector<u32>> rd;
  std::vector<u32> pend_line;
  std::vector<u64> ln_w,
      ln_r;  // optional lane-level check: serial << 16 | warp << 8 | lane (0xff: several)
  Barrier bars[16];
  u32 cl_arrived = 0, cl_phase = 0;
  VC cl_vc, cl_done;
  std::unordered_map<u32, MBar> mbars;
  std::vector<TmaOp> tma;
  u64 progress = 0;
  u64 epoch = 0;
  u64 run = 0;
  u32 live_threads = 0;
  bool started = false, done = false;
  ~Cta() {
    for (auto& w : warps) {
      free(w.buf);
      free(w.local);
    }
  }
};

struct Stats {
  u64 warp_insts = 0, thread_insts = 0, predicated_off = 0;
  u64 g_ld_sectors = 0, g_st_sectors = 0, g_ld_bytes = 0, g_st_bytes = 0, g_ld_req = 0,
      g_st_req = 0, g_atom_sectors = 0;
  u64 s_wavefronts = 0, s_ideal = 0, s_conflicts = 0, s_bytes = 0, s_req = 0, s_ld_wave = 0,
      s_st_wave = 0;
  u64 cp_async_bytes = 0, cp_async_global_bytes = 0, tma_bytes = 0, tma_store_bytes = 0, ctas = 0,
      barriers = 0;
  u64 l_bytes = 0;
  u32 smem_static = 0, smem_dynamic = 0, smem_max_touched = 0;
  u64 max_resident = 0;
  u64 divergent_branches = 0, wgmma_early_moves = 0,
      wg_modes[8] = {0};  // wg_modes: operands by (swizzle field, transposed)
};

struct LaunchCfg {
  u32 grid[3], block[3];
  u32 smem;
  u64 seed;
  u32 checks;
  u64 max_insts;
  u32 cluster[3];
};

struct Exec {
  Module* M;
  Device* D;
  Function* F;
  LaunchCfg cfg;
  Stats st;
  std::vector<u64> count;  // per pc executions
  Cta* cta = nullptr;
  Inst* code = nullptr;
  u64 rng;
  u32 now = 1;
  std::vector<u8> params;
  Alloc* param_alloc = nullptr;
  Alloc* last = nullptr;
  u32 local_bytes = 0;
  std::vector<u32> smem_addr;  // address per shared symbol
  u32 dyn_base = 0;
  u64 clock = 0;
  std::string out;  // printf output
  bool chk_race, chk_init, chk_lanes;
  u32 cur_pc = 0;
  Warp* cur_w = nullptr;
  u64 spin_ops =
      0;  // polling accesses (failed atomics, volatile loads) since the last change of memory
  u64 gwrites = 0;  // progress counter for cross-CTA spins
  u64 rand() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng * 0x2545F4914F6CDD1Dull;
  }
  u32 rnd(u32 n) { return (u32)((rand() >> 32) * (u64)n >> 32); }
};

void run_launch(Exec& E);
void check_barriers(Exec& E, Cta& C);
void barrier_arrive(Exec& E, Warp& w, const Inst& I, u32 m);

// memory (mem.cpp)
u8* global_ptr(Exec& E, u64 addr, u32 size, int lane, const char* what, bool write);
u8* smem_ptr(Exec& E, u64 addr, u32 size, int lane, const char* what);
void sm_read(Exec& E, Warp& w, u32 addr, u32 n, int lane);  // checks before a read
void sm_write(Exec& E, Warp& w, u32 addr, u32 n, int lane,
              const void* data);  // checks before a write, marks initialised
void sm_atomic(Exec& E, Warp& w, u32 addr, u32 n, int lane, bool sync);
void sm_begin_async(Exec& E, Warp& w, u32 addr, u32 n, int lane, u8 kind, u32 line);
void sm_end_async(Exec& E, Warp& w, u32 addr, u32 n, int lane);
void checks_reset(Exec& E, Cta& C);
void vc_release(Exec& E, Warp& w, VC& into);
void vc_acquire(Warp& w, const VC& from);
void vc_join(VC& a, const VC& b);
u32 count_sectors(const u64* addr, u32 mask, u32 size);
u32 count_wavefronts(const u32* addr, u32 mask, u32 size);
void cp_async_complete(Exec& E, Warp& w, u32 mask, u32 allow, bool all, u64 maxseq = ~0ull);
std::string thread_name(Exec& E, Warp& w, int lane);
bool tma_force(Exec& E, Cta& C);
bool wgmma_check(Exec& E, Warp& w, const Inst& I, u32 m);  // true: the instruction was deferred
void wgmma_retire(Exec& E, Warp& w, u32 allow, bool all);

// decode support
struct Dec {
  Module& M;
  Function& F;
  const PInst& P;
  Inst& I;
  std::vector<u8> used;
  size_t mi = 1;
  Dec(Module& m, Function& f, const PInst& p, Inst& i)
      : M(m), F(f), P(p), I(i), used(p.mods.size(), 0) {
    used[0] = 1;
  }
  bool take(const char* m) {
    for (size_t k = 1; k < P.mods.size(); k++)
      if (!used[k] && P.mods[k] == m) {
        used[k] = 1;
        return true;
      }
    return false;
  }
  bool take_prefix(const char* m, std::string* full = nullptr);
  Ty take_type();
  Ty need_type() {
    Ty t = take_type();
    if (t == T_NONE) bad("missing type");
    return t;
  }
  void done();
  [[noreturn]] void bad(const char* why);
  size_t n() const { return P.ops.size(); }
  const Operand& op(size_t k) {
    if (k >= P.ops.size()) bad("missing operand");
    return P.ops[k];
  }
  Ty regty(const Operand& o) const { return F.regs[o.reg].ty; }
  int regsize(const Operand& o) const { return ty_size(F.regs[o.reg].ty); }
  i32 dst(const Operand& o, int size);  // register offset, exact size (size 0: any)
  i32 src(const Operand& o, Ty t, int* rsize = nullptr,
          bool relaxed = false);  // register or constant
  i32 pred(const Operand& o, bool* neg);
  i32 konst(int size, u64 lo, u64 hi = 0, int sym = -1, i64 addend = 0);
  u64 immbits(const Operand& o, Ty t);
  i64 immval(const Operand& o);
  void addr(const Operand& o, i32& base, i64& off, u8& bsize,
            Space* sp = nullptr);  // memory operand -> base reg + offset
  int rounding();
};
enum { R_NONE, R_RN, R_RZ, R_RM, R_RP, R_RNA, R_RNI, R_RZI, R_RMI, R_RPI, R_RS };
bool decode_alu(Dec& d);
bool decode_cvt(Dec& d);
bool decode_mem(Dec& d);
bool decode_warp(Dec& d);
bool decode_tensor(Dec& d);
bool decode_async(Dec& d);
bool decode_wgmma(Dec& d);
u32 mma_stat(Module& M, const std::string& n, double fl);
void sm_read_proxy(Exec& E, Warp& w, u32 addr, u32 n,
                   int lane);  // read by the async proxy (wgmma, bulk stores)
void sm_visible(Exec& E, Warp& w, u32 addr, u32 n, int lane, const char* what);
i32 special_reg(const std::string& n, int* size);

// lane helpers
#define LANES(m) for (u32 _m = (m), lane = 0; _m && (lane = __builtin_ctz(_m), true); _m &= _m - 1)
template <class D, class A, class Fn>
static inline void lanes1(Warp& w, const Inst& I, u32 m, Fn f) {
  D* __restrict d = w.r<D>(I.d);
  const A* a = w.r<A>(I.a);
  D t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i]);
  if (m == FULL)
    memcpy(d, t, sizeof t);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
template <class D, class A, class B, class Fn>
static inline void lanes2(Warp& w, const Inst& I, u32 m, Fn f) {
  D* d = w.r<D>(I.d);
  const A* a = w.r<A>(I.a);
  const B* b = w.r<B>(I.b);
  D t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i]);
  if (m == FULL)
    memcpy(d, t, sizeof t);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
template <class D, class A, class B, class C, class Fn>
static inline void lanes3(Warp& w, const Inst& I, u32 m, Fn f) {
  D* d = w.r<D>(I.d);
  const A* a = w.r<A>(I.a);
  const B* b = w.r<B>(I.b);
  const C* c = w.r<C>(I.c);
  D t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i], c[i]);
  if (m == FULL)
    memcpy(d, t, sizeof t);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
}  // namespace vsim
