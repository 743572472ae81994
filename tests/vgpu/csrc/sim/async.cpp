// mbarrier objects, cp.async.bulk[.tensor], tensor maps, bulk groups.
// Every asynchronous copy is queued and carried out as late as the program's waits allow
// (or at a pseudo-random earlier time); its bytes stay poisoned until then.
#include "fp.h"
namespace vsim {
static inline u32 sh_addr(Exec& E, u64 a, int lane, const char* what) {
  if (a - SHARED_BASE < WINDOW) a -= SHARED_BASE;
  if (a >= (1u << 20))
    fail_lane(Fault::Address, lane, "%s: address 0x%llx is not in shared memory", what,
              (unsigned long long)a);
  return (u32)a;
}
static MBar& mbar_at(Exec& E, Warp* w, u32 a, int lane, const char* what) {
  if (a & 7) fail_lane(Fault::Alignment, lane, "%s: misaligned mbarrier address 0x%x", what, a);
  auto it = E.cta->mbars.find(a);
  if (it == E.cta->mbars.end())
    fail_lane(Fault::Barrier, lane, "%s: no mbarrier was initialised at shared address 0x%x", what,
              a);
  if (w) sm_visible(E, *w, a, 8, lane, what);
  return it->second;
}
static void mb_check(Exec& E, MBar& b) {
  if (b.pending == 0 && b.tx == 0) {
    b.phase++;
    b.pending = b.count;
    vc_join(b.vc_done, b.vc);
    E.cta->progress++;
  }
}
static void mb_arrive(Exec& E, MBar& b, u32 n, int lane) {
  if ((i32)n > b.pending)
    fail_lane(Fault::Barrier, lane,
              "mbarrier at 0x%x: %u arrivals exceed the %d pending in this phase", b.addr, n,
              b.pending);
  b.pending -= n;
  E.cta->progress++;
  mb_check(E, b);
}
enum { MB_INIT, MB_INVAL, MB_ARRIVE, MB_EXPECT, MB_COMPLETE, MB_TRY, MB_TEST, MB_PENDCNT, MB_DROP };
static inline u64 addr_of(Warp& w, const Inst& I, int lane) {
  return I.as == 8 ? w.r<u64>(I.a)[lane] + I.imm : (u64)(u32)(w.r<u32>(I.a)[lane] + (u32)I.imm);
}
static void h_mbar(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  u32 res = 0;
  bool anyfalse = false;
  LANES(m) {
    u32 a = sh_addr(E, addr_of(w, I, lane), lane, "mbarrier");
    smem_ptr(E, a, 8, lane, "mbarrier access");
    switch (I.op) {
      case MB_INIT: {
        u32 cnt = w.r<u32>(I.b)[lane];
        if (!cnt || cnt >= (1u << 20))
          fail_lane(Fault::Barrier, lane, "mbarrier.init count %u out of range", cnt);
        if (a & 7) fail_lane(Fault::Alignment, lane, "misaligned mbarrier address 0x%x", a);
        if (C.mbars.count(a)) C.init[a] = 1, memset(&C.init[a], 1, 8);
        u8 z[8] = {0};
        sm_write(E, w, a, 8, lane, nullptr);
        memcpy(&C.smem[a], z, 8);
        memset(&C.init[a], 4, 8);
        MBar b;
        memset(&b, 0, sizeof b);
        b.addr = a;
        b.count = cnt;
        b.pending = cnt;
        C.mbars[a] = b;
        break;
      }
      case MB_INVAL:
        mbar_at(E, &w, a, lane, "mbarrier.inval");
        C.mbars.erase(a);
        memset(&C.init[a], 0, 8);
        if (E.chk_race) {
          for (int k = 0; k < 8; k++) {
            C.wr_stamp[a + k] = w.clock;
            C.wr_warp[a + k] = w.id;
          }
        }
        break;
      case MB_ARRIVE:
      case MB_DROP: {
        MBar& b = mbar_at(E, &w, a, lane, "mbarrier.arrive");
        u64 st = b.phase;
        if (I.flag) {
          b.tx += w.r<u32>(I.b)[lane];
          if (I.d != (i32)NOREG) w.r<u64>(I.d)[lane] = st;
          vc_release(E, w, b.vc);
          mb_arrive(E, b, 1, lane);
        } else {
          u32 n = I.b == (i32)NOREG ? 1 : w.r<u32>(I.b)[lane];
          vc_release(E, w, b.vc);
          if (I.d != (i32)NOREG) w.r<u64>(I.d)[lane] = st;
          if (I.op == MB_DROP) b.count -= n;
          mb_arrive(E, b, n, lane);
        }
        break;
      }
      case MB_EXPECT:
        mbar_at(E, &w, a, lane, "mbarrier.expect_tx").tx += w.r<u32>(I.b)[lane];
        break;
      case MB_COMPLETE: {
        MBar& b = mbar_at(E, &w, a, lane, "mbarrier.complete_tx");
        b.tx -= w.r<u32>(I.b)[lane];
        mb_check(E, b);
        break;
      }
      case MB_TRY:
      case MB_TEST: {
        MBar& b = mbar_at(E, &w, a, lane, "mbarrier wait");
        bool ok =
            I.flag ? (b.phase & 1) != (w.r<u32>(I.b)[lane] & 1) : b.phase > w.r<u64>(I.b)[lane];
        if (ok) {
          res |= 1u << lane;
          vc_acquire(w, b.vc_done);
          w.wsync = w.serial;
        } else
          anyfalse = true;
        break;
      }
      case MB_PENDCNT:
        break;
    }
  }
  if (I.op == MB_TRY || I.op == MB_TEST) {
    u32& d = w.pr(I.d);
    d = (d & ~m) | res;
    if (anyfalse) {
      w.spinning = true;
      w.spin_epoch = C.progress;
      w.ctl = CTL_YIELD;
    }
  }
}
// tensor maps
static const int ESZ[13] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
static TMap load_tmap(Exec& E, u64 a, int lane) {
  if (a & 63)
    fail_lane(Fault::Alignment, lane, "tensor map address 0x%llx is not 64-byte aligned",
              (unsigned long long)a);
  TMap t;
  memcpy(&t, global_ptr(E, a, 128, lane, "tensor map read", false), sizeof t);
  if (t.magic != TMAP_MAGIC)
    fail_lane(Fault::Address, lane,
              "no tensor map at 0x%llx (cuTensorMapEncodeTiled or tensormap.replace makes one)",
              (unsigned long long)a);
  if (t.rank < 1 || t.rank > 5 || t.dtype > 12)
    fail_lane(Fault::Invalid, lane, "tensor map has rank %u, element type %u", t.rank, t.dtype);
  if (t.interleave)
    fail_lane(Fault::Unsupported, lane, "interleaved tensor maps are not supported");
  int es = ESZ[t.dtype];
  if (t.addr & 15)
    fail_lane(Fault::Alignment, lane, "tensor map global address 0x%llx is not 16-byte aligned",
              (unsigned long long)t.addr);
  for (int k = 0; k < t.rank; k++) {
    if (t.estride[k] != 1)
      fail_lane(Fault::Unsupported, lane,
                "tensor map element strides other than 1 are not supported");
    if (!t.box[k] || t.box[k] > 256)
      fail_lane(Fault::Invalid, lane, "tensor map box dimension %d is %u", k, t.box[k]);
    if (k && (t.strides[k - 1] & 15))
      fail_lane(Fault::Invalid, lane, "tensor map stride %d (%llu) is not a multiple of 16", k,
                (unsigned long long)t.strides[k - 1]);
  }
  u32 inner = t.box[0] * es;
  static const u32 span[4] = {1u << 30, 32, 64, 128};
  if (inner & 15)
    fail_lane(Fault::Invalid, lane, "tensor map inner box of %u bytes is not a multiple of 16",
              inner);
  if (t.swizzle > 3)
    fail_lane(Fault::Unsupported, lane, "tensor map swizzle mode %u is not supported", t.swizzle);
  if (inner > span[t.swizzle])
    fail_lane(Fault::Invalid, lane, "tensor map inner box of %u bytes exceeds the swizzle span %u",
              inner, span[t.swizzle]);
  return t;
}
static inline u32 swz(u32 a, int mode) {
  switch (mode) {
    case 1:
      return a ^ (((a >> 7) & 1) << 4);
    case 2:
      return a ^ (((a >> 7) & 3) << 4);
    case 3:
      return a ^ (((a >> 7) & 7) << 4);
    default:
      return a;
  }
}
static u32 box_bytes(const TMap& t) {
  u32 n = ESZ[t.dtype];
  for (int k = 0; k < t.rank; k++) n *= t.box[k];
  return n;
}
// calls f(smem address, global address or 0 when outside, bytes) for pieces of at most 16 bytes
template <class F>
static void walk(const TMap& t, const i32* c, u32 smem, F f) {
  int es = ESZ[t.dtype];
  u32 inner = t.box[0] * es;
  u32 idx[5] = {0, 0, 0, 0, 0};
  u32 rows = 1;
  for (int k = 1; k < t.rank; k++) rows *= t.box[k];
  for (u32 r = 0; r < rows; r++) {
    u64 g = t.addr;
    bool in = true;
    for (int k = 1; k < t.rank; k++) {
      i64 q = (i64)c[k] + idx[k];
      if (q < 0 || q >= (i64)t.dims[k]) in = false;
      g += q * t.strides[k - 1];
    }
    for (u32 x = 0; x < inner; x += 16) {
      u32 a = swz(smem + r * inner + x, t.swizzle);
      i64 e0 = (i64)c[0] + x / es;
      int n = 16 / es, lo = 0, hi = n;
      if (e0 < 0) lo = (int)std::min<i64>(n, -e0);
      if (e0 + n > (i64)t.dims[0]) hi = (int)std::max<i64>(0, (i64)t.dims[0] - e0);
      if (!in || lo >= hi) lo = hi = 0;
      f(a, g + (e0 + lo) * es, lo * es, hi * es);
    }
    for (int k = 1; k < t.rank; k++) {
      if (++idx[k] < t.box[k]) break;
      idx[k] = 0;
    }
  }
}
static void async_visible(Exec& E, u32 a, u32 n) {
  Cta& C = *E.cta;
  memset(&C.init[a], 1, n);
  if (E.chk_race)
    for (u32 k = 0; k < n; k++) {
      C.wr_stamp[a + k] = E.now;
      C.wr_warp[a + k] = 32;
    }
}
static void red_elem(int op, Ty t, u8* g, const u8* s) {
  auto f = [&](auto x, auto y) -> decltype(x) {
    switch (op) {
      case 0:
        return x + y;
      case 1:
        return std::min(x, y);
      default:
        return std::max(x, y);
    }
  };
  switch (t) {
    case F32: {
      float x, y;
      memcpy(&x, g, 4);
      memcpy(&y, s, 4);
      x = f(x, y);
      memcpy(g, &x, 4);
      break;
    }
    case F16: {
      u16 x, y;
      memcpy(&x, g, 2);
      memcpy(&y, s, 2);
      x = f2h1(f(h2f1(x), h2f1(y)));
      memcpy(g, &x, 2);
      break;
    }
    case BF16: {
      u16 x, y;
      memcpy(&x, g, 2);
      memcpy(&y, s, 2);
      x = f2bf1(f(bf2f1(x), bf2f1(y)));
      memcpy(g, &x, 2);
      break;
    }
    case S32: {
      i32 x, y;
      memcpy(&x, g, 4);
      memcpy(&y, s, 4);
      x = f(x, y);
      memcpy(g, &x, 4);
      break;
    }
    case U32: {
      u32 x, y;
      memcpy(&x, g, 4);
      memcpy(&y, s, 4);
      x = f(x, y);
      memcpy(g, &x, 4);
      break;
    }
    case U64: {
      u64 x, y;
      memcpy(&x, g, 8);
      memcpy(&y, s, 8);
      x = f(x, y);
      memcpy(g, &x, 8);
      break;
    }
    default:
      fail(Fault::Unsupported, "bulk reduction type");
  }
}
static Ty tmap_ty(const TMap& t) {
  static const Ty T[13] = {U8, U16, U32, S32, U64, S64, F16, F32, F32, F64, BF16, F32, F32};
  return T[t.dtype];
}
static void read_source(Exec& E, TmaOp& o) {
  if (o.read_done) return;
  o.read_done = true;
  Cta& C = *E.cta;
  o.data.resize(o.bytes);
  if (o.kind == TO_STORE)
    memcpy(o.data.data(), &C.smem[o.smem], o.bytes);
  else {
    u32 k = 0;
    walk(o.tm, o.coord, o.smem, [&](u32 a, u64, u32, u32) {
      memcpy(&o.data[k], &C.smem[a], 16);
      k += 16;
    });
  }
}
static void perform(Exec& E, TmaOp& o) {
  Cta& C = *E.cta;
  Warp& w = C.warps[o.warp];
  u32 save = w.pc, sm = w.mask;
  Warp* cw = E.cur_w;
  E.cur_w = &w;
  w.pc = o.pc;
  C.progress++;
  switch (o.kind) {
    case TO_LOAD: {
      u8* g = global_ptr(E, o.gaddr, o.bytes, o.lane, "bulk copy read", false);
      ++E.now;
      memcpy(&C.smem[o.smem], g, o.bytes);
      async_visible(E, o.smem, o.bytes);
      break;
    }
    case TO_TLOAD: {
      ++E.now;
      u8 nanb[16];
      memset(nanb, 0xff, 16);
      walk(o.tm, o.coord, o.smem, [&](u32 a, u64 g, u32 lo, u32 hi) {
        u8 buf[16];
        if (o.tm.fill)
          memcpy(buf, nanb, 16);
        else
          memset(buf, 0, 16);
        if (hi > lo)
          memcpy(buf + lo, global_ptr(E, g, hi - lo, o.lane, "tensor copy read", false), hi - lo);
        memcpy(&C.smem[a], buf, 16);
        async_visible(E, a, 16);
      });
      break;
    }
    case TO_STORE: {
      read_source(E, o);
      u8* g = global_ptr(E, o.gaddr, o.bytes, o.lane, "bulk copy write", true);
      if (o.red < 0)
        memcpy(g, o.data.data(), o.bytes);
      else {
        int es = ty_size(o.rty);
        for (u32 k = 0; k < o.bytes; k += es) red_elem(o.red, o.rty, g + k, &o.data[k]);
      }
      break;
    }
    case TO_TSTORE: {
      read_source(E, o);
      u32 k = 0;
      walk(o.tm, o.coord, o.smem, [&](u32, u64 g, u32 lo, u32 hi) {
        if (hi > lo) {
          u8* p = global_ptr(E, g, hi - lo, o.lane, "tensor copy write", true);
          if (o.red < 0)
            memcpy(p, &o.data[k + lo], hi - lo);
          else {
            Ty t = tmap_ty(o.tm);
            int es = ty_size(t);
            for (u32 q = lo; q < hi; q += es) red_elem(o.red, t, p + q - lo, &o.data[k + q]);
          }
        }
        k += 16;
      });
      break;
    }
    case TO_CPARRIVE: {
      cp_async_complete(E, w, o.mask, 0, true, o.seq);
      break;
    }
  }
  if (o.kind == TO_LOAD || o.kind == TO_TLOAD) {
    MBar& b = mbar_at(E, nullptr, o.mbar, o.lane, "bulk copy completion");
    b.vc.c[32] = std::max(b.vc.c[32], E.now);
    b.tx -= o.bytes;
    mb_check(E, b);
  }
  if (o.kind == TO_CPARRIVE) {
    MBar& b = mbar_at(E, nullptr, o.mbar, o.lane, "cp.async.mbarrier.arrive");
    vc_release(E, w, b.vc);
    mb_arrive(E, b, __builtin_popcount(o.mask), o.lane);
  }
  w.pc = save;
  w.mask = sm;
  E.cur_w = cw;
}
bool tma_force(Exec& E, Cta& C) {
  if (C.tma.empty()) return false;
  size_t i = E.rnd(C.tma.size());
  TmaOp o = std::move(C.tma[i]);
  C.tma.erase(C.tma.begin() + i);
  perform(E, o);
  return true;
}
static void h_bulk(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  LANES(m) {
    TmaOp o;
    o.kind = I.op;
    o.warp = w.id;
    o.lane = lane;
    o.pc = w.pc;
    o.red = I.op2 == 0 ? -1 : I.op2 - 1;
    o.rty = I.t0;
    o.read_done = false;
    o.mask = 0;
    o.seq = 0;
    o.group = w.bulk_commit[lane];
    o.rank = I.vec;
    u64 first = addr_of(w, I, lane);
    u64 second = 0;
    if (I.b != (i32)NOREG)
      second =
          I.bs == 8 ? w.r<u64>(I.b)[lane] + I.imm2 : (u64)(u32)(w.r<u32>(I.b)[lane] + (u32)I.imm2);
    if (I.op == TO_LOAD || I.op == TO_STORE) {
      o.bytes = w.r<u32>(I.c)[lane];
      if (!o.bytes || (o.bytes & 15))
        fail_lane(Fault::Invalid, lane, "bulk copy size %u is not a positive multiple of 16",
                  o.bytes);
      o.smem = sh_addr(E, I.op == TO_LOAD ? first : second, lane, "bulk copy");
      o.gaddr = I.op == TO_LOAD ? second : first;
      if ((o.smem & 15) || (o.gaddr & 15))
        fail_lane(Fault::Alignment, lane,
                  "bulk copy addresses 0x%x / 0x%llx are not 16-byte aligned", o.smem,
                  (unsigned long long)o.gaddr);
      global_ptr(E, o.gaddr, o.bytes, lane, "bulk copy", false);
      smem_ptr(E, o.smem, o.bytes, lane, "bulk copy");
    } else {
      u64 ta = I.op == TO_TLOAD ? second : first;
      o.smem = sh_addr(E, I.op == TO_TLOAD ? first : second, lane, "tensor copy");
      o.tm = load_tmap(E, ta, lane);
      if (o.tm.rank != I.vec)
        fail_lane(Fault::Invalid, lane, "tensor copy of rank %u with a rank-%u tensor map", I.vec,
                  o.tm.rank);
      for (int k = 0; k < I.vec; k++) o.coord[k] = w.r<i32>(I.x[k])[lane];
      o.bytes = box_bytes(o.tm);
      if (o.smem & 127)
        fail_lane(Fault::Alignment, lane, "tensor copy shared address 0x%x is not 128-byte aligned",
                  o.smem);
      smem_ptr(E, o.smem, o.bytes, lane, "tensor copy");
      walk(o.tm, o.coord, o.smem, [&](u32, u64 g, u32 lo, u32 hi) {
        if (hi > lo) global_ptr(E, g, hi - lo, lane, "tensor copy", false);
      });
    }
    if (I.op == TO_LOAD || I.op == TO_TLOAD) {
      o.mbar = sh_addr(E,
                       I.ds == 8 ? w.r<u64>(I.e)[lane] + (i64)(i32)I.target
                                 : (u64)(u32)(w.r<u32>(I.e)[lane] + I.target),
                       lane, "bulk copy mbarrier");
      mbar_at(E, &w, o.mbar, lane, "bulk copy mbarrier");
      for (u32 k = 0; k < o.bytes; k += 16) sm_begin_async(E, w, o.smem + k, 16, lane, 3, I.line);
      E.st.tma_bytes += o.bytes;
      E.st.g_ld_sectors += o.bytes / 32;
    } else {
      for (u32 k = 0; k < o.bytes; k += 16) sm_read_proxy(E, w, o.smem + k, 16, lane);
      E.st.tma_store_bytes += o.bytes;
      E.st.g_st_sectors += o.bytes / 32;
    }
    C.tma.push_back(std::move(o));
    C.progress++;
  }
}
static void h_bulk_commit(Exec&, Warp& w, const Inst&, u32 m) { LANES(m) w.bulk_commit[lane]++; }
static void h_bulk_wait(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  for (size_t k = 0; k < C.tma.size();) {
    TmaOp& o = C.tma[k];
    bool mine = o.warp == (int)w.id && (o.kind == TO_STORE || o.kind == TO_TSTORE) &&
                (m >> o.lane & 1) && o.group + I.imm < w.bulk_commit[o.lane];
    if (mine && I.flag) {
      read_source(E, o);
      k++;
    } else if (mine) {
      TmaOp q = std::move(o);
      C.tma.erase(C.tma.begin() + k);
      perform(E, q);
    } else
      k++;
  }
}
static void h_cp_mbar(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  std::map<u32, u32> g;
  LANES(m) g[sh_addr(E, addr_of(w, I, lane), lane, "cp.async.mbarrier.arrive")] |= 1u << lane;
  for (auto& q : g) {
    int l = __builtin_ctz(q.second);
    MBar& b = mbar_at(E, &w, q.first, l, "cp.async.mbarrier.arrive");
    if (!I.flag) b.pending += __builtin_popcount(q.second);
    TmaOp o;
    o.kind = TO_CPARRIVE;
    o.warp = w.id;
    o.lane = l;
    o.pc = w.pc;
    o.mask = q.second;
    o.seq = w.async_seq;
    o.mbar = q.first;
    o.bytes = 0;
    o.read_done = false;
    o.group = 0;
    o.red = -1;
    C.tma.push_back(o);
  }
}
// tensormap.replace / cp_fenceproxy
enum {
  TF_ADDR,
  TF_RANK,
  TF_BOX,
  TF_DIM,
  TF_STRIDE,
  TF_ESTRIDE,
  TF_ETYPE,
  TF_INTER,
  TF_SWZ,
  TF_FILL
};
static void h_tmreplace(Exec& E, Warp& w, const Inst& I, u32 m) {
  LANES(m) {
    u64 a = addr_of(w, I, lane);
    u8* p;
    u32 sa = 0;
    if (I.sp == SP_SHARED || a - SHARED_BASE < WINDOW) {
      sa = sh_addr(E, a, lane, "tensormap.replace");
      p = smem_ptr(E, sa, 128, lane, "tensormap.replace");
      for (u32 k = 0; k < 128; k += 16) sm_read(E, w, sa + k, 16, lane);
    } else
      p = global_ptr(E, a, 128, lane, "tensormap.replace", true);
    TMap t;
    memcpy(&t, p, sizeof t);
    t.magic = TMAP_MAGIC;
    u64 v = I.flag ? (u64)I.imm2 : I.bs == 8 ? w.r<u64>(I.b)[lane] : w.r<u32>(I.b)[lane];
    int o = I.op2;
    switch (I.op) {
      case TF_ADDR:
        t.addr = v;
        break;
      case TF_RANK:
        t.rank = (u8)(v + 1);
        break;
      case TF_BOX:
        t.box[o] = v;
        break;
      case TF_DIM:
        t.dims[o] = v;
        break;
      case TF_STRIDE:
        t.strides[o] = v;
        break;
      case TF_ESTRIDE:
        t.estride[o] = v;
        break;
      case TF_ETYPE:
        t.dtype = v;
        break;
      case TF_INTER:
        t.interleave = v;
        break;
      case TF_SWZ:
        t.swizzle = v;
        break;
      default:
        t.fill = v;
    }
    if (sa) {
      u8 buf[128];
      memcpy(buf, p, 128);
      memcpy(buf, &t, sizeof t);
      for (u32 k = 0; k < 128; k += 16) sm_write(E, w, sa + k, 16, lane, buf + k);
    }
    memcpy(p, &t, sizeof t);
  }
}
static void h_tmcopy(Exec& E, Warp& w, const Inst& I, u32 m) {
  int l = __builtin_ctz(m);
  u64 g = addr_of(w, I, l),
      s = I.bs == 8 ? w.r<u64>(I.b)[l] + I.imm2 : (u64)(u32)(w.r<u32>(I.b)[l] + (u32)I.imm2);
  u32 sa = sh_addr(E, s, l, "tensormap.cp_fenceproxy");
  u8* q = smem_ptr(E, sa, 128, l, "tensormap.cp_fenceproxy");
  for (u32 k = 0; k < 128; k += 16) sm_read(E, w, sa + k, 16, l);
  if (g & 127)
    fail_lane(Fault::Alignment, l,
              "tensormap.cp_fenceproxy destination 0x%llx is not 128-byte aligned",
              (unsigned long long)g);
  memcpy(global_ptr(E, g, 128, l, "tensormap.cp_fenceproxy", true), q, 128);
}
static void h_nothing(Exec&, Warp&, const Inst&, u32) {}
bool decode_async(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.kind = K_ALU;
  auto sem = [&]() {
    for (auto s : {"release", "acquire", "relaxed", "cta", "cluster"}) d.take(s);
  };
  if (op == "mbarrier") {
    I.cls = C_MBAR;
    I.fn = h_mbar;
    size_t k = 0;
    bool init = d.take("init"), inval = d.take("inval"), arr = d.take("arrive"),
         drop = d.take("arrive_drop"), ex = d.take("expect_tx"), ct = d.take("complete_tx"),
         tr = d.take("try_wait"), te = d.take("test_wait");
    if (d.take("noComplete")) d.bad("mbarrier .noComplete");
    bool par = d.take("parity");
    sem();
    d.take("shared");
    d.take("shared::cta");
    d.take("shared::cluster");
    d.need_type();
    d.done();
    if (init) {
      I.op = MB_INIT;
      d.addr(d.op(0), I.a, I.imm, I.as);
      I.b = d.src(d.op(1), U32);
      return true;
    }
    if (inval) {
      I.op = MB_INVAL;
      d.addr(d.op(0), I.a, I.imm, I.as);
      return true;
    }
    if (arr || drop) {
      I.op = drop ? MB_DROP : MB_ARRIVE;
      I.flag = ex;
      if (d.op(0).kind != Operand::Mem) {
        if (d.op(0).kind != Operand::Sink) I.d = d.dst(d.op(0), 8);
        k = 1;
      }
      d.addr(d.op(k), I.a, I.imm, I.as);
      if (d.n() > k + 1) I.b = d.src(d.op(k + 1), U32);
      if (ex && I.b == (i32)NOREG) d.bad("expect_tx count");
      return true;
    }
    if (ex || ct) {
      I.op = ex ? MB_EXPECT : MB_COMPLETE;
      d.addr(d.op(0), I.a, I.imm, I.as);
      I.b = d.src(d.op(1), U32);
      return true;
    }
    if (tr || te) {
      I.op = tr ? MB_TRY : MB_TEST;
      I.kind = K_CTL;
      I.flag = par;
      I.d = d.dst(d.op(0), 4);
      d.addr(d.op(1), I.a, I.imm, I.as);
      I.b = d.src(d.op(2), par ? U32 : U64);
      return true;
    }
    d.bad("mbarrier form");
  }
  if (op == "cp") {
    bool red = d.take("reduce");
    if (!d.take("async")) d.bad("cp form");
    I.cls = C_TMA;
    if (d.take("mbarrier")) {
      if (!d.take("arrive")) d.bad("cp.async.mbarrier");
      I.flag = d.take("noinc");
      d.take("shared");
      d.take("shared::cta");
      d.need_type();
      d.done();
      d.addr(d.op(0), I.a, I.imm, I.as);
      I.cls = C_MBAR;
      I.fn = h_cp_mbar;
      return true;
    }
    if (!d.take("bulk")) d.bad("cp form");
    if (d.take("commit_group")) {
      d.done();
      I.fn = h_bulk_commit;
      return true;
    }
    if (d.take("wait_group")) {
      I.flag = d.take("read");
      d.done();
      I.imm = d.immval(d.op(0));
      I.fn = h_bulk_wait;
      return true;
    }
    bool pre = d.take("prefetch"), tens = d.take("tensor");
    int rank = 0;
    for (int q = 1; q <= 5; q++)
      if (d.take((std::to_string(q) + "d").c_str())) rank = q;
    if (pre) {
      I.fn = h_nothing;
      return true;
    }
    bool mb = d.take("mbarrier::complete_tx::bytes"), bg = d.take("bulk_group");
    if (d.take("multicast::cluster")) d.bad("multicast");
    bool pol = d.take("L2::cache_hint");
    d.take("tile");
    if (d.take("im2col")) d.bad("im2col");
    bool sc = d.take("shared::cluster"), sa = d.take("shared::cta"), gl = d.take("global");
    d.take("cta_group::1");
    if (sc && sa) d.bad("shared to shared bulk copy");
    if (!gl || !(sc || sa)) d.bad("bulk copy spaces");
    if (red) {
      I.op2 = d.take("add") ? 1 : d.take("min") ? 2 : d.take("max") ? 3 : 0;
      if (!I.op2) d.bad("bulk reduction");
      d.take("noftz");
      if (!tens) I.t0 = d.need_type();
    }
    d.done();
    I.vec = rank;
    I.fn = h_bulk;
    (void)pol;
    if (mb == bg) d.bad("bulk completion mechanism");
    bool load = mb;
    u8 s2 = 0;
    if (tens) {
      const Operand& tm = d.op(load ? 1 : 0);
      if (tm.kind != Operand::Mem || tm.el.size() != 2 || tm.el[1].kind != Operand::Vec ||
          (int)tm.el[1].el.size() != rank)
        d.bad("tensor coordinates");
      for (auto& e : tm.el[1].el) I.x.push_back(d.src(e, B32));
      I.op = load ? TO_TLOAD : TO_TSTORE;
      d.addr(d.op(0), I.a, I.imm, I.as);
      i64 o2;
      d.addr(d.op(1), I.b, o2, s2);
      I.imm2 = o2;
      I.bs = s2;
      if (load) {
        i64 o3;
        u8 s3;
        d.addr(d.op(2), I.e, o3, s3);
        I.target = (u32)o3;
        I.ds = s3;
      }
      return true;
    }
    I.op = load ? TO_LOAD : TO_STORE;
    d.addr(d.op(0), I.a, I.imm, I.as);
    i64 o2;
    d.addr(d.op(1), I.b, o2, s2);
    I.imm2 = o2;
    I.bs = s2;
    I.c = d.src(d.op(2), U32);
    if (load) {
      i64 o3;
      u8 s3;
      d.addr(d.op(3), I.e, o3, s3);
      I.target = (u32)o3;
      I.ds = s3;
    }
    return true;
  }
  if (op == "tensormap") {
    I.cls = C_TMA;
    if (d.take("cp_fenceproxy")) {
      for (auto s : {"global", "shared::cta", "tensormap::generic", "release", "gpu", "cta",
                     "cluster", "sys", "sync", "aligned"})
        d.take(s);
      d.done();
      d.addr(d.op(0), I.a, I.imm, I.as);
      i64 o2;
      u8 s2;
      d.addr(d.op(1), I.b, o2, s2);
      I.imm2 = o2;
      I.bs = s2;
      I.sync = 1;
      I.fn = h_tmcopy;
      return true;
    }
    if (!d.take("replace")) d.bad("tensormap form");
    d.take("tile");
    static const char* F[] = {"global_address", "rank",           "box_dim",  "global_dim",
                              "global_stride",  "element_stride", "elemtype", "interleave_layout",
                              "swizzle_mode",   "fill_mode"};
    int f = -1;
    for (int q = 0; q < 10; q++)
      if (d.take(F[q])) f = q;
    if (f < 0) d.bad("tensormap field");
    I.op = f;
    if (d.take("global"))
      I.sp = SP_GLOBAL;
    else if (d.take("shared::cta") || d.take("shared"))
      I.sp = SP_SHARED;
    d.take("b1024");
    Ty t = d.need_type();
    d.done();
    d.addr(d.op(0), I.a, I.imm, I.as);
    size_t k = 1;
    I.op2 = 0;
    if (f >= TF_BOX && f <= TF_ESTRIDE) {
      I.op2 = d.immval(d.op(k++));
      if (I.op2 > 4) d.bad("ordinal");
    }
    const Operand& v = d.op(k);
    if (v.kind == Operand::Imm) {
      I.flag = true;
      I.imm2 = d.immval(v);
    } else {
      I.bs = ty_size(t);
      I.b = d.src(v, t);
    }
    I.fn = h_tmreplace;
    return true;
  }
  return false;
}
}  // namespace vsim
