// Loads, stores, atomics, ldmatrix/stmatrix, cp.async, prefetch, fences.
#include "fp.h"
namespace vsim {
Alloc* Device::nearest(u64 addr) {
  Alloc* best = nullptr;
  u64 bd = ~0ull;
  for (auto& a : allocs) {
    u64 d = addr < a.base ? a.base - addr : addr >= a.base + a.size ? addr - (a.base + a.size) : 0;
    if (d < bd) {
      bd = d;
      best = &a;
    }
  }
  return best;
}

static Alloc* find_global(Exec& E, u64 addr, u32 size, int lane, const char* what) {
  Alloc* a = E.last;
  if (a && addr - a->base < a->size && addr + size - a->base <= a->size) return a;
  a = E.D->find(addr);
  if (!a && E.param_alloc && addr - E.param_alloc->base < E.param_alloc->size) a = E.param_alloc;
  if (!a || addr + size - a->base > a->size) {
    Alloc* n = E.D->nearest(addr);
    std::string s = "no allocation is near";
    if (addr - SHARED_BASE < WINDOW || addr - LOCAL_BASE < WINDOW)
      s = "the address lies in a shared/local window";
    else if (n) {
      u64 end = n->base + n->size;
      i64 d = (i64)(addr - n->base);
      if (llabs(d) < (1ll << 40))
        s = strf(
            "nearest allocation is '%s' [0x%llx, 0x%llx) of %llu bytes; the access is at byte "
            "offset %lld, %s",
            n->name, (unsigned long long)n->base, (unsigned long long)end,
            (unsigned long long)n->size, (long long)d,
            d < 0 ? "before its start"
            : addr + size > end
                ? strf("%llu bytes past its end", (unsigned long long)(addr + size - end)).c_str()
                : "inside");
    }
    fail_at(Fault::Address, lane, addr, "out-of-bounds global %s of %u bytes at 0x%llx: %s", what,
            size, (unsigned long long)addr, s.c_str());
  }
  E.last = a;
  return a;
}
static inline void mark(u8* s, u32 n, u8 f) {
  u32 k = 0;
  u64 ff = 0x0101010101010101ull * f;
  for (; k + 8 <= n; k += 8) {
    u64 v;
    memcpy(&v, s + k, 8);
    v |= ff;
    memcpy(s + k, &v, 8);
  }
  for (; k < n; k++) s[k] |= f;
}
u8* global_ptr(Exec& E, u64 addr, u32 size, int lane, const char* what, bool write) {
  Alloc* a = find_global(E, addr, size, lane, what);
  u64 o = addr - a->base;
  if (write) {
    if (a->readonly)
      fail_at(Fault::Address, lane, addr, "write to read-only memory '%s' at 0x%llx", a->name,
              (unsigned long long)addr);
    E.gwrites++;
  }
  if (a->shadow) mark(a->shadow + o, size, write ? 2 : 1);
  return a->host + o;
}
u8* smem_ptr(Exec& E, u64 addr, u32 size, int lane, const char* what) {
  Cta& C = *E.cta;
  if (addr < SMEM_START || addr + size > C.smem_size)
    fail_lane(Fault::Address, lane,
              "out-of-bounds shared %s of %u bytes at address 0x%llx: the CTA's shared memory is "
              "[0x%x, 0x%x) (%u static + %u dynamic bytes)",
              what, size, (unsigned long long)addr, SMEM_START, C.smem_size, E.st.smem_static,
              E.st.smem_dynamic);
  if (addr + size - SMEM_START > E.st.smem_max_touched)
    E.st.smem_max_touched = addr + size - SMEM_START;
  return &C.smem[addr];
}
u32 count_sectors(const u64* addr, u32 mask, u32 size) {
  u64 seen[128];
  u32 n = 0;
  LANES(mask) {
    u64 s0 = addr[lane] >> 5, s1 = (addr[lane] + size - 1) >> 5;
    for (u64 s = s0; s <= s1; s++) {
      if (n && seen[n - 1] == s) continue;
      bool f = false;
      for (u32 k = n; k-- > 0;)
        if (seen[k] == s) {
          f = true;
          break;
        }
      if (!f && n < 128) seen[n++] = s;
    }
  }
  return n;
}
u32 count_wavefronts(const u32* addr, u32 mask, u32 size) {
  int per = size <= 4 ? 32 : size <= 8 ? 16 : 8;
  u32 total = 0;
  for (int g = 0; g < 32; g += per) {
    u32 gm = per == 32 ? mask : mask & (((1u << per) - 1) << g);
    if (!gm) continue;
    u32 cnt[32] = {0};
    u32 words[32][32];
    u32 mx = 1;
    LANES(gm) {
      u32 w0 = addr[lane] >> 2, nw = (size + 3) / 4;
      for (u32 k = 0; k < nw; k++) {
        u32 wd = w0 + k, b = wd & 31;
        bool f = false;
        for (u32 q = 0; q < cnt[b]; q++)
          if (words[b][q] == wd) {
            f = true;
            break;
          }
        if (!f) {
          words[b][cnt[b]++] = wd;
          mx = std::max(mx, cnt[b]);
        }
      }
    }
    total += mx;
  }
  return total;
}
static u32 ideal_wavefronts(u32 mask, u32 size) {
  int per = size <= 4 ? 32 : size <= 8 ? 16 : 8;
  u32 t = 0;
  for (int g = 0; g < 32; g += per) {
    u32 gm = per == 32 ? mask : mask & (((1u << per) - 1) << g);
    t += gm != 0;
  }
  return t;
}
static void smem_stats(Exec& E, const u32* addr, u32 mask, u32 size, bool st) {
  u32 wv = count_wavefronts(addr, mask, size), id = ideal_wavefronts(mask, size);
  E.st.s_wavefronts += wv;
  E.st.s_ideal += id;
  E.st.s_conflicts += wv - id;
  E.st.s_bytes += (u64)__builtin_popcount(mask) * size;
  E.st.s_req++;
  (st ? E.st.s_st_wave : E.st.s_ld_wave) += wv;
}
static inline void lane_addr(Warp& w, const Inst& I, u64* A) {
  if (I.as == 8) {
    const u64* a = w.r<u64>(I.a);
    for (int i = 0; i < 32; i++) A[i] = a[i] + I.imm;
  } else {
    const u32* a = w.r<u32>(I.a);
    for (int i = 0; i < 32; i++) A[i] = (u32)(a[i] + (u32)I.imm);
  }
}
static void misaligned(int lane, const char* sp, u64 a, u32 n) {
  fail_at(Fault::Alignment, lane, a, "misaligned %s access: address 0x%llx is not a multiple of %u",
          sp, (unsigned long long)a, n);
}
static inline u8* local_ptr(Exec& E, Warp& w, u64 off, u32 n, int lane, const char* what) {
  if (off + n > E.local_bytes || off > E.local_bytes)
    fail_lane(Fault::Address, lane,
              "out-of-bounds local %s of %u bytes at offset %llu (thread has %u bytes)", what, n,
              (unsigned long long)off, E.local_bytes);
  return w.local + (size_t)lane * E.local_bytes + off;
}
// Which space does a lane address belong to (generic accesses)
static inline Space resolve(Space sp, u64& a) {
  if (sp != SP_GENERIC) return sp;
  if (a - SHARED_BASE < WINDOW) {
    a -= SHARED_BASE;
    return SP_SHARED;
  }
  if (a - LOCAL_BASE < WINDOW) {
    a -= LOCAL_BASE;
    return SP_LOCAL;
  }
  return SP_GLOBAL;
}
static void h_ld(Exec& E, Warp& w, const Inst& I, u32 m) {
  u64 A[32];
  lane_addr(w, I, A);
  u32 es = I.sz, n = I.x.size(), tot = es * n;
  const u8* P[32];
  u32 gm = 0, sm = 0;
  u32 sa[32];
  LANES(m) {
    u64 a = A[lane];
    if (a & (tot - 1))
      misaligned(lane,
                 I.sp == SP_SHARED  ? "shared"
                 : I.sp == SP_LOCAL ? "local"
                                    : "global/generic",
                 a, tot);
    switch (resolve(I.sp, a)) {
      case SP_SHARED: {
        P[lane] = smem_ptr(E, a, tot, lane, "read");
        sm_read(E, w, a, tot, lane);
        sm |= 1u << lane;
        sa[lane] = a;
        break;
      }
      case SP_LOCAL:
        P[lane] = local_ptr(E, w, a, tot, lane, "read");
        E.st.l_bytes += tot;
        break;
      case SP_PARAM:
        if (a - LOCAL_BASE < WINDOW) {
          P[lane] = local_ptr(E, w, a - LOCAL_BASE, tot, lane, "param read");
        } else if (a < E.local_bytes)
          P[lane] = local_ptr(E, w, a, tot, lane, "param read");
        else {
          if (a < PARAM_BASE || a + tot > PARAM_BASE + E.params.size())
            fail_lane(Fault::Address, lane, "out-of-bounds parameter read at 0x%llx",
                      (unsigned long long)a);
          P[lane] = &E.params[a - PARAM_BASE];
        }
        break;
      default:
        P[lane] = global_ptr(E, a, tot, lane, "read", false);
        if (I.sp != SP_CONST) gm |= 1u << lane;
        break;
    }
  }
  if (gm) {
    E.st.g_ld_sectors += count_sectors(A, gm, tot);
    E.st.g_ld_bytes += (u64)__builtin_popcount(gm) * tot;
    E.st.g_ld_req++;
    if (I.flag) E.spin_ops++;
  }
  if (sm) smem_stats(E, sa, sm, tot, false);
  for (u32 k = 0; k < n; k++) {
    if (I.x[k] == NOREG) continue;
    u8* d = w.R + I.x[k];
    if (I.ds == es) {
      switch (es) {
        case 4:
          LANES(m) memcpy(d + lane * 4, P[lane] + k * 4, 4);
          break;
        case 2:
          LANES(m) memcpy(d + lane * 2, P[lane] + k * 2, 2);
          break;
        case 8:
          LANES(m) memcpy(d + lane * 8, P[lane] + k * 8, 8);
          break;
        default:
          LANES(m) memcpy(d + lane * es, P[lane] + k * es, es);
      }
    } else
      LANES(m) {
        u64 v = 0;
        memcpy(&v, P[lane] + k * es, es);
        if (ty_signed(I.t0)) {
          int sh = 64 - 8 * es;
          v = (u64)((i64)(v << sh) >> sh);
        }
        memcpy(d + lane * I.ds, &v, I.ds);
      }
  }
}
// uniform parameter load (the common case of kernel arguments)
static void h_ldparam(Exec& E, Warp& w, const Inst& I, u32 m) {
  u64 off = I.imm;
  u32 es = I.sz;
  for (size_t k = 0; k < I.x.size(); k++) {
    if (I.x[k] == NOREG) continue;
    u64 v[2] = {0, 0};
    memcpy(v, &E.params[off + k * es], es);
    if (ty_signed(I.t0) && I.ds > es) {
      int sh = 64 - 8 * es;
      v[0] = (u64)((i64)(v[0] << sh) >> sh);
    }
    u8* d = w.R + I.x[k];
    LANES(m) memcpy(d + lane * I.ds, v, I.ds);
  }
}
// The lanes of mask whose store survives: of lanes with one address, the highest. Which lane wins
// is undefined on hardware; to pick it before the race check lets replicated warps, whose lanes
// differ in the last bit, store the same value (a reduction whose partial sums sit in more than one
// lane).
static u32 store_winners(const u32* addr, u32 mask) {
  u32 rest = mask, win = 0, last = 0;
  bool rising = true;
  LANES(mask) {
    rising &= addr[lane] > last;
    last = addr[lane];
  }
  if (rising) return mask;
  while (rest) {
    u32 top = 31 - __builtin_clz(rest);
    win |= 1u << top;
    LANES(rest) if (addr[lane] == addr[top]) rest &= ~(1u << lane);
  }
  return win;
}
static void h_st(Exec& E, Warp& w, const Inst& I, u32 m) {
  u64 A[32];
  lane_addr(w, I, A);
  u32 es = I.sz, n = I.x.size(), tot = es * n;
  u32 gm = 0, sm = 0;
  u32 sa[32];
  u8 buf[64];
  auto value = [&](u32 lane) {
    for (u32 k = 0; k < n; k++) memcpy(buf + k * es, w.R + I.x[k] + (size_t)lane * I.cs, es);
    return buf;
  };
  LANES(m) {
    u64 a = A[lane];
    if (a & (tot - 1))
      misaligned(lane,
                 I.sp == SP_SHARED  ? "shared"
                 : I.sp == SP_LOCAL ? "local"
                                    : "global/generic",
                 a, tot);
    switch (resolve(I.sp, a)) {
      case SP_SHARED:
        smem_ptr(E, a, tot, lane, "write");
        sm |= 1u << lane;
        sa[lane] = a;
        break;
      case SP_LOCAL:
      case SP_PARAM:
        if (a - LOCAL_BASE < WINDOW) a -= LOCAL_BASE;
        memcpy(local_ptr(E, w, a, tot, lane, "write"), value(lane), tot);
        E.st.l_bytes += tot;
        break;
      default:
        memcpy(global_ptr(E, a, tot, lane, "write", true), value(lane), tot);
        gm |= 1u << lane;
        break;
    }
  }
  if (gm) {
    E.st.g_st_sectors += count_sectors(A, gm, tot);
    E.st.g_st_bytes += (u64)__builtin_popcount(gm) * tot;
    E.st.g_st_req++;
  }
  if (sm) {
    LANES(store_winners(sa, sm)) {
      sm_write(E, w, sa[lane], tot, lane, value(lane));
      memcpy(&E.cta->smem[sa[lane]], buf, tot);
    }
    smem_stats(E, sa, sm, tot, true);
  }
}
// atomics
enum { AO_ADD, AO_AND, AO_OR, AO_XOR, AO_INC, AO_DEC, AO_MIN, AO_MAX, AO_EXCH, AO_CAS };
template <class T>
static T aop(int op, T o, T b, T c) {
  switch (op) {
    case AO_ADD:
      return o + b;
    case AO_AND:
      return o & b;
    case AO_OR:
      return o | b;
    case AO_XOR:
      return o ^ b;
    case AO_INC:
      return o >= b ? 0 : o + 1;
    case AO_DEC:
      return (o == 0 || o > b) ? b : o - 1;
    case AO_MIN:
      return std::min(o, b);
    case AO_MAX:
      return std::max(o, b);
    case AO_EXCH:
      return b;
    default:
      return o == b ? c : o;
  }
}
static void atom_elem(const Inst& I, u8* p, const u8* b, const u8* c) {
  auto half = [&](bool bf, u8* q, const u8* s) {
    u16 x, y;
    memcpy(&x, q, 2);
    memcpy(&y, s, 2);
    float fx = bf ? bf2f1(x) : h2f1(x), fy = bf ? bf2f1(y) : h2f1(y), r;
    if (I.op == AO_ADD)
      r = fx + fy;
    else if (I.op == AO_MIN)
      r = fx != fx ? fy : fy != fy ? fx : std::min(fx, fy);
    else if (I.op == AO_MAX)
      r = fx != fx ? fy : fy != fy ? fx : std::max(fx, fy);
    else
      fail(Fault::Unsupported, "half atomic");
    u16 o = bf ? f2bf1(r) : f2h1(r);
    memcpy(q, &o, 2);
  };
#define AI(T)                        \
  {                                  \
    T o, x, y = 0;                   \
    memcpy(&o, p, sizeof(T));        \
    memcpy(&x, b, sizeof(T));        \
    if (c) memcpy(&y, c, sizeof(T)); \
    o = aop<T>(I.op, o, x, y);       \
    memcpy(p, &o, sizeof(T));        \
    break;                           \
  }
  switch (I.t0) {
    case U16:
    case B16:
    AI(u16) case U32:
    case B32:
    AI(u32) case S32:
    AI(i32) case U64:
    case B64:
    AI(u64) case S64:
      AI(i64)
    case B128: {
      u128 o, x, y = 0;
      memcpy(&o, p, 16);
      memcpy(&x, b, 16);
      if (c) memcpy(&y, c, 16);
      if (I.op == AO_EXCH)
        o = x;
      else if (I.op == AO_CAS)
        o = o == x ? y : o;
      else
        fail(Fault::Unsupported, "b128 atomic");
      memcpy(p, &o, 16);
      break;
    }
    case F32: {
      float o, x;
      memcpy(&o, p, 4);
      memcpy(&x, b, 4);
      if (I.op == AO_ADD)
        o += x;
      else if (I.op == AO_EXCH)
        o = x;
      else
        fail(Fault::Unsupported, "f32 atomic op");
      memcpy(p, &o, 4);
      break;
    }
    case F64: {
      double o, x;
      memcpy(&o, p, 8);
      memcpy(&x, b, 8);
      if (I.op == AO_ADD)
        o += x;
      else
        fail(Fault::Unsupported, "f64 atomic op");
      memcpy(p, &o, 8);
      break;
    }
    case F16:
      half(false, p, b);
      break;
    case BF16:
      half(true, p, b);
      break;
    case F16X2:
      half(false, p, b);
      half(false, p + 2, b + 2);
      break;
    case BF16X2:
      half(true, p, b);
      half(true, p + 2, b + 2);
      break;
    default:
      fail(Fault::Unsupported, "atomic type");
  }
}
static std::unordered_map<u64, VC>& lockvc(Exec& E) {
  static thread_local std::unordered_map<u64, VC> m;
  static thread_local Cta* owner = nullptr;
  static thread_local u64 lin = ~0ull;
  if (owner != E.cta || lin != E.cta->lin) {
    m.clear();
    owner = E.cta;
    lin = E.cta->lin;
  }
  return m;
}
static void h_atom(Exec& E, Warp& w, const Inst& I, u32 m) {
  u64 A[32];
  lane_addr(w, I, A);
  u32 es = ty_size(I.t0), n = I.vec, tot = es * n;
  u32 gm = 0, sm = 0;
  u32 sa[32];
  u8 bb[64], old[64];
  // lanes are served in a pseudo-random order: the order of atomics within a warp is unspecified
  u32 order[32], cnt = 0;
  LANES(m) order[cnt++] = lane;
  for (u32 k = cnt; k > 1; k--) std::swap(order[k - 1], order[E.rnd(k)]);
  for (u32 q = 0; q < cnt; q++) {
    u32 lane = order[q];
    u64 a = A[lane];
    if (a & (tot - 1)) misaligned(lane, "atomic", a, tot);
    u8* p;
    if (resolve(I.sp, a) == SP_SHARED) {
      p = smem_ptr(E, a, tot, lane, "atomic");
      bool sync = I.op == AO_CAS || I.op == AO_EXCH || I.flag;
      if (sync && E.chk_race) {
        VC& v = lockvc(E)[a];
        vc_acquire(w, v);
      }
      sm_atomic(E, w, a, tot, lane, sync);
      if (sync && E.chk_race) {
        vc_release(E, w, lockvc(E)[a]);
      }
      sm |= 1u << lane;
      sa[lane] = a;
    } else {
      p = global_ptr(E, a, tot, lane, "atomic", true);
      E.gwrites--;
      gm |= 1u << lane;
    }
    memcpy(old, p, tot);
    for (u32 k = 0; k < n; k++) {
      memcpy(bb, w.R + I.x[k] + (size_t)lane * es, es);
      atom_elem(I, p + k * es, bb, I.c == NOREG ? nullptr : w.R + I.c + (size_t)lane * es);
    }
    if (memcmp(old, p, tot)) {
      E.gwrites++;
      E.cta->progress++;
    } else
      E.spin_ops++;
    if (I.d != NOREG)
      for (u32 k = 0; k < n; k++)
        memcpy(w.R + (k == 0 ? I.d : I.x[n + k]) + (size_t)lane * es, old + k * es, es);
  }
  if (gm) {
    E.st.g_atom_sectors += count_sectors(A, gm, tot);
  }
  if (sm) smem_stats(E, sa, sm, tot, true);
}
// ldmatrix / stmatrix
static void need_full(Exec& E, Warp& w, u32 m) {
  if (m != FULL)
    fail(Fault::Barrier,
         "warp-wide matrix instruction executed with lanes 0x%08x active (all 32 are required)", m);
}
static void h_ldmatrix(Exec& E, Warp& w, const Inst& I, u32 m) {
  need_full(E, w, m);
  u64 A[32];
  lane_addr(w, I, A);
  int nm = I.x.size();
  bool tr = I.flag;
  const u8* row[32];
  u32 sa[32];
  for (int l = 0; l < 8 * nm; l++) {
    u64 a = A[l];
    if (I.sp == SP_GENERIC) {
      if (a - SHARED_BASE >= WINDOW)
        fail_lane(Fault::Address, l, "ldmatrix generic address 0x%llx is not in shared memory",
                  (unsigned long long)a);
      a -= SHARED_BASE;
    }
    if (a & 15) misaligned(l, "ldmatrix row", a, 16);
    row[l] = smem_ptr(E, a, 16, l, "ldmatrix read");
    sm_read(E, w, a, 16, l);
    sa[l] = a;
  }
  for (int j = 0; j < nm; j++) {
    u32 mk = 0xffu << (8 * j);
    smem_stats(E, sa, mk, 16, false);
    u32* d = w.r<u32>(I.x[j]);
    u32 t[32];
    if (!tr)
      for (int l = 0; l < 32; l++) memcpy(&t[l], row[8 * j + l / 4] + (l & 3) * 4, 4);
    else
      for (int l = 0; l < 32; l++) {
        u16 x, y;
        int r0 = (l & 3) * 2, c = l / 4;
        memcpy(&x, row[8 * j + r0] + 2 * c, 2);
        memcpy(&y, row[8 * j + r0 + 1] + 2 * c, 2);
        t[l] = x | (u32)y << 16;
      }
    memcpy(d, t, 128);
  }
}
static void h_stmatrix(Exec& E, Warp& w, const Inst& I, u32 m) {
  need_full(E, w, m);
  u64 A[32];
  lane_addr(w, I, A);
  int nm = I.x.size();
  u32 sa[32];
  for (int j = 0; j < nm; j++) {
    u16 mat[8][8];
    const u32* s = w.r<u32>(I.x[j]);
    for (int l = 0; l < 32; l++)
      for (int k = 0; k < 2; k++) {
        u16 v = (u16)(s[l] >> (16 * k));
        if (!I.flag)
          mat[l / 4][(l & 3) * 2 + k] = v;
        else
          mat[(l & 3) * 2 + k][l / 4] = v;
      }
    for (int r = 0; r < 8; r++) {
      int l = 8 * j + r;
      u64 a = A[l];
      if (I.sp == SP_GENERIC) a -= SHARED_BASE;
      if (a & 15) misaligned(l, "stmatrix row", a, 16);
      u8* p = smem_ptr(E, a, 16, l, "stmatrix write");
      sm_write(E, w, a, 16, l, mat[r]);
      memcpy(p, mat[r], 16);
      sa[l] = a;
    }
    smem_stats(E, sa, 0xffu << (8 * j), 16, true);
  }
}
static void h_movmatrix(Exec& E, Warp& w, const Inst& I, u32 m) {
  need_full(E, w, m);
  const u16* s = w.r<u16>(I.a);
  u16 t[64];  // registers hold the 8x8 matrix in row order
  for (int r = 0; r < 8; r++)
    for (int c = 0; c < 8; c++) t[8 * c + r] = s[8 * r + c];
  memcpy(w.r<u16>(I.d), t, 128);
}
// cp.async
static void h_cpasync(Exec& E, Warp& w, const Inst& I, u32 m) {
  AsyncCopy c;
  c.seq = ++w.async_seq;
  c.mask = m;
  c.size = I.imm2;
  c.line = I.line;
  c.pc = E.cur_pc;
  u32 sz = c.size;
  u64 src[32];
  u32 sa[32];
  u32 gm = 0;
  u64 D[32];
  lane_addr(w, I, D);
  const u64* s = w.r<u64>(I.b);
  LANES(m) {
    u64 a = D[lane];
    if (I.flag2) a -= SHARED_BASE;
    if (a & (sz - 1)) misaligned(lane, "cp.async shared", a, sz);
    u64 ga = s[lane] + (i64)(i32)I.target;
    u32 n = sz;
    if (I.c != NOREG) {
      if (I.flag) {
        bool ig = w.pr(I.c) >> lane & 1;
        if (I.neg) ig = !ig;
        if (ig) n = 0;
      } else {
        n = w.r<u32>(I.c)[lane];
        if (n > sz)
          fail_lane(Fault::Invalid, lane, "cp.async src-size %u exceeds cp-size %u", n, sz);
      }
    }
    smem_ptr(E, a, sz, lane, "cp.async write");
    if (n) {
      if (ga & (sz - 1)) misaligned(lane, "cp.async global", ga, sz);
      find_global(E, ga, n, lane, "cp.async read");
      gm |= 1u << lane;
    }
    sm_begin_async(E, w, a, sz, lane, 2, I.line);
    c.dst[lane] = a;
    c.src[lane] = ga;
    c.ssz[lane] = n;
    c.grp[lane] = w.commit_cnt[lane];
    sa[lane] = a;
    src[lane] = ga;
    E.st.cp_async_bytes += sz;
    E.st.cp_async_global_bytes += n;
  }
  if (gm) {
    E.st.g_ld_sectors += count_sectors(src, gm, sz);
    E.st.g_ld_bytes += (u64)__builtin_popcount(gm) * sz;
    E.st.g_ld_req++;
  }
  smem_stats(E, sa, m, sz, true);
  w.async.push_back(c);
}
void cp_async_complete(Exec& E, Warp& w, u32 mask, u32 allow, bool all, u64 maxseq) {
  size_t o = 0;
  for (size_t k = 0; k < w.async.size(); k++) {
    AsyncCopy& c = w.async[k];
    LANES(c.mask & mask) {
      if (c.seq > maxseq || (!all && c.grp[lane] + allow >= w.commit_cnt[lane])) continue;
      u8* d = &E.cta->smem[c.dst[lane]];
      u32 n = c.ssz[lane];
      memset(d, 0, c.size);
      if (n) {
        u8* g = global_ptr(E, c.src[lane], n, lane, "cp.async read", false);
        memcpy(d, g, n);
      }
      sm_end_async(E, w, c.dst[lane], c.size, lane);
      c.mask &= ~(1u << lane);
    }
    if (c.mask) {
      if (o != k) w.async[o] = c;
      o++;
    }
  }
  w.async.resize(o);
}
static void h_commit(Exec&, Warp& w, const Inst&, u32 m) { LANES(m) w.commit_cnt[lane]++; }
static void h_waitgroup(Exec& E, Warp& w, const Inst& I, u32 m) {
  cp_async_complete(E, w, m, I.imm, I.flag);
}
static void h_nop(Exec&, Warp&, const Inst&, u32) {}
static void h_const64(Exec&, Warp& w, const Inst& I, u32 m) {
  u64* d = w.r<u64>(I.d);
  LANES(m) d[lane] = 0x14f0000000000000ull;
}
static void h_isspacep(Exec&, Warp& w, const Inst& I, u32 m) {
  const u64* a = w.r<u64>(I.a);
  u32 r = 0;
  LANES(m) {
    bool s = a[lane] - SHARED_BASE < WINDOW, l = a[lane] - LOCAL_BASE < WINDOW;
    bool v = I.sp == SP_SHARED ? s : I.sp == SP_LOCAL ? l : !(s || l);
    r |= (u32)v << lane;
  }
  u32& d = w.pr(I.d);
  d = (d & ~m) | r;
}
static void h_prefetch(Exec& E, Warp& w, const Inst& I, u32 m) {
  (void)E;
  (void)w;
  (void)I;
  (void)m;
}

static bool take_space(Dec& d, Space& sp) {
  if (d.take("global"))
    sp = SP_GLOBAL;
  else if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster"))
    sp = SP_SHARED;
  else if (d.take("local"))
    sp = SP_LOCAL;
  else if (d.take("param") || d.take("param::func") || d.take("param::entry"))
    sp = SP_PARAM;
  else if (d.take("const"))
    sp = SP_CONST;
  else {
    sp = SP_GENERIC;
    return false;
  }
  return true;
}
static void take_hints(Dec& d, bool* pol) {
  d.take("weak");
  d.take("volatile");
  d.take("relaxed");
  d.take("mmio");
  bool hint = d.take("L2::cache_hint");
  d.take_prefix("L1::");
  while (d.take_prefix("L2::")) {
  }
  for (auto s : {"ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt"}) d.take(s);
  if (pol) *pol = hint;
}
static void take_scope(Dec& d) {
  for (auto s : {"cta", "cluster", "gpu", "sys", "gl"}) d.take(s);
}
static Ty mem_reg_ty(Ty t) {
  switch (ty_size(t)) {
    case 1:
      return B8;
    case 2:
      return B16;
    case 4:
      return B32;
    case 8:
      return B64;
    default:
      return B128;
  }
}

bool decode_mem(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.kind = K_ALU;
  if (op == "ld" || op == "ldu" || op == "st") {
    bool st = op == "st";
    Space sp;
    take_space(d, sp);
    bool vol = d.take("acquire") | d.take("volatile") | d.take("relaxed");
    d.take("release");
    bool pol;
    take_hints(d, &pol);
    take_scope(d);
    int vec = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    Ty t = d.need_type();
    d.done();
    I.t0 = t;
    I.sz = ty_size(t);
    size_t want = pol ? 3 : 2;
    if (d.n() != want) d.bad("operand count");
    const Operand& ao = d.op(st ? 0 : 1);
    const Operand& ro = d.op(st ? 1 : 0);
    d.addr(ao, I.a, I.imm, I.as, nullptr);
    I.sp = sp;
    std::vector<const Operand*> rs;
    if (ro.kind == Operand::Vec)
      for (auto& e : ro.el) rs.push_back(&e);
    else
      rs.push_back(&ro);
    if ((int)rs.size() != vec) d.bad("vector size");
    if (st) {
      int cs = 0;
      for (auto r : rs) {
        int q;
        i32 o = d.src(*r, mem_reg_ty(t) == t ? t : (ty_float(t) ? t : mem_reg_ty(t)), &q, true);
        if (r->kind == Operand::Reg) {
          if (cs && cs != q) d.bad("mixed register sizes");
          cs = q;
        }
        I.x.push_back(o);
      }
      if (!cs) cs = I.sz;
      for (size_t k = 0; k < rs.size(); k++)
        if (rs[k]->kind != Operand::Reg && cs != I.sz) {
          Operand c = *rs[k];
          I.x[k] = d.src(c, cs == 2 ? B16 : cs == 4 ? B32 : B64);
        }
      I.cs = cs;
    } else {
      int ds = 0;
      for (auto r : rs) {
        if (r->kind == Operand::Sink) {
          I.x.push_back(NOREG);
          continue;
        }
        if (r->kind != Operand::Reg) d.bad("ld destination");
        int q = d.regsize(*r);
        if (q < I.sz || (ds && ds != q)) d.bad("ld destination size");
        ds = q;
        I.x.push_back(d.dst(*r, q));
      }
      I.ds = ds ? ds : I.sz;
    }
    I.fn = st ? h_st : h_ld;
    I.flag = vol;
    switch (sp) {
      case SP_SHARED:
        I.cls = st ? C_STS : C_LDS;
        break;
      case SP_LOCAL:
        I.cls = st ? C_STL : C_LDL;
        break;
      case SP_PARAM:
      case SP_CONST:
        I.cls = C_LDC;
        break;
      default:
        I.cls = st ? C_STG : C_LDG;
    }
    if (sp == SP_PARAM && ao.el[0].kind == Operand::Sym) {
      const Symbol& y = d.M.syms[ao.el[0].sym];
      if (!y.thread_param && y.sp == SP_PARAM) {
        if (st) d.bad("store to a kernel parameter");
        u64 off = y.addr - PARAM_BASE + I.imm;
        if (I.imm < 0 || I.imm + I.sz * vec > (i64)y.size) d.bad("parameter access out of range");
        I.imm = off;
        I.fn = h_ldparam;
      }
    }
    return true;
  }
  if (op == "atom" || op == "red") {
    bool red = op == "red";
    if (d.take("async")) d.bad("red.async");
    I.flag = d.take("acq_rel") | d.take("acquire") | d.take("release");
    d.take("relaxed");
    bool volat = d.take("volatile");
    (void)volat;
    Space sp;
    take_space(d, sp);
    I.sp = sp;
    static const char* nm[] = {"add", "and", "or",  "xor",  "inc",
                               "dec", "min", "max", "exch", "cas"};
    int o = -1;
    for (int k = 0; k < 10; k++)
      if (d.take(nm[k])) o = k;
    if (o < 0) d.bad("atomic operation");
    I.op = o;
    take_scope(d);
    d.take("noftz");
    bool pol = d.take("L2::cache_hint");
    I.vec = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    Ty t = d.need_type();
    d.done();
    I.t0 = t;
    I.cls = C_ATOM;
    size_t k = red ? 0 : 1;
    d.addr(d.op(k), I.a, I.imm, I.as);
    std::vector<const Operand*> bs;
    const Operand& bo = d.op(k + 1);
    if (bo.kind == Operand::Vec)
      for (auto& e : bo.el) bs.push_back(&e);
    else
      bs.push_back(&bo);
    if ((int)bs.size() != I.vec) d.bad("vector size");
    for (auto b : bs) I.x.push_back(d.src(*b, t));
    if (!red) {
      const Operand& ro = d.op(0);
      if (ro.kind == Operand::Vec) {
        I.d = d.dst(ro.el[0], ty_size(t));
        for (auto& e : ro.el) I.x.push_back(d.dst(e, ty_size(t)));
      } else if (ro.kind != Operand::Sink)
        I.d = d.dst(ro, ty_size(t));
    }
    size_t used = k + 2;
    if (o == AO_CAS) {
      I.c = d.src(d.op(used++), t);
    }
    if (pol) used++;
    if (d.n() != used) d.bad("operand count");
    I.fn = h_atom;
    return true;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    bool st = op == "stmatrix";
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.bad("ldmatrix shape");
    int n = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
    if (!n) d.bad("count");
    I.flag = d.take("trans");
    Space sp;
    take_space(d, sp);
    I.sp = sp;
    Ty t = d.need_type();
    if (t != B16) d.bad("only .b16");
    d.done();
    const Operand& ro = d.op(st ? 1 : 0);
    std::vector<const Operand*> rs;
    if (ro.kind == Operand::Vec)
      for (auto& e : ro.el) rs.push_back(&e);
    else
      rs.push_back(&ro);
    if ((int)rs.size() != n) d.bad("register count");
    for (auto r : rs) I.x.push_back(st ? d.src(*r, B32) : d.dst(*r, 4));
    d.addr(d.op(st ? 0 : 1), I.a, I.imm, I.as);
    I.cls = st ? C_STSM : C_LDSM;
    I.fn = st ? h_stmatrix : h_ldmatrix;
    I.sync = 1;
    return true;
  }
  if (op == "movmatrix") {
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans") ||
        d.need_type() != B16)
      d.bad("movmatrix form");
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), B32);
    I.cls = C_SHFL;
    I.fn = h_movmatrix;
    I.sync = 1;
    return true;
  }
  if (op == "cp" && d.P.mods.size() > 1 && d.P.mods[1] == "async" &&
      !(d.P.mods.size() > 2 && (d.P.mods[2] == "bulk" || d.P.mods[2] == "mbarrier"))) {
    d.take("async");
    I.cls = C_CPASYNC;
    if (d.take("commit_group")) {
      d.done();
      I.fn = h_commit;
      return true;
    }
    if (d.take("wait_group")) {
      d.done();
      I.imm = d.immval(d.op(0));
      I.fn = h_waitgroup;
      return true;
    }
    if (d.take("wait_all")) {
      d.done();
      I.flag = true;
      I.fn = h_waitgroup;
      return true;
    }
    bool ca = d.take("ca"), cg = d.take("cg");
    if (!ca && !cg) d.bad("cp.async form");
    if (!(d.take("shared") || d.take("shared::cta")) || !d.take("global")) d.bad("cp.async spaces");
    bool pol = d.take("L2::cache_hint");
    while (d.take_prefix("L2::")) {
    }
    d.done();
    d.addr(d.op(0), I.a, I.imm, I.as);
    i64 soff;
    u8 ss;
    i32 sb;
    d.addr(d.op(1), sb, soff, ss);
    if (ss != 8) d.bad("cp.async source address size");
    I.b = sb;
    I.target = (u32)(i32)soff;
    I.imm2 = d.immval(d.op(2));
    if (I.imm2 != 4 && I.imm2 != 8 && I.imm2 != 16) d.bad("cp-size");
    if (cg && I.imm2 != 16) d.bad("cp.async.cg needs 16 bytes");
    size_t k = 3, end = d.n() - (pol ? 1 : 0);
    if (end > 4) d.bad("operand count");
    if (k < end) {
      const Operand& o = d.op(k);
      if (o.kind == Operand::Reg && d.regty(o) == PRED) {
        I.flag = true;
        I.c = d.pred(o, &I.neg);
      } else
        I.c = d.src(o, U32);
    }
    I.fn = h_cpasync;
    return true;
  }
  if (op == "membar" || op == "fence") {
    I.cls = C_FENCE;
    bool proxy = false, asy = false;
    for (auto& m : d.P.mods) {
      if (m == "proxy") proxy = true;
      if (m == "async") asy = true;
    }
    for (auto& s :
         {"proxy", "alias", "async", "async::generic", "sc", "acq_rel", "acquire", "release",
          "mbarrier_init", "global", "shared::cta", "shared::cluster", "tensormap::generic",
          "sync_restrict::shared::cta", "sync_restrict::shared::cluster"})
      d.take(s);
    take_scope(d);
    bool tm = false;
    for (auto& m : d.P.mods)
      if (m == "tensormap::generic") tm = true;
    (void)tm;
    d.done();
    I.fn = h_nop;
    if (proxy && asy)
      I.fn = [](Exec& E, Warp& w, const Inst&, u32) {
        w.fvc = w.vc;
        w.clock = ++E.now;
        w.vc.c[w.id] = w.clock;
        w.fence_clock = w.clock;
      };
    return true;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") {
    if (op == "discard") d.bad("discard");
    Space sp;
    take_space(d, sp);
    d.take("L1");
    d.take("L2");
    d.take_prefix("L2::");
    bool tm = d.take("tensormap");
    (void)tm;
    d.done();
    I.cls = C_OTHER;
    I.fn = h_prefetch;
    return true;
  }
  if (op == "createpolicy") {
    if (!d.take("fractional") && !d.take("range") && !d.take("cvt")) d.bad("createpolicy");
    while (d.take_prefix("L2::")) {
    }
    d.take("L2");
    d.take("global");
    d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 8);
    I.fn = h_const64;
    return true;
  }
  if (op == "griddepcontrol") {
    d.take("wait");
    d.take("launch_dependents");
    d.done();
    I.fn = h_nop;
    return true;
  }
  if (op == "isspacep") {
    Space sp;
    take_space(d, sp);
    I.sp = sp;
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), U64);
    I.fn = h_isspacep;
    return true;
  }
  if (op == "mapa") {
    d.take("shared::cluster");
    Ty t = d.need_type();
    d.done();
    I.ds = ty_size(t);
    I.d = d.dst(d.op(0), I.ds);
    I.a = d.src(d.op(1), t);
    I.b = d.src(d.op(2), U32);
    I.fn = [](Exec&, Warp& w, const Inst& I, u32 m) {
      LANES(m) {
        if (w.r<u32>(I.b)[lane] != 0)
          fail_lane(Fault::Unsupported, lane,
                    "mapa to CTA rank %u: only cluster size 1 is supported", w.r<u32>(I.b)[lane]);
        memcpy(w.R + I.d + lane * I.ds, w.R + I.a + lane * I.ds, I.ds);
      }
    };
    return true;
  }
  return false;
}
}  // namespace vsim
