// Shared-memory shadow state: initialisation, outstanding asynchronous bytes, and
// happens-before race detection between warps (vector clocks).
#include "core.h"
namespace vsim {
void vc_join(VC& a, const VC& b) {
  for (int i = 0; i < MAXW; i++) a.c[i] = std::max(a.c[i], b.c[i]);
}
void vc_release(Exec& E, Warp& w, VC& into) {
  w.vc.c[w.id] = w.clock;
  vc_join(into, w.vc);
  w.clock = ++E.now;
  w.vc.c[w.id] = w.clock;
}
void vc_acquire(Warp& w, const VC& from) {
  u32 me = w.clock;
  vc_join(w.vc, from);
  w.vc.c[w.id] = me;
}

void checks_reset(Exec& E, Cta& C) {
  size_t n = C.smem_size;
  C.init.assign(n, 0);
  C.pend_line.assign(n / 4 + 1, 0);
  E.now++;
  if (E.chk_lanes) {
    C.ln_w.assign(n, 0);
    C.ln_r.assign(n, 0);
  }
  for (auto& w : C.warps) {
    for (int i = 0; i < MAXW; i++) w.vc.c[i] = E.now;
    w.clock = 0;
  }
  for (auto& w : C.warps) {
    w.clock = ++E.now;
    w.vc.c[w.id] = w.clock;
    memset(&w.fvc, 0, sizeof w.fvc);
    w.fence_clock = 0;
  }
  if (E.chk_race) {
    if (C.wr_stamp.size() != n) {
      C.wr_stamp.assign(n, 0);
      C.wr_warp.assign(n, 0xff);
      C.rd_gran.assign(n / 16 + 1, 0);
    } else {
      std::fill(C.wr_warp.begin(), C.wr_warp.end(), 0xff);
      std::fill(C.rd_gran.begin(), C.rd_gran.end(), 0);
    }
    C.rd.resize(C.warps.size());
    for (auto& r : C.rd)
      if (r.size() != n) r.assign(n, 0);
  }
}
// optional: two lanes of one warp touch a byte (one writes another value) in different issued
// instructions without bar.warp.sync / a barrier in between
static inline void lane_mark(u64& v, Warp& w, int lane,
                             bool fresh) {  // fresh: forget lanes of earlier instructions
  u64 me = w.serial << 16 | w.id << 8, at = v >> 16;
  bool keep = fresh ? at == w.serial : at > w.wsync;
  v = me | (keep && ((v >> 8) & 0xff) == w.id && (v & 0xff) != (u64)lane ? 0xff : lane);
}
static void lane_check(Exec& E, Warp& w, u32 a, u32 n, int lane, bool write,
                       const void* data = nullptr) {
  Cta& C = *E.cta;
  auto clash = [&](u64 v) {
    return (v >> 16) > w.wsync && (v >> 16) != w.serial && ((v >> 8) & 0xff) == w.id &&
           (v & 0xff) != (u64)lane;
  };
  for (u32 k = a; k < a + n; k++) {
    bool same = data && ((const u8*)data)[k - a] == C.smem[k] && C.init[k] == 1;
    if (!same && (clash(C.ln_w[k]) || (write && clash(C.ln_r[k])))) {
      u64 v = clash(C.ln_w[k]) ? C.ln_w[k] : C.ln_r[k];
      std::string who = (v & 0xff) == 0xff ? "several lanes" : strf("lane %u", (u32)(v & 0xff));
      fail_lane(Fault::Race, lane,
                "race between lanes of a warp at shared address 0x%x: %s by lane %d conflicts with "
                "an earlier access by %s without bar.warp.sync",
                k, write ? "write" : "read", lane, who.c_str());
    }
    if (write)
      lane_mark(C.ln_w[k], w, lane, true);
    else
      lane_mark(C.ln_r[k], w, lane, false);
  }
}
static inline bool all_eq(const u8* p, u32 n, u8 v) {
  for (u32 k = 0; k < n; k++)
    if (p[k] != v) return false;
  return true;
}
static inline bool all_one(const u8* p, u32 n) {
  if (n == 16) {
    u64 a, b;
    memcpy(&a, p, 8);
    memcpy(&b, p + 8, 8);
    return a == 0x0101010101010101ull && b == 0x0101010101010101ull;
  }
  if (n == 8) {
    u64 a;
    memcpy(&a, p, 8);
    return a == 0x0101010101010101ull;
  }
  if (n == 4) {
    u32 a;
    memcpy(&a, p, 4);
    return a == 0x01010101u;
  }
  return all_eq(p, n, 1);
}
[[noreturn]] static void init_fail(Exec& E, Warp& w, u32 addr, u32 n, int lane, const char* what) {
  Cta& C = *E.cta;
  for (u32 k = 0; k < n; k++) {
    u8 v = C.init[addr + k];
    if (v == 1) continue;
    u32 ln = C.pend_line[(addr + k) >> 2];
    if (v == 2)
      fail_lane(Fault::Async, lane,
                "%s of shared address 0x%x (byte %u): bytes of an outstanding cp.async not yet "
                "waited for (issued at line %u: %s)",
                what, addr, addr + k, ln, line_text(*E.M, ln).c_str());
    if (v == 3)
      fail_lane(Fault::Async, lane,
                "%s of shared address 0x%x (byte %u): bytes of an outstanding bulk/tensor copy not "
                "yet waited for (issued at line %u: %s)",
                what, addr, addr + k, ln, line_text(*E.M, ln).c_str());
    if (v == 4)
      fail_lane(Fault::Barrier, lane, "%s of shared address 0x%x: it holds a live mbarrier object",
                what, addr);
    fail_lane(Fault::Uninit, lane,
              "%s of uninitialised shared memory: address 0x%x (byte %u was never written)", what,
              addr, addr + k);
  }
  fail_lane(Fault::Unsupported, lane, "internal: init check");
}
[[noreturn]] static void race_fail(Exec& E, Warp& w, u32 addr, int lane, u32 other,
                                   const char* mine, const char* theirs) {
  fail_lane(Fault::Race, lane,
            "shared memory race at address 0x%x: %s by warp %u conflicts with an earlier %s by "
            "warp %u without synchronisation in between",
            addr, mine, w.id, theirs, other & 0x7f);
}
static inline bool hb(const Warp& w, u8 who, u32 stamp) {
  return who == 0xff || (who & 0x7f) == w.id || w.vc.c[who & 0x7f] >= stamp;
}
static inline bool wr_uniform(const Cta& C, u32 a, u32 n) {
  u32 s = C.wr_stamp[a];
  u8 q = C.wr_warp[a];
  u32 d = 0;
  const u32* p = &C.wr_stamp[a];
  const u8* z = &C.wr_warp[a];
  if (n == 16) {
    for (u32 k = 0; k < 16; k++) d |= (p[k] ^ s) | (u32)(z[k] ^ q);
    return d == 0;
  }
  for (u32 k = 0; k < n; k++) d |= (p[k] ^ s) | (u32)(z[k] ^ q);
  return d == 0;
}
void sm_read(Exec& E, Warp& w, u32 a, u32 n, int lane) {
  Cta& C = *E.cta;
  if (E.chk_lanes && lane >= 0) lane_check(E, w, a, n, lane, false);
  if (E.chk_init && !all_one(&C.init[a], n)) init_fail(E, w, a, n, lane, "read");
  if (!E.chk_race) return;
  if (wr_uniform(C, a, n)) {
    if (!hb(w, C.wr_warp[a], C.wr_stamp[a]))
      race_fail(E, w, a, lane, C.wr_warp[a], "read", "write");
  } else
    for (u32 k = 0; k < n; k++)
      if (!hb(w, C.wr_warp[a + k], C.wr_stamp[a + k]))
        race_fail(E, w, a + k, lane, C.wr_warp[a + k], "read", "write");
  u32* r = &C.rd[w.id][a];
  u32 c = w.clock;
  if (n == 16)
    for (u32 k = 0; k < 16; k++) r[k] = c;
  else
    for (u32 k = 0; k < n; k++) r[k] = c;
  for (u32 g = a >> 4; g <= (a + n - 1) >> 4; g++) C.rd_gran[g] |= 1u << w.id;
}
static void write_checks(Exec& E, Warp& w, u32 a, u32 n, int lane, const void* data, bool atomic) {
  Cta& C = *E.cta;
  if (C.wr_warp[a] != 0xff || !wr_uniform(C, a, n))
    for (u32 k = 0; k < n; k++)
      if (!hb(w, C.wr_warp[a + k], C.wr_stamp[a + k])) {
        if (atomic && (C.wr_warp[a + k] & 0x80)) continue;
        if (data && ((const u8*)data)[k] == C.smem[a + k] && C.init[a + k] == 1)
          continue;  // same value: benign
        race_fail(E, w, a + k, lane, C.wr_warp[a + k], atomic ? "atomic" : "write", "write");
      }
  for (u32 g = a >> 4; g <= (a + n - 1) >> 4; g++) {
    u32 rm = C.rd_gran[g] & ~(1u << w.id);
    if (!rm) continue;
    u32 lo = std::max(a, g << 4), hi = std::min(a + n, (g + 1) << 4);
    while (rm) {
      u32 u = __builtin_ctz(rm);
      rm &= rm - 1;
      const u32* r = &C.rd[u][0];
      u32 lim = w.vc.c[u];
      for (u32 k = lo; k < hi; k++)
        if (r[k] > lim) {
          if (data && ((const u8*)data)[k - a] == C.smem[k] && C.init[k] == 1) continue;
          race_fail(E, w, k, lane, u, atomic ? "atomic" : "write", "read");
        }
    }
    if (lo == g << 4 && hi == (g + 1) << 4) C.rd_gran[g] = C.rd_gran[g] & (1u << w.id);
  }
  u8 q = w.id | (atomic ? 0x80 : 0);
  for (u32 k = 0; k < n; k++) {
    C.wr_stamp[a + k] = w.clock;
    C.wr_warp[a + k] = q;
  }
}
void sm_write(Exec& E, Warp& w, u32 a, u32 n, int lane, const void* data) {
  Cta& C = *E.cta;
  C.progress++;
  if (E.chk_lanes && lane >= 0) lane_check(E, w, a, n, lane, true, data);
  if (E.chk_init)
    for (u32 k = 0; k < n; k++)
      if (C.init[a + k] > 1) init_fail(E, w, a, n, lane, "write");
  if (E.chk_race) write_checks(E, w, a, n, lane, data, false);
  memset(&C.init[a], 1, n);
}
void sm_atomic(Exec& E, Warp& w, u32 a, u32 n, int lane, bool sync) {
  Cta& C = *E.cta;
  if (E.chk_init && !all_one(&C.init[a], n)) init_fail(E, w, a, n, lane, "atomic");
  if (E.chk_race) {
    write_checks(E, w, a, n, lane, nullptr, true);
  }
  (void)sync;
}
void sm_read_proxy(Exec& E, Warp& w, u32 a, u32 n, int lane) {
  sm_read(E, w, a, n, lane);
  if (!E.chk_race) return;
  Cta& C = *E.cta;
  for (u32 k = 0; k < n; k++) {
    u8 q = C.wr_warp[a + k];
    if (q == 0xff || q == 32) continue;
    q &= 0x7f;
    u32 s = C.wr_stamp[a + k];
    if (s < C.warps[q].fence_clock || w.fvc.c[q] >= s) {
      if (k + 1 < n && C.wr_stamp[a + n - 1] == s && wr_uniform(C, a, n)) break;
      continue;
    }
    fail_lane(Fault::Async, lane,
              "async-proxy read of shared address 0x%x: the generic-proxy write by warp %u is not "
              "followed by fence.proxy.async",
              a + k, q);
  }
}
// an object written earlier (mbarrier initialisation) must be visible to this warp
void sm_visible(Exec& E, Warp& w, u32 a, u32 n, int lane, const char* what) {
  Cta& C = *E.cta;
  if (!E.chk_race) return;
  for (u32 k = 0; k < n; k++)
    if (!hb(w, C.wr_warp[a + k], C.wr_stamp[a + k]))
      fail_lane(Fault::Async, lane,
                "%s at shared address 0x%x: its initialisation by warp %u is not yet visible "
                "(missing synchronisation)",
                what, a, C.wr_warp[a + k] & 0x7f);
}
void sm_begin_async(Exec& E, Warp& w, u32 a, u32 n, int lane, u8 kind, u32 line) {
  Cta& C = *E.cta;
  if (E.chk_lanes && kind == 2) lane_check(E, w, a, n, lane, true);
  if (E.chk_init)
    for (u32 k = 0; k < n; k++)
      if (C.init[a + k] > 1) init_fail(E, w, a, n, lane, "asynchronous write");
  if (E.chk_race) write_checks(E, w, a, n, lane, nullptr, false);
  memset(&C.init[a], kind, n);
  for (u32 k = a >> 2; k <= (a + n - 1) >> 2; k++) C.pend_line[k] = line;
  memset(&C.smem[a], 0xff, n);
}
void sm_end_async(Exec& E, Warp& w, u32 a, u32 n, int lane) {
  Cta& C = *E.cta;
  memset(&C.init[a], 1, n);
  if (E.chk_lanes)
    for (u32 k = 0; k < n; k++) lane_mark(C.ln_w[a + k], w, lane, true);
  if (E.chk_race)
    for (u32 k = 0; k < n; k++) {
      C.wr_stamp[a + k] = w.clock;
      C.wr_warp[a + k] = w.id;
    }
}
}  // namespace vsim
