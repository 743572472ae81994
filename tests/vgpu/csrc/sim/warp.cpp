// Warp-level communication (shfl, vote, match, redux, elect) and CTA barriers.
#include "fp.h"
namespace vsim {
static u32 member(Warp& w, const Inst& I, u32 m) {
  const u32* mm = w.r<u32>(I.memb);
  u32 v = mm[__builtin_ctz(m)];
  LANES(m) {
    if (mm[lane] != v)
      fail_lane(Fault::Barrier, lane,
                "lanes executing a .sync instruction together have different member masks (0x%08x, "
                "0x%08x)",
                v, mm[lane]);
    if (!(mm[lane] >> lane & 1))
      fail_lane(Fault::Barrier, lane,
                "lane %u executes a .sync instruction but is not in its member mask 0x%08x", lane,
                v);
  }
  u32 need = v & w.live;
  if (need & ~m)
    fail_lane(
        Fault::Barrier, __builtin_ctz(need & ~m),
        ".sync instruction: lanes 0x%08x of member mask 0x%08x do not take part (predicated off)",
        need & ~m, v);
  return v;
}
static void h_shfl(Exec&, Warp& w, const Inst& I, u32 m) {
  member(w, I, m);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b), *c = w.r<u32>(I.c);
  u32 t[32], pr = 0;
  LANES(m) {
    u32 bv = b[lane] & 31, cv = c[lane] & 31, mk = (c[lane] >> 8) & 31;
    int l = lane, mx = (l & mk) | (cv & ~mk), mn = l & mk, j;
    bool p;
    switch (I.op) {
      case 0:
        j = l - (int)bv;
        p = j >= mx;
        break;
      case 1:
        j = l + bv;
        p = j <= mx;
        break;
      case 2:
        j = l ^ bv;
        p = j <= mx;
        break;
      default:
        j = mn | (bv & ~mk);
        p = j <= mx;
    }
    if (!p) j = l;
    if (j < 0 || j > 31) j = l;
    t[lane] = (m >> j & 1) ? a[j] : 0xffbad5fbu;  // value of a non-participating lane is undefined
    pr |= (u32)p << lane;
  }
  if (I.d != NOREG) {
    u32* d = w.r<u32>(I.d);
    LANES(m) d[lane] = t[lane];
  }
  if (I.e != NOREG) {
    u32& e = w.pr(I.e);
    e = (e & ~m) | pr;
  }
}
static void h_vote(Exec&, Warp& w, const Inst& I, u32 m) {
  member(w, I, m);
  u32 p = w.pr(I.a);
  if (I.neg) p = ~p;
  p &= m;
  if (I.op == 3) {
    u32* d = w.r<u32>(I.d);
    LANES(m) d[lane] = p;
    return;
  }
  bool r = I.op == 0 ? p == m : I.op == 1 ? p != 0 : (p == m || p == 0);
  u32& d = w.pr(I.d);
  d = (d & ~m) | (r ? m : 0);
}
static void h_activemask(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  LANES(m) d[lane] = m;
}
static void h_match(Exec&, Warp& w, const Inst& I, u32 m) {
  member(w, I, m);
  auto val = [&](u32 l) -> u64 { return I.sz == 8 ? w.r<u64>(I.a)[l] : w.r<u32>(I.a)[l]; };
  u32 r[32];
  if (I.op == 0) {
    LANES(m) {
      u64 v = val(lane);
      u32 q = 0;
      for (u32 k = 0; k < 32; k++)
        if ((m >> k & 1) && val(k) == v) q |= 1u << k;
      r[lane] = q;
    }
    LANES(m) w.r<u32>(I.d)[lane] = r[lane];
  } else {
    bool all = true;
    u64 v = val(__builtin_ctz(m));
    LANES(m) if (val(lane) != v) all = false;
    LANES(m) w.r<u32>(I.d)[lane] = all ? m : 0;
    if (I.e != NOREG) {
      u32& e = w.pr(I.e);
      e = (e & ~m) | (all ? m : 0);
    }
  }
}
static void h_redux(Exec&, Warp& w, const Inst& I, u32 m) {
  member(w, I, m);
  const u32* a = w.r<u32>(I.a);
  u32 r = a[__builtin_ctz(m)];
  bool first = true;
  LANES(m) {
    if (first) {
      first = false;
      continue;
    }
    u32 x = a[lane];
    switch (I.op) {
      case 0:
        r += x;
        break;
      case 1:
        r &= x;
        break;
      case 2:
        r |= x;
        break;
      case 3:
        r ^= x;
        break;
      case 4:
        r = I.t0 == S32 ? (u32)std::min((i32)r, (i32)x) : std::min(r, x);
        break;
      default:
        r = I.t0 == S32 ? (u32)std::max((i32)r, (i32)x) : std::max(r, x);
    }
  }
  u32* d = w.r<u32>(I.d);
  LANES(m) d[lane] = r;
}
static void h_elect(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 v = member(w, I, m) & m;
  u32 l = __builtin_ctz(v);
  if (I.d != NOREG) {
    u32* d = w.r<u32>(I.d);
    LANES(m) d[lane] = l;
  }
  u32& e = w.pr(I.e);
  e = (e & ~m) | (1u << l);
}
static void h_warpsync(Exec& E, Warp& w, const Inst& I, u32 m) {
  (void)E;
  member(w, I, m);
  w.wsync = w.serial;
}
static void h_yield(Exec&, Warp& w, const Inst&, u32) { w.ctl = CTL_YIELD; }

