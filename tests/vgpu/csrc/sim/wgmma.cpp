// Hopper wgmma: deferred until the matching wait; accumulator (and A) registers of outstanding
// operations must not be touched.  Each warp computes its own 16 rows of the 64-row tile.
#include "fp.h"
#include "gemm.h"
namespace vsim {
static inline int bits_of(Ty t) {
  switch (t) {
    case F16:
    case BF16:
      return 16;
    case TF32:
      return 32;
    default:
      return 8;
  }
}
// shared address of element (mn, k) of an operand tile
struct DescAddr {
  u32 start, lbo, sbo;
  int sw;
  bool mnmajor;
  int es;
  DescAddr(u64 d, bool mn, int es_) : mnmajor(mn), es(es_) {
    start = (u32)(d & 0x3fff) << 4;
    lbo = (u32)((d >> 16) & 0x3fff) << 4;
    sbo = (u32)((d >> 32) & 0x3fff) << 4;
    sw = (int)(d >> 62);
    if ((d >> 49) & 7)
      fail(Fault::Unsupported, "wgmma matrix descriptor with a base offset is not supported");
    if (mn && es != 2) fail(Fault::Invalid, "wgmma: transposed operands need a 16-bit type");
  }
  u32 at(int mn, int k) const {
    u32 off;
    int T = 16 / es;
    if (!mnmajor) {
      if (sw == 0)
        off = (mn & 7) * 16 + (mn >> 3) * sbo + (k % T) * es + (k / T) * lbo;
      else {
        int width = sw == 1 ? 128 : sw == 2 ? 64 : 32;
        off = (mn & 7) * width + (mn >> 3) * sbo + k * es;
      }
    } else {
      if (sw == 0)
        off = (mn & 7) * 2 + (mn >> 3) * sbo + (k & 7) * 16 + (k >> 3) * lbo;
      else {
        int width = sw == 1 ? 128 : sw == 2 ? 64 : 32, per = width / 2;
        off = (mn % per) * 2 + (mn / per) * lbo + (k & 7) * width + (k >> 3) * sbo;
      }
    }
    u32 a = start + off;
    if (sw == 1)
      a ^= ((a >> 7) & 7) << 4;
    else if (sw == 2)
      a ^= ((a >> 7) & 3) << 4;
    else if (sw == 3)
      a ^= ((a >> 7) & 1) << 4;
    return a;
  }
};
static inline void conv16(const u8* p, Ty t, float* o, int n) {  // n elements of a 16-byte run
  if (t == F16) {
    u16 h[8];
    memcpy(h, p, 16);
    h2f(h, o, 8);
  } else if (t == BF16) {
    u16 h[8];
    memcpy(h, p, 16);
    bf2f(h, o, 8);
  } else
    for (int i = 0; i < n; i++) switch (t) {
        case TF32: {
          float f;
          memcpy(&f, p + 4 * i, 4);
          o[i] = tf32_trunc(f);
          break;
        }
        case E4M3:
          o[i] = e4m3_to_f(p[i]);
          break;
        case E5M2:
          o[i] = e5m2_to_f(p[i]);
          break;
        case S8:
          o[i] = (i8)p[i];
          break;
        default:
          o[i] = p[i];
      }
}
static inline float conv(const u8* p, Ty t) {
  switch (t) {
    case F16: {
      u16 h;
      memcpy(&h, p, 2);
      return h2f1(h);
    }
    case BF16: {
      u16 h;
      memcpy(&h, p, 2);
      return bf2f1(h);
    }
    case TF32: {
      float f;
      memcpy(&f, p, 4);
      return tf32_trunc(f);
    }
    case E4M3:
      return e4m3_to_f(*p);
    case E5M2:
      return e5m2_to_f(*p);
    case S8:
      return (i8)*p;
    default:
      return *p;
  }
}
// visit a tile in 16-byte runs: checks and conversion into out[mn][k] or [k][mn]
template <class F>
static void tile(Exec& E, Warp& w, const DescAddr& D, int mn0, int mns, int K, F f) {
  int T = 16 / D.es;
  if (!D.mnmajor) {
    for (int m = 0; m < mns; m++)
      for (int k = 0; k < K; k += T) {
        u32 a = D.at(mn0 + m, k);
        const u8* p = smem_ptr(E, a, 16, -1, "wgmma read");
        sm_read_proxy(E, w, a, 16, -1);
        f(p, m, k, T, true);
      }
  } else {
    for (int k = 0; k < K; k++)
      for (int m = 0; m < mns; m += T) {
        u32 a = D.at(mn0 + m, k);
        const u8* p = smem_ptr(E, a, 16, -1, "wgmma read");
        sm_read_proxy(E, w, a, 16, -1);
        f(p, m, k, T, false);
      }
  }
}
static std::vector<i32> written(const Inst& I, bool move) {
  if (!move) return std::vector<i32>(I.x.begin(), I.x.begin() + I.imm2);
  if (I.d != (i32)NOREG) return {I.d};
  return I.x;
}
static void rebuild(Exec& E, Warp& w) {
  w.wg_any = !w.wg.empty();
  std::fill(w.wgmap.begin(), w.wgmap.end(), 0);
  for (auto& o : w.wg) {
    const Inst& I = E.code[o.pc];
    if (o.move) {
      for (i32 r : written(I, true))
        if (r >= 0 && r != (i32)NOREG) w.wgmap[r >> 6] = 1;
    } else
      for (int k = 0; k < (int)I.imm2; k++) w.wgmap[I.x[k] >> 6] = 1;
  }
  for (auto& o : w.wg)
    if (!o.move) {
      const Inst& I = E.code[o.pc];
      for (size_t k = I.imm2; k < I.x.size(); k++)
        if (I.x[k] >= 0 && !w.wgmap[I.x[k] >> 6]) w.wgmap[I.x[k] >> 6] = 2;
    }
}
static void execute(Exec& E, Warp& w, const WgmmaOp& o) {
  const Inst& I = E.code[o.pc];
  int N = I.imm & 0xffff, K = (int)(I.imm >> 16), nd = (int)I.imm2, es = bits_of(I.t1) / 8;
  bool areg = I.flag;
  bool isint = I.t0 == S32;
  static thread_local float A[16][32];
  static thread_local float B[32][256];
  static thread_local float D[16][256];
  static thread_local i32 DI[16][256];
  Ty ta = I.t1, tb = I.t2;
  u32 save = w.pc;
  w.pc = o.pc;
  if (areg) {
    int epr = 4 / es;
    for (int r = 0; r < 4; r++) {
      const u8* R = w.R + I.x[nd + r];
      for (int l = 0; l < 32; l++)
        for (int i = 0; i < epr; i++)
          A[(l >> 2) + 8 * (r & 1)][(l & 3) * epr + i + (r >> 1) * 4 * epr] =
              conv(R + l * 4 + i * es, ta);
    }
  } else {
    DescAddr da(o.da, I.rnd & 1, es);
    tile(E, w, da, (w.id & 3) * 16, 16, K, [&](const u8* p, int m, int k, int T, bool kd) {
      float t[16];
      conv16(p, ta, t, T);
      for (int i = 0; i < T; i++) {
        if (kd)
          A[m][k + i] = t[i];
        else
          A[m + i][k] = t[i];
      }
    });
  }
  DescAddr db(o.db, I.rnd & 2, es);
  tile(E, w, db, 0, N, K, [&](const u8* p, int n, int k, int T, bool kd) {
    if (!kd) {
      conv16(p, tb, &B[k][n], T);
      return;
    }
    float t[16];
    conv16(p, tb, t, T);
    for (int i = 0; i < T; i++) B[k + i][n] = t[i];
  });
  float sa = I.op == 1 ? -1.f : 1.f, sb = I.op2 == 1 ? -1.f : 1.f, sc = sa * sb;
  bool d16 = I.t0 == F16;
  if (isint) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < N / 2; i++)
        DI[(l >> 2) + 8 * ((i >> 1) & 1)][(i >> 2) * 8 + (l & 3) * 2 + (i & 1)] =
            o.scale_d ? w.r<i32>(I.x[i])[l] : 0;
    for (int r = 0; r < 16; r++)
      for (int n = 0; n < N; n++) {
        i64 s = DI[r][n];
        for (int k = 0; k < K; k++) s += (i64)(int)A[r][k] * (int)B[k][n];
        if (I.sat) s = std::max<i64>(INT32_MIN, std::min<i64>(INT32_MAX, s));
        DI[r][n] = (i32)s;
      }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < N / 2; i++)
        w.r<i32>(I.x[i])[l] =
            DI[(l >> 2) + 8 * ((i >> 1) & 1)][(i >> 2) * 8 + (l & 3) * 2 + (i & 1)];
  } else {
    for (int i = 0; i < N / 2; i++) {
      float t[32];
      if (!o.scale_d)
        memset(t, 0, 128);
      else if (d16) {
        const u16* q = w.r<u16>(I.x[i >> 1]);
        for (int l = 0; l < 32; l++) t[l] = h2f1(q[2 * l + (i & 1)]);
      } else
        memcpy(t, w.r<float>(I.x[i]), 128);
      int c0 = (i >> 2) * 8 + (i & 1), r0 = 8 * ((i >> 1) & 1);
      for (int g = 0; g < 8; g++)
        for (int q = 0; q < 4; q++) D[g + r0][c0 + 2 * q] = t[4 * g + q];
    }
    gemm_rows(&A[0][0], 32, &B[0][0], 256, &D[0][0], 256, 16, N, K, sc);
    for (int i = 0; i < N / 2; i++) {
      float t[32];
      int c0 = (i >> 2) * 8 + (i & 1), r0 = 8 * ((i >> 1) & 1);
      for (int g = 0; g < 8; g++)
        for (int q = 0; q < 4; q++) t[4 * g + q] = D[g + r0][c0 + 2 * q];
      if (d16) {
        u16* q = w.r<u16>(I.x[i >> 1]);
        for (int l = 0; l < 32; l++) q[2 * l + (i & 1)] = f2h1(t[l]);
      } else
        memcpy(w.r<float>(I.x[i]), t, 128);
    }
  }
  w.pc = save;
}
void wgmma_retire(Exec& E, Warp& w, u32 allow, bool all) {
  std::vector<WgmmaOp> keep;
  bool any = false;
  for (auto& o : w.wg) {
    if (!all && o.grp + allow >= w.wg_commit) {
      keep.push_back(o);
      continue;
    }
    any = true;
    if (o.move)
      E.code[o.pc].fn(E, w, E.code[o.pc], o.mask);
    else
      execute(E, w, o);
  }
  if (any) {
    w.wg.swap(keep);
    rebuild(E, w);
  }
}
static void h_wgmma(Exec& E, Warp& w, const Inst& I, u32 m) {
  if (m != FULL)
    fail(Fault::Barrier, "wgmma executed with lanes 0x%08x active (all 32 are required)", m);
  if ((E.cta->warps.size() & 3) && (w.id | 3) >= E.cta->warps.size())
    fail(Fault::Invalid, "wgmma needs complete warpgroups of 4 warps");
  WgmmaOp o;
  o.move = false;
  o.mask = m;
  o.pc = w.pc;
  o.grp = w.wg_commit;
  o.da = I.flag ? 0 : w.r<u64>(I.a)[0];
  o.db = w.r<u64>(I.b)[0];
  u32 p = w.pr(I.c);
  if (I.neg) p = ~p;
  if (p != 0 && p != FULL) fail(Fault::Invalid, "wgmma scale-d differs between lanes");
  o.scale_d = p != 0;
  int N = I.imm & 0xffff, K = (int)(I.imm >> 16), es = bits_of(I.t1) / 8;
  if (!I.flag) {
    DescAddr da(o.da, I.rnd & 1, es);
    if (E.chk_init || E.chk_race)
      tile(E, w, da, (w.id & 3) * 16, 16, K, [](const u8*, int, int, int, bool) {});
  }
  DescAddr db(o.db, I.rnd & 2, es);
  if (E.chk_init || E.chk_race) tile(E, w, db, 0, N, K, [](const u8*, int, int, int, bool) {});
  E.st.wg_modes[db.sw * 2 + db.mnmajor]++;
  if (!I.flag) {
    DescAddr da(o.da, I.rnd & 1, es);
    E.st.wg_modes[da.sw * 2 + da.mnmajor]++;
  }
  if (w.wgmap.empty()) w.wgmap.assign((E.F->base + E.F->frame) / 64 + 16, 0);
  for (int k = 0; k < (int)I.imm2; k++) w.wgmap[I.x[k] >> 6] = 1;
  for (size_t k = I.imm2; k < I.x.size(); k++)
    if (I.x[k] >= 0 && !w.wgmap[I.x[k] >> 6]) w.wgmap[I.x[k] >> 6] = 2;
  w.wg.push_back(o);
  w.wg_any = true;
}
// an instruction executed while wgmma operations are outstanding
bool wgmma_check(Exec& E, Warp& w, const Inst& I, u32 m) {
  if (!m || I.fn == nullptr) return false;
  auto st = [&](i32 r) -> u8 {
    return r == (i32)NOREG || r < 0 || (size_t)(r >> 6) >= w.wgmap.size() ? 0 : w.wgmap[r >> 6];
  };
  auto where = [&]() {
    u32 jp = w.pc;
    for (auto& o : w.wg)
      if (!o.move) jp = o.pc;
    const Inst& J = E.code[jp];
    return strf("line %u", J.line);
  };
  if (I.fn == h_wgmma) {
    for (size_t k = I.imm2; k < I.x.size(); k++)
      if (st(I.x[k]) == 1)
        fail(Fault::Async,
             "wgmma reads as A a register that an outstanding wgmma (%s) still writes",
             where().c_str());
    for (int k = 0; k < (int)I.imm2; k++)
      if (st(I.x[k]) == 2)
        fail(Fault::Async, "wgmma accumulates into an A register of an outstanding wgmma (%s)",
             where().c_str());
    bool any = false, same = true;
    for (int k = 0; k < (int)I.imm2; k++)
      if (st(I.x[k])) any = true;
    if (any)
      for (auto& o : w.wg) {
        const Inst& J = E.code[o.pc];
        bool touch = false;
        if (!o.move && J.imm == I.imm && J.imm2 == I.imm2 &&
            std::equal(I.x.begin(), I.x.begin() + I.imm2, J.x.begin()))
          continue;
        for (i32 r : written(J, o.move))
          for (int q = 0; q < (int)I.imm2; q++)
            if (r == I.x[q]) touch = true;
        if (touch) {
          if (o.move || J.imm != I.imm || J.imm2 != I.imm2)
            same = false;
          else
            for (int k = 0; k < (int)J.imm2; k++)
              if (J.x[k] != I.x[k]) same = false;
        }
      }
    if (!same)
      fail(Fault::Async,
           "wgmma reuses accumulator registers of an outstanding wgmma with a different shape or "
           "order");
    return false;
  }
  if (I.cls == C_WGMMA || I.kind == K_BRA) return false;
  if (I.cls == C_MOV && I.kind == K_ALU) {
    // Plain register copies of pending accumulators appear in compiler output (ptxas coalesces
    // them); they are carried out when the wgmma retires, and their destinations are pending until
    // then.
    i32 src = NOREG;
    if (st(I.a) == 1) src = I.a;
    if (I.d != (i32)NOREG)
      for (i32 q : I.x)
        if (st(q) == 1) src = q;
    if (src != (i32)NOREG) {
      WgmmaOp o;
      o.pc = w.pc;
      o.move = true;
      o.mask = m;
      o.grp = 0;
      o.scale_d = false;
      o.da = o.db = 0;
      auto dep = [&](i32 r) {
        for (auto& q : w.wg)
          for (i32 x : written(E.code[q.pc], q.move))
            if (x == r) o.grp = std::max(o.grp, q.grp);
      };
      if (I.a != (i32)NOREG) dep(I.a);
      if (I.d != (i32)NOREG)
        for (i32 q : I.x) dep(q);
      for (i32 r : written(I, true))
        if (r >= 0 && r != (i32)NOREG) {
          if (st(r) == 2)
            fail(Fault::Async, "overwrites an A register of an outstanding wgmma (%s)",
                 where().c_str());
          w.wgmap[r >> 6] = 1;
        }
      w.wg.push_back(o);
      E.st.wgmma_early_moves++;
      return true;
    }
  }
  bool r = false;
  for (i32 q : {I.d, I.a, I.b, I.c, I.e, I.f})
    if (st(q) == 1) r = true;
  if (I.kind != K_CALL && I.kind != K_BRX && I.op != 99)
    for (i32 q : I.x)
      if (st(q) == 1 && I.cls != C_CALL && I.cls != C_LDC) r = true;
  if (r)
    fail(Fault::Async,
         "access to an accumulator register of an outstanding wgmma (%s) before wgmma.wait_group",
         where().c_str());
  if (st(I.d) == 2 && I.cls != C_STG && I.cls != C_STS)
    fail(Fault::Async,
         "overwrites an A register of an outstanding wgmma (%s) before wgmma.wait_group",
         where().c_str());
  if (I.cls == C_LDS || I.cls == C_LDG || I.cls == C_LDSM || (I.cls == C_MOV && I.d == (i32)NOREG))
    for (i32 q : I.x)
      if (st(q) == 2)
        fail(Fault::Async,
             "overwrites an A register of an outstanding wgmma (%s) before wgmma.wait_group",
             where().c_str());
  return false;
}
bool decode_wgmma(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.kind = K_ALU;
  if (op == "setmaxnreg") {
    d.take("inc");
    d.take("dec");
    d.take("sync");
    d.take("aligned");
    d.need_type();
    d.done();
    I.kind = K_NOP;
    I.sync = 1;
    return true;
  }
  if (op != "wgmma") return false;
  I.cls = C_WGMMA;
  I.sync = 1;
  bool mma = d.take("mma_async"), fence = d.take("fence"), commit = d.take("commit_group"),
       wait = d.take("wait_group");
  d.take("sync");
  d.take("aligned");
  if (fence) {
    d.done();
    I.fn = [](Exec&, Warp&, const Inst&, u32) {};
    return true;
  }
  if (commit) {
    d.done();
    I.fn = [](Exec&, Warp& w, const Inst&, u32) { w.wg_commit++; };
    return true;
  }
  if (wait) {
    d.done();
    I.imm = d.immval(d.op(0));
    I.fn = [](Exec& E, Warp& w, const Inst& I, u32) { wgmma_retire(E, w, I.imm, false); };
    return true;
  }
  if (!mma) d.bad("wgmma form");
  int M = 0, N = 0, K = 0;
  std::string sh;
  for (size_t q = 1; q < d.P.mods.size(); q++)
    if (sscanf(d.P.mods[q].c_str(), "m%dn%dk%d", &M, &N, &K) == 3) {
      sh = d.P.mods[q];
      d.used[q] = 1;
    }
  if (M != 64 || N % 8 || N > 256 || N < 8) d.bad("wgmma shape");
  I.sat = d.take("satfinite");
  I.t0 = d.need_type();
  I.t1 = d.need_type();
  I.t2 = d.need_type();
  d.done();
  int b = bits_of(I.t1);
  if (K * b != 256 || bits_of(I.t2) != b) d.bad("wgmma types");
  if (I.t0 != F32 && I.t0 != F16 && I.t0 != S32) d.bad("wgmma accumulator");
  int nd = I.t0 == F16 ? N / 4 : N / 2;
  const Operand& D = d.op(0);
  if (D.kind != Operand::Vec || (int)D.el.size() != nd) d.bad("wgmma accumulator registers");
  for (auto& e : D.el) I.x.push_back(d.dst(e, 4));
  const Operand& A = d.op(1);
  if (A.kind == Operand::Vec) {
    I.flag = true;
    if (A.el.size() != 4) d.bad("wgmma A registers");
    for (auto& e : A.el) I.x.push_back(d.src(e, B32));
  } else
    I.a = d.src(A, B64);
  I.b = d.src(d.op(2), B64);
  size_t k = 3;
  I.c = d.pred(d.op(k++), &I.neg);
  I.op = I.op2 = 0;
  I.rnd = 0;
  if (I.t0 != S32) {
    i64 s1 = d.immval(d.op(k++)), s2 = d.immval(d.op(k++));
    if ((s1 != 1 && s1 != -1) || (s2 != 1 && s2 != -1)) d.bad("wgmma scale");
    I.op = s1 == -1;
    I.op2 = s2 == -1;
    if (b == 16) {
      if (!I.flag) I.rnd |= d.immval(d.op(k++)) ? 1 : 0;
      I.rnd |= d.immval(d.op(k++)) ? 2 : 0;
    }
  }
  if (k != d.n()) d.bad("wgmma operands");
  I.imm = N | (i64)K << 16;
  I.imm2 = nd;
  I.fn = h_wgmma;
  I.stat = mma_stat(
      d.M, "wgmma." + sh + "." + type_name(I.t0) + "." + type_name(I.t1) + "." + type_name(I.t2),
      2.0 * 16 * N * K);
  return true;
}
}  // namespace vsim
