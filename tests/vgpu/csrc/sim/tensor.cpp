// mma.sync and wmma.* (fragment layouts of the PTX ISA).
#include "fp.h"
#include "gemm.h"
namespace vsim {
static u32 stat_id(Module& M, const std::string& n, double fl) {
  for (size_t k = 0; k < M.mmastats.size(); k++)
    if (M.mmastats[k].name == n) return k;
  M.mmastats.push_back({n, fl});
  return M.mmastats.size() - 1;
}
u32 mma_stat(Module& M, const std::string& n, double fl) { return stat_id(M, n, fl); }
static bool parse_shape(const std::string& s, int& m, int& n, int& k) {
  return sscanf(s.c_str(), "m%dn%dk%d", &m, &n, &k) == 3;
}
static inline int tbits(Ty t) {
  switch (t) {
    case F16:
    case BF16:
      return 16;
    case TF32:
    case F32:
    case S32:
      return 32;
    case F64:
      return 64;
    case S8:
    case U8:
    case E4M3:
    case E5M2:
      return 8;
    case S4:
    case U4:
      return 4;
    default:
      return 0;
  }
}
// element i of a packed register
static inline float elem_f(const u8* reg, int i, Ty t) {
  switch (t) {
    case F16: {
      u16 h;
      memcpy(&h, reg + 2 * i, 2);
      return h2f1(h);
    }
    case BF16: {
      u16 h;
      memcpy(&h, reg + 2 * i, 2);
      return bf2f1(h);
    }
    case TF32: {
      float f;
      memcpy(&f, reg, 4);
      return tf32_trunc(f);
    }
    case E4M3:
      return e4m3_to_f(reg[i]);
    case E5M2:
      return e5m2_to_f(reg[i]);
    default: {
      float f;
      memcpy(&f, reg, 4);
      return f;
    }
  }
}
static inline int elem_i(const u8* reg, int i, Ty t) {
  switch (t) {
    case S8:
      return (i8)reg[i];
    case U8:
      return reg[i];
    case S4: {
      int v = (reg[i / 2] >> (4 * (i & 1))) & 15;
      return v > 7 ? v - 16 : v;
    }
    default:
      return (reg[i / 2] >> (4 * (i & 1))) & 15;
  }
}

template <class T, class GA, class GB>
static void gather(Warp& w, const Inst& I, int M, int K, T (*A)[64], T (*B)[8], GA ga, GB gb) {
  int ba = tbits(I.t1), rs = ba == 64 ? 8 : 4, epr = ba >= 32 ? 1 : 32 / ba, na = I.ds, nb = I.as;
  int half = M == 16;
  for (int r = 0; r < na; r++) {
    const u8* R = w.R + I.x[r];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3, row = g + (half ? 8 * (r & 1) : 0),
          c0 = t * epr + (half ? r >> 1 : r) * 4 * epr;
      for (int i = 0; i < epr; i++) A[row][c0 + i] = ga(R + l * rs, i);
    }
  }
  for (int r = 0; r < nb; r++) {
    const u8* R = w.R + I.x[na + r];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3, k0 = t * epr + r * 4 * epr;
      for (int i = 0; i < epr; i++) B[k0 + i][g] = gb(R + l * rs, i);
    }
  }
  (void)K;
}
static void check_full(u32 m) {
  if (m != FULL)
    fail(Fault::Barrier, "mma executed with lanes 0x%08x active (all 32 are required)", m);
}
// float-type mma: I.x = A regs, B regs, C regs, D regs; ds,as,bs,cs = counts
static void h_mma_f(Exec&, Warp& w, const Inst& I, u32 m) {
  check_full(m);
  int M = I.imm & 0xff, K = I.imm2;
  alignas(32) float A[16][64], B[64][8], D[16][8];
  int na = I.ds, nb = I.as, nc = I.bs;
  Ty ta = I.t1, tb = (Ty)I.op;
  if ((ta == F16 && tb == F16) ||
      (ta == BF16 &&
       tb == BF16)) {  // each register holds an 8x8 block, row g / column 2t+i in order
    float f[64];
    for (int r = 0; r < na; r++) {
      if (ta == F16)
        h2f(w.r<u16>(I.x[r]), f, 64);
      else
        bf2f(w.r<u16>(I.x[r]), f, 64);
      for (int g = 0; g < 8; g++) memcpy(&A[g + 8 * (r & 1)][(r >> 1) * 8], f + 8 * g, 32);
    }
    for (int r = 0; r < nb; r++) {
      if (ta == F16)
        h2f(w.r<u16>(I.x[na + r]), f, 64);
      else
        bf2f(w.r<u16>(I.x[na + r]), f, 64);
      for (int k = 0; k < 8; k++)
        for (int g = 0; g < 8; g++) B[r * 8 + k][g] = f[8 * g + k];
    }
  } else
    gather(
        w, I, M, K, A, B, [&](const u8* p, int i) { return elem_f(p, i, ta); },
        [&](const u8* p, int i) { return elem_f(p, i, tb); });
  bool h16 = I.t2 == F16, d16 = I.t0 == F16;
  (void)nc;
  for (int i = 0; i < 4; i++) {
    float t[32];
    if (h16) {
      const u16* q = w.r<u16>(I.x[na + nb + (i >> 1)]);
      for (int l = 0; l < 32; l++) t[l] = h2f1(q[2 * l + (i & 1)]);
    } else
      memcpy(t, w.r<float>(I.x[na + nb + i]), 128);
    for (int g = 0; g < 8; g++)
      for (int q = 0; q < 4; q++) D[g + 8 * (i >> 1)][2 * q + (i & 1)] = t[4 * g + q];
  }
  gemm_rows(&A[0][0], 64, &B[0][0], 8, &D[0][0], 8, M, 8, K, 1.0f);
  int o = na + nb + nc;
  for (int i = 0; i < 4; i++) {
    float t[32];
    for (int g = 0; g < 8; g++)
      for (int q = 0; q < 4; q++) t[4 * g + q] = D[g + 8 * (i >> 1)][2 * q + (i & 1)];
    if (d16) {
      u16* q = w.r<u16>(I.x[o + (i >> 1)]);
      for (int l = 0; l < 32; l++) q[2 * l + (i & 1)] = f2h1(t[l]);
    } else
      memcpy(w.r<float>(I.x[o + i]), t, 128);
  }
}
static void h_mma_i(Exec&, Warp& w, const Inst& I, u32 m) {
  check_full(m);
  int M = I.imm & 0xff, K = I.imm2;
  static thread_local int A[16][64], B[64][8];
  i64 D[16][8];
  int na = I.ds, nb = I.as, nc = I.bs;
  Ty ta = I.t1, tb = (Ty)I.op;
  gather(
      w, I, M, K, A, B, [&](const u8* p, int i) { return elem_i(p, i, ta); },
      [&](const u8* p, int i) { return elem_i(p, i, tb); });
  int per = M == 16 ? 4 : 2;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < per; i++) {
      int row = (l >> 2) + 8 * (i >> 1), col = (l & 3) * 2 + (i & 1);
      D[row][col] = w.r<i32>(I.x[na + nb + i])[l];
    }
  for (int r = 0; r < M; r++)
    for (int n = 0; n < 8; n++) {
      i64 s = D[r][n];
      for (int k = 0; k < K; k++) s += (i64)A[r][k] * B[k][n];
      if (I.sat) s = std::max<i64>(INT32_MIN, std::min<i64>(INT32_MAX, s));
      D[r][n] = s;
    }
  int o = na + nb + nc;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < per; i++) {
      int row = (l >> 2) + 8 * (i >> 1), col = (l & 3) * 2 + (i & 1);
      w.r<i32>(I.x[o + i])[l] = (i32)D[row][col];
    }
}
static void h_mma_d(Exec&, Warp& w, const Inst& I, u32 m) {
  check_full(m);
  int M = I.imm & 0xff, K = I.imm2;
  static thread_local double A[16][64], B[64][8];
  double D[16][8];
  int na = I.ds, nb = I.as, nc = I.bs;
  auto get = [](const u8* p, int) {
    double d;
    memcpy(&d, p, 8);
    return d;
  };
  gather(w, I, M, K, A, B, get, get);
  int per = M == 16 ? 4 : 2;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < per; i++)
      D[(l >> 2) + 8 * (i >> 1)][(l & 3) * 2 + (i & 1)] = w.r<double>(I.x[na + nb + i])[l];
  for (int r = 0; r < M; r++)
    for (int n = 0; n < 8; n++)
      for (int k = 0; k < K; k++) D[r][n] = std::fma(A[r][k], B[k][n], D[r][n]);
  int o = na + nb + nc;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < per; i++)
      w.r<double>(I.x[o + i])[l] = D[(l >> 2) + 8 * (i >> 1)][(l & 3) * 2 + (i & 1)];
}
// wmma: the ISA leaves the fragment layout open; here lane l owns elements [l*p, (l+1)*p) of the
// tile
struct WShape {
  int m, n, k;
};
static void wmma_dims(const Inst& I, int frag, int& rows, int& cols) {
  int M = I.imm & 0xff, N = (I.imm >> 8) & 0xff, K = (I.imm >> 16) & 0xff;
  rows = frag == 1 ? K : M;
  cols = frag == 0 ? K : N;
}
static int esize(Ty t) { return tbits(t) / 8; }
static void h_wmma_ldst(Exec& E, Warp& w, const Inst& I, u32 m) {
  check_full(m);
  bool st = I.flag;
  int rows, cols;
  wmma_dims(I, I.op, rows, cols);
  int es = esize(I.t0), p = rows * cols / 32, rs = es == 8 ? 8 : 4, epr = rs / es,
      nreg = I.x.size();
  bool rowm = I.op2 == 0;
  u64 base = I.as == 8 ? w.r<u64>(I.a)[0] + I.imm2 : w.r<u32>(I.a)[0] + (u32)I.imm2;
  u64 ld = I.b == NOREG ? (rowm ? cols : rows) : w.r<u32>(I.b)[0];
  Space sp = I.sp;
  if (sp == SP_GENERIC) {
    if (base - SHARED_BASE < WINDOW) {
      sp = SP_SHARED;
      base -= SHARED_BASE;
    } else
      sp = SP_GLOBAL;
  }
  if (base % 16 && base % (es * 8))
    fail(Fault::Alignment, "wmma address 0x%llx is not aligned", (unsigned long long)base);
  u64 secs[32];
  u64 nsec = 0;
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < nreg * epr; j++) {
      if (st && j >= p) break;
      int idx = l * p + j % p, r = idx / cols, c = idx % cols;
      u64 a = base + (rowm ? r * ld + c : c * ld + r) * es;
      u8* reg = w.R + I.x[j / epr] + l * rs + (j % epr) * es;
      if (sp == SP_SHARED) {
        u8* q = smem_ptr(E, a, es, l, st ? "wmma store" : "wmma load");
        if (st) {
          sm_write(E, w, a, es, l, reg);
          memcpy(q, reg, es);
        } else {
          sm_read(E, w, a, es, l);
          memcpy(reg, q, es);
        }
      } else {
        u8* q = global_ptr(E, a, es, l, st ? "wmma store" : "wmma load", st);
        if (st)
          memcpy(q, reg, es);
        else
          memcpy(reg, q, es);
      }
    }
  (void)secs;
  (void)nsec;
  u64 bytes = (u64)rows * cols * es;
  if (sp == SP_SHARED) {
    E.st.s_req++;
    E.st.s_bytes += bytes;
    E.st.s_wavefronts += (bytes + 127) / 128;
    E.st.s_ideal += (bytes + 127) / 128;
  } else {
    int major = rowm ? rows : cols, run = (rowm ? cols : rows) * es;
    u64 sec = 0;
    for (int k = 0; k < major; k++) {
      u64 a = base + k * ld * es;
      sec += ((a + run - 1) >> 5) - (a >> 5) + 1;
    }
    if (st) {
      E.st.g_st_sectors += sec;
      E.st.g_st_bytes += bytes;
      E.st.g_st_req++;
    } else {
      E.st.g_ld_sectors += sec;
      E.st.g_ld_bytes += bytes;
      E.st.g_ld_req++;
    }
  }
}
static void h_wmma_mma(Exec&, Warp& w, const Inst& I, u32 m) {
  check_full(m);
  int M = I.imm & 0xff, N = (I.imm >> 8) & 0xff, K = (I.imm >> 16) & 0xff;
  int na = I.ds, nb = I.as, nc = I.bs;
  Ty ta = I.t1;
  static thread_local double A[1024], B[1024], C[1024];
  bool isint = ta == S8 || ta == U8;
  auto rd = [&](int x0, Ty t, int rows, int cols, double* o) {
    int es = esize(t), rs = es == 8 ? 8 : 4, epr = rs / es, p = rows * cols / 32;
    for (int l = 0; l < 32; l++)
      for (int j = 0; j < p; j++) {
        const u8* reg = w.R + I.x[x0 + j / epr] + l * rs;
        double v;
        if (t == F64)
          memcpy(&v, reg, 8);
        else if (t == S32) {
          i32 q;
          memcpy(&q, reg, 4);
          v = q;
        } else if (t == S8 || t == U8)
          v = elem_i(reg, j % epr, t);
        else
          v = elem_f(reg, j % epr, t);
        o[l * p + j] = v;
      }
  };
  rd(0, ta, M, K, A);
  rd(na, ta, K, N, B);
  rd(na + nb, I.t2, M, N, C);
  Ty td = I.t0;
  int es = esize(td), rs = es == 8 ? 8 : 4, epr = rs / es, p = M * N / 32;
  for (int idx = 0; idx < M * N; idx++) {
    int r = idx / N, c = idx % N;
    double s = 0;
    for (int k = 0; k < K; k++) s += A[r * K + k] * B[k * N + c];
    s += C[idx];
    int l = idx / p, j = idx % p;
    u8* reg = w.R + I.x[na + nb + nc + j / epr] + l * rs + (j % epr) * es;
    if (isint) {
      if (I.sat) s = std::max(-2147483648.0, std::min(2147483647.0, s));
      i32 v = (i32)(i64)s;
      memcpy(reg, &v, 4);
    } else if (td == F64)
      memcpy(reg, &s, 8);
    else if (td == F16) {
      u16 h = d2h(s);
      memcpy(reg, &h, 2);
    } else {
      float f = (float)s;
      memcpy(reg, &f, 4);
    }
  }
}
bool decode_tensor(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  auto shape = [&](int& m, int& n, int& k, std::string& s) {
    for (size_t q = 1; q < d.P.mods.size(); q++)
      if (parse_shape(d.P.mods[q], m, n, k)) {
        s = d.P.mods[q];
        d.used[q] = 1;
        return;
      }
    d.bad("mma shape");
  };
  auto regs = [&](const Operand& o, int size, bool dst) {
    std::vector<i32> r;
    Ty t = size == 8 ? B64 : B32;
    if (o.kind == Operand::Vec)
      for (auto& e : o.el) r.push_back(dst ? d.dst(e, size) : d.src(e, t));
    else
      r.push_back(dst ? d.dst(o, size) : d.src(o, t));
    return r;
  };
  if (op == "mma") {
    if (!d.take("sync") || !d.take("aligned")) d.bad("mma form");
    int M, N, K;
    std::string s;
    shape(M, N, K, s);
    if (!d.take("row") || !d.take("col")) d.bad("mma layout (only row.col)");
    I.sat = d.take("satfinite");
    std::vector<Ty> t;
    for (;;) {
      Ty x = d.take_type();
      if (x == T_NONE) break;
      t.push_back(x);
    }
    d.done();
    if (t.size() != 4) d.bad("mma types");
    I.t0 = t[0];
    I.t1 = t[1];
    I.op = t[2];
    I.t2 = t[3];
    int ba = tbits(t[1]);
    if (!ba || tbits(t[2]) != ba) d.bad("mma input type");
    bool f64 = t[1] == F64, in = t[1] == S8 || t[1] == U8 || t[1] == S4 || t[1] == U4;
    if (N != 8 || (M != 16 && !(M == 8 && (in || f64))) || K > 64) d.bad("mma shape");
    int rs = f64 ? 8 : 4, na = M * K * ba / (32 * 8 * rs), nb = N * K * ba / (32 * 8 * rs);
    auto A = regs(d.op(1), rs, false), B = regs(d.op(2), rs, false), C = regs(d.op(3), rs, false),
         D = regs(d.op(0), rs, true);
    int nc = t[3] == F16 ? 2 : M == 16 ? 4 : 2, ndst = t[0] == F16 ? 2 : M == 16 ? 4 : 2;
    if ((int)A.size() != na || (int)B.size() != nb || (int)C.size() != nc || (int)D.size() != ndst)
      d.bad("mma register counts");
    if (f64) {
      if (t[0] != F64 || t[3] != F64) d.bad("types");
    } else if (in) {
      if (t[0] != S32 || t[3] != S32) d.bad("types");
    } else if ((t[0] != F32 && t[0] != F16) || (t[3] != F32 && t[3] != F16))
      d.bad("types");
    I.ds = na;
    I.as = nb;
    I.bs = nc;
    I.cs = ndst;
    I.x = A;
    I.x.insert(I.x.end(), B.begin(), B.end());
    I.x.insert(I.x.end(), C.begin(), C.end());
    I.x.insert(I.x.end(), D.begin(), D.end());
    I.imm = M;
    I.imm2 = K;
    I.fn = f64 ? h_mma_d : in ? h_mma_i : h_mma_f;
    I.cls = C_MMA;
    I.kind = K_ALU;
    I.sync = 1;
    I.stat = stat_id(d.M,
                     s + "." + type_name(t[0]) + "." + type_name(t[1]) + "." + type_name(t[2]) +
                         "." + type_name(t[3]),
                     2.0 * M * N * K);
    return true;
  }
  if (op == "wmma") {
    d.take("sync");
    d.take("aligned");
    int M, N, K;
    std::string s;
    bool ld = d.take("load"), st = d.take("store"), mm = d.take("mma");
    shape(M, N, K, s);
    I.imm = M | N << 8 | K << 16;
    I.sync = 1;
    I.kind = K_ALU;
    if (ld || st) {
      I.flag = st;
      I.op = d.take("a") ? 0 : d.take("b") ? 1 : (d.take("c") || d.take("d")) ? 2 : 9;
      if (I.op == 9) d.bad("wmma matrix");
      I.op2 = d.take("row") ? 0 : d.take("col") ? 1 : 9;
      if (I.op2 == 9) d.bad("wmma layout");
      if (d.take("global"))
        I.sp = SP_GLOBAL;
      else if (d.take("shared") || d.take("shared::cta"))
        I.sp = SP_SHARED;
      else
        I.sp = SP_GENERIC;
      Ty t = d.need_type();
      I.t0 = t;
      d.done();
      if (!tbits(t) || tbits(t) < 8) d.bad("wmma type");
      I.x = regs(d.op(st ? 1 : 0), t == F64 ? 8 : 4, !st);
      d.addr(d.op(st ? 0 : 1), I.a, I.imm2, I.as);
      if (d.n() > 2) I.b = d.src(d.op(2), U32);
      I.cls = st ? (I.sp == SP_SHARED ? C_STS : C_STG) : (I.sp == SP_SHARED ? C_LDS : C_LDG);
      I.fn = h_wmma_ldst;
      return true;
    }
    if (!mm) d.bad("wmma form");
    bool ar = d.take("row");
    bool second = false;
    (void)ar;
    for (size_t q = 1; q < d.P.mods.size(); q++)
      if (!d.used[q] && (d.P.mods[q] == "row" || d.P.mods[q] == "col")) {
        d.used[q] = 1;
        second = true;
      }
    (void)second;
    I.sat = d.take("satfinite");
    d.take("rn");
    std::vector<Ty> t;
    for (;;) {
      Ty x = d.take_type();
      if (x == T_NONE) break;
      t.push_back(x);
    }
    d.done();
    if (t.size() == 2) {
      I.t0 = t[0];
      I.t1 = F16;
      I.t2 = t[1];
    } else if (t.size() == 4) {
      I.t0 = t[0];
      I.t1 = t[1];
      I.t2 = t[3];
      if (t[1] != t[2]) d.bad("mixed wmma");
    } else
      d.bad("wmma types");
    if (tbits(I.t1) < 8) d.bad("sub-byte wmma");
    int rs = I.t1 == F64 ? 8 : 4;
    auto A = regs(d.op(1), rs, false), B = regs(d.op(2), rs, false), C = regs(d.op(3), rs, false),
         D = regs(d.op(0), rs, true);
    I.ds = A.size();
    I.as = B.size();
    I.bs = C.size();
    I.x = A;
    I.x.insert(I.x.end(), B.begin(), B.end());
    I.x.insert(I.x.end(), C.begin(), C.end());
    I.x.insert(I.x.end(), D.begin(), D.end());
    I.fn = h_wmma_mma;
    I.cls = C_MMA;
    I.stat = stat_id(
        d.M, "wmma." + s + "." + type_name(I.t0) + "." + type_name(I.t1) + "." + type_name(I.t2),
        2.0 * M * N * K);
    return true;
  }
  return false;
}
}  // namespace vsim