// CTA barriers
static void complete(Exec& E, Cta& C, Barrier& b) {
  for (auto& x : b.waiting) {
    Warp& w = C.warps[x.warp];
    const Inst& I = E.code[x.pc];
    if (I.op == 2) {
      if (I.op2 == 0) {
        u32* d = w.r<u32>(I.d);
        LANES(x.mask) d[lane] = b.red_popc;
      } else {
        u32& d = w.pr(I.d);
        bool v = I.op2 == 1 ? b.red_and : b.red_or;
        d = (d & ~x.mask) | (v ? x.mask : 0);
      }
    }
    vc_acquire(w, b.vc);
    for (auto& g : w.others)
      if (g.st == G_WBAR && g.pc == x.pc && g.mask == x.mask) {
        g.st = G_READY;
        g.pc++;
      }
    w.blocked = false;
  }
  b = Barrier();
  memset(&b.vc, 0, sizeof b.vc);
  C.progress++;
  E.st.barriers++;
}
static bool full(Cta& C, const Barrier& b) {
  return b.implicit ? b.lanes >= C.live_threads : b.arrived >= b.expect;
}
void check_barriers(Exec& E, Cta& C) {
  for (auto& b : C.bars)
    if (b.active && b.implicit && C.live_threads && full(C, b)) complete(E, C, b);
}
static void h_bar(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  u32 l0 = __builtin_ctz(m);
  u32 id = w.r<u32>(I.a)[l0];
  LANES(m)
  if (w.r<u32>(I.a)[lane] != id)
    fail_lane(Fault::Barrier, lane, "barrier id differs between lanes");
  w.wsync = w.serial;
  if (id > 15) fail(Fault::Barrier, "barrier id %u > 15", id);
  Barrier& b = C.bars[id];
  bool implicit = I.b == NOREG;
  u32 cnt = implicit ? 0 : w.r<u32>(I.b)[l0];
  if (I.aligned && m != w.live)
    fail(Fault::Barrier,
         "divergent barrier: %s executed by lanes 0x%08x while lanes 0x%08x of the warp are live",
         I.op == 1 ? "bar.arrive" : "bar.sync", m, w.live);
  if (!implicit && (cnt == 0 || cnt % 32))
    fail(Fault::Barrier, "barrier thread count %u is not a positive multiple of 32", cnt);
  if (!b.active) {
    b.active = true;
    b.implicit = implicit;
    b.expect = cnt;
    memset(&b.vc, 0, sizeof b.vc);
  } else if (b.implicit != implicit || b.expect != cnt)
    fail(Fault::Barrier, "barrier %u used with different thread counts (%u, %u) in one phase", id,
         b.implicit ? C.live_threads : b.expect, implicit ? C.live_threads : cnt);
  b.arrived += I.aligned ? 32 : __builtin_popcount(m);
  b.lanes += __builtin_popcount(m);
  vc_release(E, w, b.vc);
  if (!b.implicit && b.arrived > b.expect)
    fail(Fault::Barrier, "barrier %u: more threads (%u) arrive than its count %u", id, b.arrived,
         b.expect);
  if (I.op == 2) {
    u32 p = w.pr(I.c);
    if (I.neg) p = ~p;
    p &= m;
    b.red_popc += __builtin_popcount(p);
    if (p != m) b.red_and = 0;
    if (p) b.red_or = 1;
  }
  if (I.op == 1) {
    w.ctl = CTL_YIELD;
    if (full(C, b)) complete(E, C, b);
    return;
  }
  // the running group becomes a waiting group
  w.others.push_back({w.pc, m, G_WBAR, id});
  b.waiting.push_back({(int)w.id, m, w.pc});
  if (m != w.mask) {
    w.others.push_back({w.pc + 1, w.mask & ~m, G_READY, 0});
  }
  w.ctl = CTL_BLOCK;
  if (full(C, b)) complete(E, C, b);
}
static void h_cluster_arrive(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  if (C.cl_arrived == 0) memset(&C.cl_vc, 0, sizeof C.cl_vc);
  vc_release(E, w, C.cl_vc);
  w.cl_phase = C.cl_phase;
  C.cl_arrived += __builtin_popcount(m);
  if (C.cl_arrived >= C.live_threads) {
    C.cl_arrived = 0;
    C.cl_phase++;
    C.cl_done = C.cl_vc;
    C.progress++;
  }
}
static void h_cluster_wait(Exec& E, Warp& w, const Inst& I, u32 m) {
  Cta& C = *E.cta;
  if (C.cl_phase > w.cl_phase) {
    vc_acquire(w, C.cl_done);
    w.wsync = w.serial;
    w.ctl = CTL_NEXT;
  } else {
    w.ctl = CTL_STAY;
    w.spinning = true;
    w.spin_epoch = C.progress;
  }
}

