// Warp scheduler: independent thread scheduling inside a warp (lowest-PC group first,
// *.sync instructions wait for their member lanes), seeded random interleaving of warps,
// CTAs in seeded order, round-robin between CTAs that stop making progress.
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
namespace vsim {
std::string thread_name(Exec& E, Warp& w, int lane) {
  u32 t = w.tid0 + std::max(lane, 0);
  const u32* b = E.cfg.block;
  return strf("CTA (%u,%u,%u) warp %u lane %d thread (%u,%u,%u)", E.cta->idx[0], E.cta->idx[1],
              E.cta->idx[2], w.id, lane, t % b[0], t / b[0] % b[1], t / (b[0] * b[1]));
}
static std::string where(Exec& E, u32 pc) {
  u32 l = E.code[pc].line;
  return strf("line %u: %s", l, line_text(*E.M, l).c_str());
}

static bool pick_group(Exec& E, Warp& w, bool rnd = false) {
  auto& o = w.others;
  if (w.has_cur) {
    o.push_back({w.pc, w.mask, G_READY, 0});
    w.has_cur = false;
  }
  for (size_t i = 0; i < o.size(); i++) {
    if (o[i].st == G_WBAR) continue;
    for (size_t j = i + 1; j < o.size();)
      if (o[j].pc == o[i].pc && o[j].st != G_WBAR) {
        o[i].mask |= o[j].mask;
        o[i].st = G_READY;
        o.erase(o.begin() + j);
      } else
        j++;
    if (o[i].st == G_WSYNC && !(o[i].need & w.live & ~o[i].mask)) o[i].st = G_READY;
  }
  int best = -1, nready = 0;
  for (size_t i = 0; i < o.size(); i++)
    if (o[i].st == G_READY) {
      nready++;
      if (best < 0 || o[i].pc < o[best].pc) best = i;
    }
  if (best < 0) {
    if (o.empty()) {
      w.done = true;
      return false;
    }
    bool bar = false;
    for (auto& g : o)
      if (g.st == G_WBAR) bar = true;
    if (bar) {
      w.blocked = true;
      return false;
    }
    // bar.warp.sync may be reached at different PCs
    for (auto& g : o) {
      const Inst& I = E.code[g.pc];
      if (I.cls != C_BAR || I.sync != 2) continue;
      u32 have = 0;
      for (auto& h : o) {
        const Inst& J = E.code[h.pc];
        if (J.fn == I.fn && h.need == g.need) have |= h.mask;
      }
      if (!(g.need & w.live & ~have)) {
        u32 need = g.need;
        for (auto& h : o)
          if (E.code[h.pc].fn == I.fn && h.need == need) {
            E.count[h.pc]++;
            h.pc++;
            h.st = G_READY;
          }
        return pick_group(E, w, rnd);
      }
    }
    std::string s = "warp divergence deadlock: no lane of the warp can proceed;";
    for (auto& g : o)
      s += strf("\n      lanes 0x%08x wait for lanes 0x%08x at %s", g.mask, g.need & w.live,
                where(E, g.pc).c_str());
    w.pc = o[0].pc;
    w.mask = o[0].mask;
    throw SimError{Fault::Deadlock, s, (int)__builtin_ctz(o[0].mask)};
  }
  if (rnd && nready > 1) {
    int k = E.rnd(nready);
    for (size_t i = 0; i < o.size(); i++)
      if (o[i].st == G_READY && k-- == 0) {
        best = i;
        break;
      }
  }
  w.pc = o[best].pc;
  w.mask = o[best].mask;
  w.has_cur = true;
  o.erase(o.begin() + best);
  w.minother = 0xffffffff;
  for (auto& g : o)
    if (g.st != G_WBAR) w.minother = std::min(w.minother, g.pc);
  w.fair = rnd && nready > 1;
  w.since = 0;
  w.blocked = false;
  return true;
}
static void do_exit(Exec& E, Warp& w, u32 m) {
  Cta& C = *E.cta;
  w.live &= ~m;
  w.mask &= ~m;
  C.live_threads -= __builtin_popcount(m);
  C.progress++;
  if (!w.mask) w.has_cur = false;
  check_barriers(E, C);
}
static void do_call(Exec& E, Warp& w, const Inst& I, u32 m) {
  u32 next = w.pc + 1, lb = E.local_bytes;
  Module& M = *E.M;
  int fi = I.target;
  u32 rest = w.mask & ~m;
  if (I.flag) {  // indirect: lanes with the same target go together, the others retry this
                 // instruction
    u32 l0 = __builtin_ctz(m);
    u64 t = w.r<u64>(I.a)[l0];
    fi = (int)((t - FUNC_BASE) / 16);
    if (t < FUNC_BASE || (t & 15) || (size_t)fi >= M.funcs.size())
      fail_lane(Fault::Invalid, l0, "indirect call to 0x%llx, which is not a function",
                (unsigned long long)t);
    u32 g = 0;
    LANES(m) if (w.r<u64>(I.a)[lane] == t) g |= 1u << lane;
    if (m & ~g) {
      w.others.push_back({w.pc, m & ~g, G_READY, 0});
      w.minother = 0;
    }
    m = g;
  }
  Function& G = *M.funcs[fi];
  if (!G.decoded) fail(Fault::Unsupported, "call of %s, which has no decoded body", G.name.c_str());
  if (I.flag && ((size_t)I.imm != G.params.size() || I.x.size() / 3 - I.imm != G.rets.size()))
    fail(Fault::Invalid, "indirect call: argument count of %s differs", G.name.c_str());
  LANES(m) {
    if (M.code_func[w.pc] == fi)
      fail_lane(Fault::Unsupported, lane, "recursive call of %s is not supported", G.name.c_str());
    for (u32 r : w.ret[lane])
      if (M.code_func[r] == fi)
        fail_lane(Fault::Unsupported, lane, "recursive call of %s is not supported",
                  G.name.c_str());
    u8* L = w.local + (size_t)lane * lb;
    for (i64 k = 0; k < I.imm; k++) {
      u32 to = I.flag ? (u32)M.syms[G.params[k].sym].addr : I.x[3 * k + 1];
      if (I.flag && (u32)I.x[3 * k + 2] != G.params[k].size)
        fail_lane(Fault::Invalid, lane, "indirect call: argument size of %s differs",
                  G.name.c_str());
      memcpy(L + to, L + I.x[3 * k], I.x[3 * k + 2]);
    }
    w.ret[lane].push_back(next);
  }
  if (rest) {
    w.others.push_back({next, rest, G_READY, 0});
    w.minother = 0;
  }
  w.mask = m;
  w.pc = G.pc0;
}
static void do_ret(Exec& E, Warp& w, u32 m) {
  u32 rest = w.mask & ~m, pc = w.pc;
  u32 lb = E.local_bytes;
  bool first = true;
  u32 npc = 0, nmask = 0;
  (void)npc;
  LANES(m) {
    u32 r = w.ret[lane].back();
    w.ret[lane].pop_back();
    const Inst& I = E.code[r - 1];
    u8* L = w.local + (size_t)lane * lb;
    Function& G = *E.M->funcs[E.M->code_func[pc]];
    for (size_t k = I.imm; 3 * k < I.x.size(); k++)
      memcpy(L + I.x[3 * k + 1],
             L + (I.flag ? (i32)E.M->syms[G.rets[k - I.imm].sym].addr : I.x[3 * k]),
             I.x[3 * k + 2]);
    if (first) {
      npc = r;
      nmask = 1u << lane;
      first = false;
    } else if (r == npc)
      nmask |= 1u << lane;
    else {
      bool f = false;
      for (auto& g : w.others)
        if (g.pc == r && g.st == G_READY) {
          g.mask |= 1u << lane;
          f = true;
          break;
        }
      if (!f) w.others.push_back({r, 1u << lane, G_READY, 0});
    }
  }
  if (rest) w.others.push_back({pc + 1, rest, G_READY, 0});
  w.pc = npc;
  w.mask = nmask;
  w.minother = w.others.empty() ? 0xffffffff : 0;
}
// returns number of instructions executed
static u32 run_warp(Exec& E, Warp& w, u32 quantum) {
  if (!w.has_cur && !pick_group(E, w)) return 0;
  const Inst* code = E.code;
  u64* count = E.count.data();
  u64 ti = 0;
  u32 wi = 0, off = 0;
  E.cur_w = &w;
  while (wi < quantum) {
    const Inst& I = code[w.pc];
    u32 m = w.mask;
    if (I.guard != NOREG) {
      u32 p = w.pr(I.guard);
      m &= I.guard_neg ? ~p : p;
    }
    if (I.sync && w.mask != w.live) {
      u32 need = w.live;
      if (I.sync == 2) {
        need = 0;
        LANES(m) need |= w.r<u32>(I.memb)[lane];
        need &= w.live;
      }
      if (need & ~w.mask) {
        w.others.push_back({w.pc, w.mask, G_WSYNC, need});
        w.has_cur = false;
        if (!pick_group(E, w)) break;
        continue;
      }
    }
    wi++;
    w.serial++;
    if (m) {
      count[w.pc]++;
      ti += __builtin_popcount(m);
    } else
      off++;
    if (__builtin_expect(w.wg_any, 0) && wgmma_check(E, w, I, m)) {
      w.pc++;
      continue;
    }
    switch (I.kind) {
      case K_ALU:
        if (I.sync == 2 && m) {  // lanes with different member masks form separate groups
          const u32* mm = w.r<u32>(I.memb);
          u32 left = m;
          while (left) {
            u32 v = mm[__builtin_ctz(left)], g = 0;
            LANES(left) if (mm[lane] == v) g |= 1u << lane;
            left &= ~g;
            I.fn(E, w, I, g);
          }
        } else if (m)
          I.fn(E, w, I, m);
        w.pc++;
        break;
      case K_NOP:
        w.pc++;
        break;
      case K_BRA:
        if (m == w.mask)
          w.pc = I.target;
        else if (!m)
          w.pc++;
        else {
          E.st.divergent_branches++;
          w.others.push_back({I.target, m, G_READY, 0});
          w.mask &= ~m;
          w.pc++;
          w.minother = 0;
        }
        break;
      case K_BRX: {
        if (!m) {
          w.pc++;
          break;
        }
        u32 left = m, fall = w.mask & ~m;
        bool first = true;
        u32 npc = 0, nm = 0;
        while (left) {
          u32 l = __builtin_ctz(left), k = w.r<u32>(I.a)[l];
          if (k >= I.x.size()) fail_lane(Fault::Invalid, l, "brx.idx index %u out of range", k);
          u32 g = 0;
          LANES(left) if (w.r<u32>(I.a)[lane] == k) g |= 1u << lane;
          left &= ~g;
          if (first) {
            npc = I.x[k];
            nm = g;
            first = false;
          } else
            w.others.push_back({(u32)I.x[k], g, G_READY, 0});
        }
        if (fall) w.others.push_back({w.pc + 1, fall, G_READY, 0});
        w.pc = npc;
        w.mask = nm;
        if (!w.others.empty()) w.minother = 0;
        break;
      }
      case K_CALL:
        if (m)
          do_call(E, w, I, m);
        else
          w.pc++;
        break;
      case K_RET:
        if (m) {
          bool top = true;
          LANES(m) if (!w.ret[lane].empty()) top = false;
          if (top) {
            do_exit(E, w, m);
            if (w.has_cur) w.pc++;
          } else
            do_ret(E, w, m);
        } else
          w.pc++;
        break;
      case K_EXIT:
        if (m) {
          do_exit(E, w, m);
          if (w.has_cur) w.pc++;
        } else
          w.pc++;
        break;
      case K_CTL: {
        if (!m) {
          w.pc++;
          break;
        }
        w.ctl = CTL_NEXT;
        I.fn(E, w, I, m);
        if (w.ctl == CTL_BLOCK) {
          w.has_cur = false;
          pick_group(E, w);
          goto out;
        }
        if (w.ctl == CTL_STAY) {
          if (!w.others.empty()) {
            w.spinning = false;
            pick_group(E, w, true);
          }
          goto out;
        }
        w.pc++;
        if (w.ctl == CTL_YIELD) {
          if (w.minother != 0xffffffff) {
            bool rd = false;
            for (auto& g : w.others)
              if (g.st == G_READY) rd = true;
            if (rd) {
              w.spinning = false;
              pick_group(E, w, true);
            }
          }
          goto out;
        }
        break;
      }
    }
    if (!w.has_cur) {
      if (!pick_group(E, w)) break;
      continue;
    }
    if (w.pc >= w.minother) {
      if (!pick_group(E, w)) break;
    } else if (w.minother != 0xffffffff) {
      w.since++;
      if (w.fair) {
        bool same = false;
        for (auto& g : w.others)
          if (g.pc == w.pc && g.st != G_WBAR) same = true;
        if (same || w.since > 200) {
          if (!pick_group(E, w)) break;
        }
      } else if (w.since > 20000) {
        if (!pick_group(E, w, true)) break;
      }
    }
  }
out:
  E.st.warp_insts += wi;
  E.st.thread_insts += ti;
  E.st.predicated_off += off;
  E.clock += wi;
  return wi;
}
static void setup_warp_buffers(Exec& E, Warp& w) {
  Module& M = *E.M;
  u32 below = SR_BYTES + M.const_bytes;
  below = (below + 63) / 64 * 64;
  u32 frame = E.F->base + E.F->frame;
  for (auto& f : M.funcs)
    if (f->decoded && !f->entry) frame = std::max(frame, f->base + f->frame);
  size_t n = below + frame + 1024;
  w.buf = (u8*)aligned_alloc(64, (n + 63) / 64 * 64);
  w.R = w.buf + below;
  for (auto& c : M.consts) {
    u64 lo = c.lo, hi = c.hi;
    if (c.sym >= 0) {
      const Symbol& y = M.syms[c.sym];
      u64 a = y.sp == SP_SHARED ? E.smem_addr[c.sym]
              : y.thread_param  ? LOCAL_BASE + y.addr
                                : y.addr;
      if (y.is_func && y.func >= 0) a = FUNC_BASE + 16ull * y.func;
      lo = a + c.addend;
      if (y.sp == SP_SHARED && !a) lo = 0;
    }
    u8* p = w.R - SR_BYTES - c.off;
    for (int l = 0; l < 32; l++) {
      memcpy(p + l * c.size, &lo, std::min<int>(c.size, 8));
      if (c.size == 16) memcpy(p + l * 16 + 8, &hi, 8);
    }
  }
  w.local = (u8*)malloc((size_t)E.local_bytes * 32 + 64);
}
static void init_cta(Exec& E, Cta& C, u64 lin) {
  const u32* g = E.cfg.grid;
  const u32* b = E.cfg.block;
  C.lin = lin;
  C.idx[0] = lin % g[0];
  C.idx[1] = lin / g[0] % g[1];
  C.idx[2] = lin / ((u64)g[0] * g[1]);
  u32 nt = b[0] * b[1] * b[2], nw = (nt + 31) / 32;
  bool fresh = C.warps.empty();
  if (fresh) {
    C.warps.resize(nw);
    for (auto& w : C.warps) setup_warp_buffers(E, w);
  }
  C.smem_size = SMEM_START + E.st.smem_static + E.st.smem_dynamic;
  C.smem.assign(C.smem_size + 64, 0xcd);
  for (auto& x : C.bars) {
    x = Barrier();
    memset(&x.vc, 0, sizeof x.vc);
  }
  C.mbars.clear();
  C.tma.clear();
  C.cl_arrived = C.cl_phase = 0;
  C.live_threads = nt;
  C.done = false;
  C.progress = 0;
  C.started = true;
  for (u32 k = 0; k < nw; k++) {
    Warp& w = C.warps[k];
    w.id = k;
    w.tid0 = k * 32;
    u32 n = std::min(32u, nt - k * 32);
    w.live = w.mask = n == 32 ? FULL : (1u << n) - 1;
    w.pc = E.F->pc0;
    w.has_cur = true;
    w.others.clear();
    w.minother = 0xffffffff;
    w.done = w.blocked = w.spinning = w.fair = false;
    w.since = 0;
    for (auto& r : w.ret) r.clear();
    w.async.clear();
    memset(w.commit_cnt, 0, sizeof w.commit_cnt);
    w.wg.clear();
    w.wg_any = false;
    w.wg_commit = 0;
    w.wgmap.clear();
    memset(w.bulk_commit, 0, sizeof w.bulk_commit);
    w.async_seq = 0;
    w.cl_phase = 0;
    memset(w.R, 0xcd, E.F->base + E.F->frame);
    memset(w.local, 0xcd, (size_t)E.local_bytes * 32);
    auto set = [&](int s, auto f) {
      u32* p = (u32*)(w.R + sr_off(s));
      for (u32 l = 0; l < 32; l++) p[l] = f(l);
    };
    auto cst = [&](int s, u32 v) { set(s, [v](u32) { return v; }); };
    set(SR_TIDX, [&](u32 l) { return (w.tid0 + l) % b[0]; });
    set(SR_TIDY, [&](u32 l) { return (w.tid0 + l) / b[0] % b[1]; });
    set(SR_TIDZ, [&](u32 l) { return (w.tid0 + l) / (b[0] * b[1]); });
    for (int q = 0; q < 3; q++) {
      cst(SR_NTIDX + q, b[q]);
      cst(SR_CTAIDX + q, C.idx[q]);
      cst(SR_NCTAIDX + q, g[q]);
    }
    set(SR_LANEID, [](u32 l) { return l; });
    cst(SR_WARPID, k);
    cst(SR_NWARPID, nw);
    cst(SR_SMID, lin % 108);
    cst(SR_NSMID, 108);
    cst(SR_ZERO32, 0);
    cst(SR_ONE32, 1);
    cst(SR_DYNSMEM, E.st.smem_dynamic);
    cst(SR_TOTSMEM, E.st.smem_static + E.st.smem_dynamic);
    set(SR_LM_EQ, [](u32 l) { return 1u << l; });
    set(SR_LM_LT, [](u32 l) { return (1u << l) - 1; });
    set(SR_LM_LE, [](u32 l) { return (u32)((2ull << l) - 1); });
    set(SR_LM_GT, [](u32 l) { return ~(u32)((2ull << l) - 1); });
    set(SR_LM_GE, [](u32 l) { return ~((1u << l) - 1); });
    u64* z = (u64*)(w.R + sr_off(SR_GRIDID64));
    for (int l = 0; l < 32; l++) z[l] = 1;
    z = (u64*)(w.R + sr_off(SR_ZERO64));
    for (int l = 0; l < 32; l++) z[l] = 0;
  }
  checks_reset(E, C);
}
[[noreturn]] static void deadlock(Exec& E, Cta& C) {
  std::string s =
      strf("deadlock in CTA (%u,%u,%u): no warp can proceed", C.idx[0], C.idx[1], C.idx[2]);
  Warp* last = nullptr;
  for (auto& w : C.warps) {
    if (w.done) {
      continue;
    }
    last = &w;
    for (auto& g : w.others)
      s += strf("\n      warp %u lanes 0x%08x wait at %s", w.id, g.mask, where(E, g.pc).c_str());
    if (w.has_cur)
      s += strf("\n      warp %u lanes 0x%08x spin at %s", w.id, w.mask, where(E, w.pc).c_str());
  }
  u32 exited = 0;
  for (auto& w : C.warps) exited += w.done;
  if (exited) s += strf("\n      %u warps have exited", exited);
  for (int k = 0; k < 16; k++)
    if (C.bars[k].active)
      s += strf("\n      barrier %d: %u of %u threads have arrived", k,
                C.bars[k].implicit ? C.bars[k].lanes : C.bars[k].arrived,
                C.bars[k].implicit ? C.live_threads : C.bars[k].expect);
  E.cur_w = last;
  throw SimError{Fault::Deadlock, s, -2};
}
// runs a CTA until it finishes (true) or makes no progress for a while (false)
static bool run_cta(Exec& E, Cta& C, u64 stall) {
  E.cta = &C;
  std::vector<int> ready;
  u64 lastp = C.progress + E.gwrites, idle = 0, lastg = E.gwrites;
  E.spin_ops = 0;
  static const u32 QM[4] = {6, 40, 300, 100000};
  u32 qmax = QM[E.rnd(4)];
  for (;;) {
    ready.clear();
    bool any = false;
    for (auto& w : C.warps) {
      if (w.done) continue;
      if (w.blocked) {
        bool r = false;
        for (auto& g : w.others)
          if (g.st != G_WBAR) r = true;
        if (!r && !w.has_cur) {
          any = true;
          continue;
        }
      }
      any = true;
      if (w.spinning && w.spin_epoch == C.progress) continue;
      ready.push_back(w.id);
    }
    if (!any) {
      for (size_t k = 0; k < C.tma.size() + 1; k++)
        if (!tma_force(E, C)) break;
      return true;
    }
    if (ready.empty()) {
      if (tma_force(E, C)) continue;
      bool spin = false;
      for (auto& w : C.warps)
        if (!w.done && w.spinning) spin = true;
      (void)spin;
      deadlock(E, C);
    }
    if (!C.tma.empty() && E.rnd(64) == 0) {
      tma_force(E, C);
      continue;
    }
    Warp& w = C.warps[ready[E.rnd(ready.size())]];
    w.spinning = false;
    u32 n = run_warp(E, w, 1 + E.rnd(qmax));
    if (w.done == false && !w.has_cur && w.others.empty()) w.done = true;
    if (E.st.warp_insts > E.cfg.max_insts)
      fail(Fault::Limit, "instruction limit of %llu warp instructions exceeded (endless loop?)",
           (unsigned long long)E.cfg.max_insts);
    if (E.gwrites != lastg) {
      lastg = E.gwrites;
      E.spin_ops = 0;
    } else if (E.spin_ops > 256)
      return false;
    u64 p = C.progress + E.gwrites;
    if (p != lastp) {
      lastp = p;
      idle = 0;
    } else {
      idle += n + 1;
      if (idle > stall) {
        if (!C.tma.empty() && tma_force(E, C)) {
          idle = 0;
          continue;
        }
        return false;
      }
    }
  }
}
void run_launch(Exec& E) {
  u64 total = (u64)E.cfg.grid[0] * E.cfg.grid[1] * E.cfg.grid[2];
  std::vector<u32> order(total);
  for (u64 k = 0; k < total; k++) order[k] = k;
  for (u64 k = total; k > 1; k--) std::swap(order[k - 1], order[E.rnd(k)]);
  std::deque<std::unique_ptr<Cta>> stalled;
  std::vector<std::unique_ptr<Cta>> pool;
  u64 next = 0, fin = 0;
  u64 sweep_insts = 0, gw = 0, stuck = 0;
  std::unique_ptr<Cta> C;
  try {
    while (fin < total) {
      if (next < total && (stalled.empty() || stalled.size() < 64 ||
                           (stuck > stalled.size() && stalled.size() < 4096))) {
        if (pool.empty())
          C.reset(new Cta);
        else {
          C = std::move(pool.back());
          pool.pop_back();
        }
        E.cta = C.get();
        init_cta(E, *C, order[next++]);
      } else {
        C = std::move(stalled.front());
        stalled.pop_front();
      }
      E.st.max_resident = std::max<u64>(E.st.max_resident, stalled.size() + 1);
      if (run_cta(E, *C,
                  stalled.empty() && next >= total
                      ? 4000000
                      : 60000 * std::max<size_t>(1, C->warps.size() / 4))) {
        fin++;
        E.st.ctas++;
        stuck = 0;
        sweep_insts = E.st.warp_insts;
        pool.push_back(std::move(C));
      } else {
        if (E.gwrites != gw) {
          gw = E.gwrites;
          stuck = 0;
          sweep_insts = E.st.warp_insts;
        } else
          stuck++;
        if (E.st.warp_insts - sweep_insts > 500000000ull)
          fail(Fault::Limit, "no CTA makes progress (livelock or endless loop)");
        stalled.push_back(std::move(C));
      }
    }
  } catch (SimError& e) {
    Warp* w = E.cur_w;
    std::string s = "kernel " + E.F->name;
    if (w) {
      u32 pc = std::min<u32>(w->pc, E.M->code.size() - 1);
      int lane = e.lane;
      if (lane == -1) lane = w->mask ? __builtin_ctz(w->mask) : 0;
      e.line = E.code[pc].line;
      if (lane >= 0) {
        s += strf(", %s\n  at %s", where(E, pc).c_str(), thread_name(E, *w, lane).c_str());
        e.has_thread = true;
        u32 t = w->tid0 + lane;
        const u32* b = E.cfg.block;
        u32 at[3] = {t % b[0], t / b[0] % b[1], t / (b[0] * b[1])};
        std::copy(at, at + 3, e.thread);
        std::copy(E.cta->idx, E.cta->idx + 3, e.cta);
      }
    }
    e.msg = s + "\n  " + e.msg;
    throw;
  }
}
}  // namespace vsim