bool decode_warp(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.kind = K_ALU;
  auto memb = [&](const Operand& o) {
    I.memb = d.src(o, B32);
    I.sync = 2;
  };
  if (op == "shfl") {
    if (!d.take("sync")) d.bad("shfl without .sync");
    I.op = d.take("up") ? 0 : d.take("down") ? 1 : d.take("bfly") ? 2 : d.take("idx") ? 3 : 9;
    if (I.op == 9) d.bad("shfl mode");
    d.need_type();
    d.done();
    size_t k = 1;
    if (d.op(0).kind != Operand::Sink) I.d = d.dst(d.op(0), 4);
    if (d.P.pipe == 0) {
      I.e = d.pred(d.op(1), nullptr);
      k = 2;
    }
    I.a = d.src(d.op(k), B32);
    I.b = d.src(d.op(k + 1), B32);
    I.c = d.src(d.op(k + 2), B32);
    memb(d.op(k + 3));
    I.cls = C_SHFL;
    I.fn = h_shfl;
    return true;
  }
  if (op == "vote") {
    if (!d.take("sync")) d.bad("vote without .sync");
    I.op = d.take("all") ? 0 : d.take("any") ? 1 : d.take("uni") ? 2 : d.take("ballot") ? 3 : 9;
    if (I.op == 9) d.bad("vote");
    d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.pred(d.op(1), &I.neg);
    memb(d.op(2));
    I.cls = C_VOTE;
    I.fn = h_vote;
    return true;
  }
  if (op == "activemask") {
    d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.cls = C_VOTE;
    I.fn = h_activemask;
    return true;
  }
  if (op == "match") {
    I.op = d.take("all") ? 1 : (d.take("any"), 0);
    d.take("sync");
    Ty t = d.need_type();
    d.done();
    I.sz = ty_size(t);
    I.d = d.dst(d.op(0), 4);
    size_t k = 1;
    if (d.P.pipe == 0) {
      I.e = d.pred(d.op(1), nullptr);
      k = 2;
    }
    I.a = d.src(d.op(k), t);
    memb(d.op(k + 1));
    I.cls = C_VOTE;
    I.fn = h_match;
    return true;
  }
  if (op == "redux") {
    d.take("sync");
    static const char* nm[] = {"add", "and", "or", "xor", "min", "max"};
    int o = -1;
    for (int k = 0; k < 6; k++)
      if (d.take(nm[k])) o = k;
    if (o < 0) d.bad("redux");
    I.op = o;
    I.t0 = d.need_type();
    if (ty_size(I.t0) != 4 || I.t0 == F32) d.bad("redux type");
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), I.t0);
    memb(d.op(2));
    I.cls = C_VOTE;
    I.fn = h_redux;
    return true;
  }
  if (op == "elect") {
    d.take("sync");
    d.done();
    if (d.P.pipe != 0) d.bad("elect");
    if (d.op(0).kind != Operand::Sink) I.d = d.dst(d.op(0), 4);
    I.e = d.pred(d.op(1), nullptr);
    memb(d.op(2));
    I.cls = C_VOTE;
    I.fn = h_elect;
    return true;
  }
  if (op == "nanosleep") {
    d.need_type();
    d.done();
    I.kind = K_CTL;
    I.fn = h_yield;
    return true;
  }
  if (op == "bar" && d.take("warp")) {
    d.take("sync");
    d.done();
    memb(d.op(0));
    I.cls = C_BAR;
    I.fn = h_warpsync;
    return true;
  }
  if (op == "bar" || op == "barrier") {
    I.cls = C_BAR;
    if (d.take("cluster")) {
      bool arr = d.take("arrive"), wt = d.take("wait");
      d.take("relaxed");
      d.take("acquire");
      d.take("release");
      I.aligned = d.take("aligned");
      d.done();
      I.sync = I.aligned ? 1 : 0;
      if (arr) {
        I.fn = h_cluster_arrive;
        return true;
      }
      if (wt) {
        I.kind = K_CTL;
        I.fn = h_cluster_wait;
        return true;
      }
      d.bad("barrier.cluster");
    }
    d.take("cta");
    bool al = d.take("aligned");
    I.aligned = op == "bar" || al;
    I.sync = I.aligned ? 1 : 0;
    I.kind = K_CTL;
    I.fn = h_bar;
    size_t k = 0;
    if (d.take("sync")) {
      I.op = 0;
      d.done();
    } else if (d.take("arrive")) {
      I.op = 1;
      d.done();
    } else if (d.take("red")) {
      I.op = 2;
      I.op2 = d.take("popc") ? 0 : d.take("and") ? 1 : d.take("or") ? 2 : 9;
      if (I.op2 == 9) d.bad("bar.red");
      d.need_type();
      d.done();
      I.d = d.dst(d.op(0), 4);
      k = 1;
    } else
      d.bad("barrier form");
    I.a = d.src(d.op(k), U32);
    size_t n = d.n() - (I.op == 2 ? 1 : 0);
    if (n > k + 1) I.b = d.src(d.op(k + 1), U32);
    if (I.op == 2) I.c = d.pred(d.op(d.n() - 1), &I.neg);
    if (I.op == 1 && I.b == NOREG) d.bad("bar.arrive needs a count");
    return true;
  }
  return false;
}
}  // namespace vsim
