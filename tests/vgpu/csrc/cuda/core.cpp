#include "core.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "../vsim.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
namespace vgpu {
std::recursive_mutex& g_mu = *new std::recursive_mutex;
thread_local Last t_last;
std::atomic<unsigned> g_epoch{1};

std::string strf(const char* f, ...) {
  va_list ap;
  va_start(ap, f);
  char b[4096];
  int n = vsnprintf(b, sizeof b, f, ap);
  va_end(ap);
  if (n < (int)sizeof b) return std::string(b, n);
  std::string s(n + 1, 0);
  va_start(ap, f);
  vsnprintf(&s[0], n + 1, f, ap);
  va_end(ap);
  s.resize(n);
  return s;
}
std::string in_temp(const char* name) {
  return (std::filesystem::temp_directory_path() / name).string();
}
void note(const char* f, ...) {
  va_list ap;
  va_start(ap, f);
  char b[8192];
  vsnprintf(b, sizeof b, f, ap);
  va_end(ap);
  fprintf(stderr, "vgpu: %s\n", b);
  fflush(stderr);
}
const char* env(const char* n, const char* d) {
  const char* v = getenv(n);
  return v && *v ? v : d;
}
std::string jesc(const std::string& s) {
  std::string o;
  for (unsigned char c : s) {
    if (c == '"' || c == '\\') {
      o += '\\';
      o += c;
    } else if (c < 32)
      o += strf("\\u%04x", c);
    else
      o += c;
  }
  return o;
}
double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

const Arch& arch() {
  static const Arch all[] = {
      {80, 108, 164 << 10, 163 << 10, 40u << 20, 32, 64,
       "vgpu sm_80 (PTX simulator, not hardware)"},
      {86, 84, 100 << 10, 99 << 10, 6u << 20, 16, 48, "vgpu sm_86 (PTX simulator, not hardware)"},
      {90, 132, 228 << 10, 227 << 10, 50u << 20, 32, 64,
       "vgpu sm_90 (PTX simulator, not hardware)"},
  };
  static const Arch& a = [&]() -> const Arch& {
    const char* v = env("VGPU_ARCH", "80");
    for (const Arch& one : all)
      if (std::to_string(one.sm) == v) return one;
    note("VGPU_ARCH=%s: only 80, 86 and 90 are known", v);
    abort();
  }();
  return a;
}

// errors
static int g_sticky = 0;
static auto& g_report = *new std::string;  // never destroyed: torch frees memory at exit
int sticky() { return g_sticky; }
void set_sticky(int code, const std::string& rep) {
  g_report = rep;
  if (!g_sticky) g_sticky = code;
  set_last(code);
  fprintf(stderr, "%s\n", rep.c_str());
  fflush(stderr);
}

// memory
// Two reserved address ranges, so that simulated windows and host libraries never collide
// with device pointers.  Addresses are not reused: a stale pointer is always a fault.
static const u64 DEV_LO = 0x200000000000ull, DEV_HI = 0x300000000000ull,
                 HOST_LO = 0x400000000000ull, HOST_HI = 0x480000000000ull;
static const u64 DELTA = getenv("VGPU_HOST_READABLE") ? 0 : 0x100000000000ull;
static const size_t PAGE = 4096, GUARD = 64 * 1024;
static u64 g_next_dev = DEV_LO + GUARD, g_next_host = HOST_LO + GUARD, g_id = 1;
static auto& g_mem = *new std::map<u64, Range>;   // by base
static auto& g_dead = *new std::map<u64, Range>;  // freed, for reports
static auto& g_blocks =
    *new std::map<u64, Range>;  // live tensors inside pooled segments (torch allocator)
static auto& g_dead_blocks = *new std::map<u64, Range>;
static size_t g_used = 0, g_peak = 0;
static bool g_track = false;
size_t mem_total() {
  static size_t t = strtoull(env("VGPU_MEM_MB", "2048"), 0, 10) << 20;
  return t;
}
size_t mem_used() { return g_used; }
size_t mem_peak() { return g_peak; }
bool in_arena(const void* p) {
  u64 a = (u64)p;
  return (a >= DEV_LO && a < DEV_HI) || (a >= HOST_LO && a < HOST_HI);
}
u8* hp(const void* p) {
  u64 a = (u64)p;
  return (u8*)(a - DEV_LO < DEV_HI - DEV_LO ? a + DELTA : a);
}
static bool arena_dev(MemKind k) { return k == MK_DEVICE || k == MK_MODULE; }
static void host_fault_handler();
static bool is_dev(MemKind k) { return k != MK_HOST; }

int mem_alloc(size_t n, MemKind kind, void** out, const char* name) {
  Lock l(g_mu);
  *out = nullptr;
  if (!n) return 0;
  size_t m = (n + PAGE - 1) / PAGE * PAGE;
  if (m < n || m > (1ull << 42)) return 2;
  if (kind == MK_DEVICE || kind == MK_MANAGED) {
    if (g_used + m > mem_total()) return 2;
  }
  u64& next = arena_dev(kind) ? g_next_dev : g_next_host;
  static bool once = (host_fault_handler(), true);
  (void)once;
  u64 at = next;
  if (at + m + GUARD > (arena_dev(kind) ? DEV_HI : HOST_HI)) return 2;
  void* p = mmap(hp(at), m, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (p == MAP_FAILED || p != hp(at)) {
    if (p != MAP_FAILED) munmap(p, m);
    return 2;
  }
  if (p != (void*)at)
    mmap((void*)at, m, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE,
         -1, 0);
  next = at + m + GUARD;                           // the unmapped gap is the guard
  if (kind == MK_DEVICE) memset(hp(at), 0xff, m);  // NaN in every float format
  Range r;
  r.base = at;
  r.size = n;
  r.mapped = m;
  r.kind = kind;
  r.id = g_id++;
  r.name = name;
  g_mem[at] = r;
  if (kind == MK_DEVICE || kind == MK_MANAGED) {
    g_used += m;
    g_peak = std::max(g_peak, g_used);
  }
  *out = (void*)at;
  return 0;
}
int mem_free(void* p, MemKind kind) {
  Lock l(g_mu);
  if (!p) return 0;
  auto it = g_mem.find((u64)p);
  if (it == g_mem.end() || is_dev(it->second.kind) != is_dev(kind)) {
    note("free of %p: not the start of a live allocation (%s)", p, mem_describe((u64)p).c_str());
    return 1;
  }
  munmap(p, it->second.mapped);
  if (hp(p) != p) munmap(hp(p), it->second.mapped);
  if (it->second.kind == MK_DEVICE || it->second.kind == MK_MANAGED) g_used -= it->second.mapped;
  g_blocks.erase(g_blocks.lower_bound(it->first),
                 g_blocks.lower_bound(it->first + it->second.size));
  g_dead[it->first] = it->second;
  if (g_dead.size() > 4096) g_dead.erase(g_dead.begin());
  g_mem.erase(it);
  return 0;
}
int host_register(void* p, size_t n) {
  Lock l(g_mu);
  Range r;
  r.base = (u64)p;
  r.size = n;
  r.kind = MK_HOST;
  r.id = g_id++;
  r.name = "registered host memory";
  g_mem[r.base] = r;
  return 0;
}
int host_unregister(void* p) {
  Lock l(g_mu);
  auto it = g_mem.find((u64)p);
  if (it == g_mem.end() || it->second.mapped) return 713;
  g_mem.erase(it);
  return 0;
}
static Range* find_in(std::map<u64, Range>& m, u64 a) {
  auto it = m.upper_bound(a);
  if (it == m.begin()) return nullptr;
  --it;
  return a - it->second.base < std::max<size_t>(it->second.size, 1) ? &it->second : nullptr;
}
Range* mem_find(u64 a) {
  Lock l(g_mu);
  return find_in(g_mem, a);
}
int mem_check(const void* p, size_t n, const char* what, bool must_dev) {
  if (!n) return 0;
  Lock l(g_mu);
  u64 a = (u64)p;
  Range* r = find_in(g_mem, a);
  if (!r) {
    if (in_arena(p)) {
      note("%s: %zu bytes at %p are not in a live allocation: %s", what, n, p,
           mem_describe(a).c_str());
      return 1;
    }
    if (must_dev) {
      note("%s: %p is a pageable host pointer where a device pointer is needed", what, p);
      return 1;
    }
    return 0;
  }
  if (a + n > r->base + r->size) {
    note("%s: %zu bytes at %p run %zu bytes past the end of an allocation of %zu bytes", what, n, p,
         (size_t)(a + n - r->base - r->size), r->size);
    return 1;
  }
  return 0;
}
static std::string rname(const Range& r, bool block) {
  return strf("%s #%llu [0x%llx, 0x%llx) of %zu bytes%s%s",
              block                 ? "tensor block"
              : r.kind == MK_HOST   ? "pinned host allocation"
              : r.kind == MK_MODULE ? "module variable"
                                    : "device allocation",
              (unsigned long long)r.id, (unsigned long long)r.base,
              (unsigned long long)(r.base + r.size), r.size, r.name.empty() ? "" : " ",
              r.name.c_str());
}
std::string mem_describe(u64 a) {
  Lock l(g_mu);
  std::string s;
  auto rel = [&](const Range& r, bool blk) {
    long long d = (long long)(a - r.base), e = (long long)(a - r.base - r.size);
    return (e >= 0  ? strf("%lld bytes past the end of ", e)
            : d < 0 ? strf("%lld bytes before the start of ", -d)
                    : strf("at byte %lld of ", d)) +
           rname(r, blk);
  };
  if (Range* b = find_in(g_blocks, a)) return rel(*b, true);
  Range* r = find_in(g_mem, a);
  if (r && !(r->pooled && g_track)) return rel(*r, false);
  if (Range* b = find_in(g_dead_blocks, a))
    s = "inside a freed " + rname(*b, true) + "; ";
  else if (Range* d = find_in(g_dead, a))
    s = "inside a freed " + rname(*d, false) + "; ";
  const Range* best = nullptr;
  bool blk = false;
  u64 bd = 1ull << 40;
  auto near = [&](std::map<u64, Range>& m, bool b) {
    auto it = m.upper_bound(a);
    for (int k = 0; k < 2; k++) {
      if (k && it == m.begin()) break;
      if (k) --it;
      if (it == m.end()) continue;
      const Range& q = it->second;
      if (!b && q.pooled && g_track) continue;
      u64 d = a < q.base ? q.base - a : a >= q.base + q.size ? a - q.base - q.size : 0;
      if (d < bd || (d == bd && a >= q.base)) {
        bd = d;
        best = &q;
        blk = b;
      }
    }
  };
  if (a < 65536) return "a null pointer";
  near(g_mem, false);
  near(g_blocks, true);
  if (best)
    s += rel(*best, blk);
  else
    s += "no allocation is near";
  return s;
}
// What a kernel may touch, sorted by base.  Called at every launch: no copies, no formatting.
static void mem_ranges(std::vector<vsim_range>& out) {
  Lock l(g_mu);
  out.reserve(g_mem.size() + g_blocks.size());
  auto put = [&](const Range& r, const char* n) {
    out.push_back({r.base, r.size, hp(r.base), nullptr, n, r.readonly});
  };
  auto m = g_mem.begin();
  auto b = g_track ? g_blocks.begin() : g_blocks.end();
  while (m != g_mem.end() || b != g_blocks.end()) {
    if (m != g_mem.end() && m->second.pooled && g_track) {
      ++m;
      continue;
    }
    if (b == g_blocks.end() || (m != g_mem.end() && m->first < b->first)) {
      put(m->second, m->second.kind == MK_HOST     ? "pinned memory"
                     : m->second.kind == MK_MODULE ? m->second.name.c_str()
                                                   : "allocation");
      ++m;
    } else {
      put(b->second, "tensor");
      ++b;
    }
  }
}
static struct sigaction g_old_segv;
static void on_segv(int sig, siginfo_t* si, void* ctx) {
  u64 a = (u64)si->si_addr;
  if (a - DEV_LO < DEV_HI - DEV_LO && g_mu.try_lock()) {
    fprintf(stderr,
            "========= vgpu: host code dereferenced a device pointer =========\n  address  0x%llx "
            "is %s\n  (a segmentation fault on hardware too; copy to the CPU first)\n=========\n",
            (unsigned long long)a, mem_describe(a).c_str());
    fflush(stderr);
    g_mu.unlock();
  }
  if (g_old_segv.sa_flags & SA_SIGINFO && g_old_segv.sa_sigaction) {
    g_old_segv.sa_sigaction(sig, si, ctx);
    return;
  }
  sigaction(SIGSEGV, &g_old_segv, nullptr);  // the access faults again, in the previous handler
}
static void host_fault_handler() {
  struct sigaction s;
  memset(&s, 0, sizeof s);
  s.sa_sigaction = on_segv;
  s.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &s, &g_old_segv);
}
// Torch's caching allocator, through its trace hook: segments and the tensors in them.
EXPORT void vgpu_block(int action, u64 addr, size_t size) {
  Lock l(g_mu);
  switch (action) {
    case 0: {
      Range r;
      r.base = addr;
      r.size = size;
      r.id = g_id++;
      r.name = "";
      auto it = g_blocks.lower_bound(addr);
      while (it != g_blocks.end() && it->first < addr + size) it = g_blocks.erase(it);
      g_blocks[addr] = r;
      g_dead_blocks.erase(addr);
      Range* seg = find_in(g_mem, addr);
      if (seg)
        memset(hp(addr), 0xff,
               std::min<size_t>((size + 511) / 512 * 512, seg->base + seg->mapped - addr));
      break;
    }
    case 1: {
      auto it = g_blocks.find(addr);
      if (it != g_blocks.end()) {
        g_dead_blocks[addr] = it->second;
        if (g_dead_blocks.size() > 4096) g_dead_blocks.erase(g_dead_blocks.begin());
        g_blocks.erase(it);
      }
      break;
    }
    case 2: {
      Range* r = find_in(g_mem, addr);
      if (r) r->pooled = true;
      g_track = true;
      break;
    }
    default:
      break;
  }
}

// simulator
static const vsim_api* g_sim = nullptr;
static const vsim_api* sim() {
  if (g_sim) return g_sim;
  std::string p = env("VGPU_LIB") + std::string("/libvgpu_sim.so");
  void* h = dlopen(p.c_str(), RTLD_NOW | RTLD_LOCAL);
  vsim_get_fn get = h ? (vsim_get_fn)dlsym(h, "vsim_get") : nullptr;
  if (!get) {
    note("cannot load the simulator: %s", dlerror());
    return nullptr;
  }
  g_sim = get(VSIM_VERSION);
  if (!g_sim) note("%s speaks another version of vsim.h", p.c_str());
  return g_sim;
}

// modules
static std::string word(const std::string& s, size_t& i) {
  while (i < s.size() && isspace((unsigned char)s[i])) i++;
  size_t b = i;
  while (i < s.size() && (isalnum((unsigned char)s[i]) || strchr("_$.%", s[i]))) i++;
  return s.substr(b, i - b);
}
static int tsize(const std::string& t) {
  if (t == ".pred") return 1;
  int n = 0;
  for (char c : t)
    if (isdigit((unsigned char)c)) n = n * 10 + (c - '0');
  if (t == ".f16x2" || t == ".bf16x2") return 4;
  return n / 8;
}
// Entry signatures and directives; function bodies are only searched for .shared declarations.
void parse_ptx(Module* m) {
  if (m->parsed) return;
  m->parsed = true;
  std::string s = m->ptx;
  for (size_t i = 0; i + 1 < s.size();) {  // blank out comments and strings
    if (s[i] == '/' && s[i + 1] == '/')
      while (i < s.size() && s[i] != '\n') s[i++] = ' ';
    else if (s[i] == '/' && s[i + 1] == '*') {
      while (i + 1 < s.size() && !(s[i] == '*' && s[i + 1] == '/')) {
        if (s[i] != '\n') s[i] = ' ';
        i++;
      }
      s[i] = s[i + 1] = ' ';
      i += 2;
    } else if (s[i] == '"') {
      i++;
      while (i < s.size() && s[i] != '"') i++;
      i++;
    } else
      i++;
  }
  size_t t = s.find(".target");
  if (t != std::string::npos) {
    size_t d = s.find("sm_", t);
    if (d != std::string::npos) m->target = atoi(s.c_str() + d + 3);
  }
  std::map<std::string, u64> shared;  // module-scope static shared variables
  auto shared_decl = [&](size_t i, std::string* nm) -> u64 {  // after ".shared"
    u64 el = 1;
    std::string w;
    for (;;) {
      w = word(s, i);
      if (w == ".align") {
        word(s, i);
        continue;
      }
      if (!w.empty() && w[0] == '.') {
        if (w[1] == 'v' && isdigit(w[2]))
          el *= w[2] - '0';
        else
          el *= tsize(w);
        continue;
      }
      break;
    }
    *nm = w;
    u64 n = el;
    while (i < s.size() && isspace((unsigned char)s[i])) i++;
    while (i < s.size() && s[i] == '[') {
      n *= strtoull(s.c_str() + i + 1, 0, 10);
      i = s.find(']', i) + 1;
    }
    return n;
  };
  size_t depth = 0, pos = 0;
  while (pos < s.size()) {
    char c = s[pos];
    if (c == '{') {
      depth++;
      pos++;
      continue;
    }
    if (c == '}') {
      if (depth) depth--;
      pos++;
      continue;
    }
    if (c == '.' && (!pos || isspace((unsigned char)s[pos - 1]) || strchr(";{})", s[pos - 1]))) {
      size_t i = pos;
      std::string w = word(s, i);
      if (w == ".shared" && !depth) {
        std::string nm;
        u64 n = shared_decl(i, &nm);
        if (n) shared[nm] = n;
      }
      if (w == ".entry" && !depth) {
        std::unique_ptr<Kernel> k(new Kernel);
        k->mod = m;
        k->name = word(s, i);
        while (i < s.size() && s[i] != '(' && s[i] != '{' && s[i] != ';') i++;
        if (i < s.size() && s[i] == '(') {
          size_t e = s.find(')', i);
          std::string ps = s.substr(i + 1, e - i - 1);
          size_t q = 0;
          u32 off = 0;
          while (q < ps.size()) {
            size_t c2 = ps.find(',', q);
            if (c2 == std::string::npos) c2 = ps.size();
            std::string one = ps.substr(q, c2 - q);
            q = c2 + 1;
            size_t z = 0;
            u32 al = 0, sz = 0;
            bool any = false;
            for (;;) {
              std::string w2 = word(one, z);
              if (w2.empty()) break;
              if (w2 == ".param") {
                any = true;
                continue;
              }
              if (w2 == ".align") {
                u32 v = atoi(word(one, z).c_str());
                if (!sz || al == 0 || true) al = std::max(al, sz ? 0u : v);
                continue;
              }
              if (w2 == ".ptr" || w2 == ".global" || w2 == ".const" || w2 == ".shared" ||
                  w2 == ".local")
                continue;
              if (w2[0] == '.' && tsize(w2)) {
                sz = tsize(w2);
                continue;
              }
              if (w2[0] != '.') break;
            }
            if (!any || !sz) continue;
            while (z < one.size() && isspace((unsigned char)one[z])) z++;
            u32 n = sz;
            if (z < one.size() && one[z] == '[') n = sz * strtoul(one.c_str() + z + 1, 0, 10);
            if (!al) al = sz;
            off = (off + al - 1) / al * al;
            k->params.push_back({n, al, off});
            off += n;
          }
          k->param_bytes = off;
          i = e + 1;
        }
        while (i < s.size() && s[i] != '{' && s[i] != ';') {
          size_t b = i;
          std::string w2 = word(s, i);
          auto num = [&]() {
            while (i < s.size() && (isspace((unsigned char)s[i]) || s[i] == ',')) i++;
            u32 v = strtoul(s.c_str() + i, 0, 10);
            while (i < s.size() && isdigit((unsigned char)s[i])) i++;
            size_t j = i;
            while (j < s.size() && (s[j] == ' ' || s[j] == '\t')) j++;
            bool more = j < s.size() && s[j] == ',';
            i = j;
            return std::make_pair(v, more);
          };
          if (w2 == ".maxntid" || w2 == ".reqntid" || w2 == ".reqnctapercluster") {
            u32 v[3] = {1, 1, 1};
            for (int d = 0; d < 3; d++) {
              auto r = num();
              v[d] = r.first;
              if (!r.second) break;
            }
            if (w2 == ".maxntid")
              k->maxntid = v[0] * v[1] * v[2];
            else
              memcpy(w2 == ".reqntid" ? k->reqntid : k->reqcluster, v, sizeof v);
          } else if (w2 == ".minnctapersm")
            k->minctas = num().first;
          if (i == b) i++;
        }
        if (i < s.size() && s[i] == '{') {
          size_t e = i;
          int dd = 0;
          do {
            if (s[e] == '{') dd++;
            if (s[e] == '}') dd--;
            e++;
          } while (e < s.size() && dd);
          std::string body = s.substr(i, e - i);
          u64 st = 0;
          size_t z = i;
          while ((z = s.find(".shared", z)) != std::string::npos && z < e) {
            size_t y = z + 7;
            if (isspace((unsigned char)s[y]) &&
                (isspace((unsigned char)s[z - 1]) || s[z - 1] == ';' || s[z - 1] == '{')) {
              std::string nm;
              st += shared_decl(y, &nm);
            }
            z = y;
          }
          for (auto& v : shared)
            if (body.find(v.first) != std::string::npos) st = (st + 15) / 16 * 16 + v.second;
          k->static_smem = st;
          k->grid_sync = body.find("%envreg") != std::string::npos;
          m->kernels[k->name] = std::move(k);
          pos = e;
          continue;
        }
        pos = i;
        continue;
      }
      pos = i > pos ? i : pos + 1;
      continue;
    }
    pos++;
  }
}
static uint64_t place(void* ctx, const char* name, uint64_t size, uint64_t, int readonly,
                      void** host) {
  Module* m = (Module*)ctx;
  void* p = nullptr;
  if (mem_alloc(size, MK_MODULE, &p, name)) return 0;
  *host = hp(p);
  Range* r = mem_find((u64)p);
  r->readonly = readonly;
  m->syms[name] = *r;
  return (u64)p;
}
int module_prepare(Module* m) {
  Lock l(g_mu);
  if (m->ptx.empty()) {
    if (!m->blob) return 200;
    if (m->why_no_ptx.empty()) {
      m->ptx = pick_ptx(m->blob, m->blob_path, m->why_no_ptx, &m->target);
    }
    if (m->ptx.empty()) return 209;
  }
  parse_ptx(m);
  // cooperative_groups::this_grid().sync(): the driver passes a workspace address in %envreg1
  // (high) and 2
  if (!m->sim && m->ptx.find("%envreg") != std::string::npos) {
    if (mem_alloc(256, MK_MODULE, &m->grid_ws, "grid workspace")) return 2;
    u64 a = (u64)m->grid_ws;
    u32 sz = 256;
    memcpy(hp(m->grid_ws), &sz, 4);
    for (auto& q :
         {std::make_pair("%envreg1", (u32)(a >> 32)), std::make_pair("%envreg2", (u32)a)}) {
      size_t at = 0;
      std::string v = strf("%u", q.second);
      while ((at = m->ptx.find(q.first, at)) != std::string::npos) m->ptx.replace(at, 8, v);
    }
  }
  if (!m->sim) {
    const vsim_api* s = sim();
    if (!s) return 999;
    m->sim = s->load(m->ptx.c_str(), place, m);
    if (!m->sim) {
      note("the simulator rejected the PTX of %s: %s", m->origin.c_str(), s->fault()->text);
      return 218;
    }
  }
  return 0;
}
// Triton's cubins carry their PTX behind the ELF image (hooks.py).
static const char* cubin_trailer(const char* c) {
  auto u16 = [&](size_t o) {
    uint16_t v;
    memcpy(&v, c + o, 2);
    return (size_t)v;
  };
  auto u64at = [&](size_t o) {
    u64 v;
    memcpy(&v, c + o, 8);
    return (size_t)v;
  };
  size_t end = std::max(u64at(0x20) + u16(0x36) * u16(0x38), u64at(0x28) + u16(0x3a) * u16(0x3c));
  for (size_t i = 0; i < u16(0x3c); i++) {
    const char* h = c + u64at(0x28) + i * u16(0x3a);
    u32 type;
    memcpy(&type, h + 4, 4);
    u64 off, sz;
    memcpy(&off, h + 24, 8);
    memcpy(&sz, h + 32, 8);
    if (type != 8) end = std::max<size_t>(end, off + sz);
  }
  static const char mark[] = "\nVGPU-PTX\n";
  for (size_t k = 0; mark[k]; k++)
    if (c[end + k] != mark[k]) return nullptr;
  return c + end + sizeof mark - 1;
}
Module* module_from_image(const void* image, const std::string& origin) {
  Module* m = new Module;
  m->origin = origin;
  const u32* w = (const u32*)image;
  const char* c = (const char*)image;
  if (*w == 0x466243b1u)
    m->blob = (void*)image;  // fatbin wrapper
  else if (*w == 0xba55ed50u)
    m->blob = (void*)image;  // fatbin itself
  else if (*w == 0x464c457fu && cubin_trailer(c))
    m->ptx = cubin_trailer(c);
  else if (*w == 0x464c457fu)
    m->why_no_ptx = "the image is a cubin (SASS); only PTX can be simulated",
    m->blob = (void*)image;
  else {
    const char* v = strstr(c, ".version");
    if (v)
      m->ptx = c;
    else
      m->why_no_ptx = "the image is neither PTX, a fatbin nor a cubin", m->blob = (void*)image;
  }
  return m;
}
void module_free(Module* m) {
  Lock l(g_mu);
  if (m->sim && g_sim) g_sim->unload(m->sim);
  for (auto& s : m->syms) mem_free((void*)s.second.base, MK_MODULE);
  mem_free(m->grid_ws, MK_MODULE);
  delete m;
}
Kernel* module_kernel(Module* m, const std::string& name, int* err) {
  Lock l(g_mu);
  if (m->ptx.empty()) {
    int e = module_prepare(m);
    if (m->ptx.empty()) {
      *err = e;
      return nullptr;
    }
  }
  parse_ptx(m);
  auto it = m->kernels.find(name);
  if (it == m->kernels.end()) {
    *err = 500;
    return nullptr;
  }
  *err = 0;
  return it->second.get();
}
int module_symbol(Module* m, const std::string& name, void** a, size_t* n) {
  int e = module_prepare(m);
  if (e) return e;
  auto it = m->syms.find(name);
  if (it == m->syms.end()) return 500;
  if (a) *a = (void*)it->second.base;
  if (n) *n = it->second.size;
  return 0;
}

// Registers and spills as ptxas would allocate them, so that limits and occupancy are real.
void kernel_resources(Kernel* k) {
  if (k->regs >= 0) return;
  Module* m = k->mod;
  Lock l(g_mu);
  if (k->regs >= 0) return;
  for (auto& q : m->kernels) q.second->regs = 0;
  static std::vector<std::string> tools = [] {
    std::vector<std::string> v;
    for (std::string c : {std::string(env("VGPU_PTXAS")),
                          env("CUDA_HOME", "/usr/local/cuda") + std::string("/bin/ptxas")})
      if (!access(c.c_str(), X_OK) && std::find(v.begin(), v.end(), c) == v.end()) v.push_back(c);
    if (!strcmp(env("VGPU_PTXAS"), "none")) v.clear();
    return v;
  }();
  if (tools.empty()) return;
  u64 h = 1469598103934665603ull ^ arch().sm;
  for (unsigned char c : m->ptx) h = (h ^ c) * 1099511628211ull;
  std::string cache = env("VGPU_CACHE_DIR");
  if (!cache.empty()) cache += strf("/%016llx.regs", (unsigned long long)h);
  if (FILE* f = cache.empty() ? nullptr : fopen(cache.c_str(), "r")) {
    char n[4096];
    int r, st, sp;
    while (fscanf(f, "%4095s %d %d %d", n, &r, &st, &sp) == 4) {
      auto it = m->kernels.find(n);
      if (it != m->kernels.end()) {
        it->second->regs = r;
        it->second->stack = st;
        it->second->spill = sp;
      }
    }
    fclose(f);
    return;
  }
  std::string in = in_temp("vgpu_ptxXXXXXX");
  int fd = mkstemp(in.data());
  if (fd < 0) return;
  if (write(fd, m->ptx.data(), m->ptx.size()) < 0) {
  }
  close(fd);
  bool a = m->ptx.find(strf("sm_%da", m->target)) != std::string::npos;
  for (auto& ptxas : tools) {  // an older ptxas may refuse a newer PTX version
    std::string cmd = strf("env -u LD_PRELOAD %s -v -arch=sm_%d%s '%s' -o /dev/null 2>&1",
                           ptxas.c_str(), a ? m->target : arch().sm, a ? "a" : "", in.c_str());
    FILE* f = popen(cmd.c_str(), "r");
    std::string cur;
    char line[4096];
    while (f && fgets(line, sizeof line, f)) {
      if (char* p = strstr(line, "entry function '")) {
        p += 16;
        cur.assign(p, strchr(p, '\'') - p);
      } else if (char* q = strstr(line, "Function properties for ")) {
        (void)q;
      }
      auto it = m->kernels.find(cur);
      if (it == m->kernels.end()) continue;
      int v;
      if (char* p = strstr(line, "Used ")) {
        if (sscanf(p, "Used %d registers", &v) == 1) it->second->regs = v;
      }
      if (char* p = strstr(line, "bytes stack frame")) {
        while (p > line && *p != ',' && p[-1] != '\n') {
          p--;
          if (p == line) break;
        }
        int st = 0, sp = 0;
        if (sscanf(line, " %d bytes stack frame, %d bytes spill stores", &st, &sp) >= 1) {
          it->second->stack = st;
          it->second->spill = sp;
        }
      }
    }
    if (f && !pclose(f)) break;
  }
  unlink(in.c_str());
  if (!cache.empty() && k->regs > 0) {
    std::string tmp = cache + strf(".%d", getpid());
    if (FILE* f = fopen(tmp.c_str(), "w")) {
      for (auto& q : m->kernels)
        fprintf(f, "%s %d %d %d\n", q.first.c_str(), q.second->regs, q.second->stack,
                q.second->spill);
      fclose(f);
      rename(tmp.c_str(), cache.c_str());
    }
  }
}
int encode_tensor_map(void* out, int dt, int rank, u64 base, const uint64_t* dim,
                      const uint64_t* stride, const u32* box, const u32* es, int sw, int nan) {
  const vsim_api* s = sim();
  if (!s) return 999;
  if (!s->tensor_map) {
    note("%s has no tensor maps", s->name);
    return 801;
  }
  s->tensor_map(out, dt, rank, base, dim, stride, box, es, sw, nan);
  return 0;
}
int occupancy(Kernel* k, int threads, size_t dyn) {
  const Arch& a = arch();
  if (threads <= 0 || threads > 1024) return 0;
  kernel_resources(k);
  int warps = (threads + 31) / 32, n = a.max_blocks_sm;
  n = std::min(n, a.max_warps_sm / warps);
  int regs = std::max(k->regs, 1);
  int per_warp = (regs * 32 + 255) / 256 * 256;
  n = std::min(n, 65536 / 4 / per_warp * 4 / warps);
  size_t sm = k->static_smem + dyn;
  if (sm > (size_t)a.smem_optin) return 0;
  n = std::min<int>(n, a.smem_sm / ((sm + 1024 + 127) / 128 * 128));
  return n;
}

// launches
static bool g_resources = false, g_coverage = false;
static auto& g_log = *new std::vector<std::string>;
static u64 g_nlaunch = 0, g_log_base = 0;
// vsim_fault_kind -> CUDA error
static const int kErrors[] = {0, 700, 716, 719, 719, 719, 719, 719, 719, 710, 702, 218, 719};
static_assert(sizeof kErrors / sizeof *kErrors == VSIM_FAULT_KINDS);
static std::string demangle(const std::string& n) {
  int st = 0;
  char* p = abi::__cxa_demangle(n.c_str(), 0, 0, &st);
  if (!p || st) return n;
  std::string s = p;
  free(p);
  return s;
}
// CUDA or Python source position of a PTX line, from .loc and .file (nvcc -lineinfo, Triton)
static std::string source_of(const std::string& ptx, int line) {
  size_t pos = 0;
  int n = 1, f = 0, l = 0;
  std::map<int, std::string> files;
  while (pos < ptx.size()) {
    size_t e = ptx.find('\n', pos);
    if (e == std::string::npos) e = ptx.size();
    size_t q = ptx.find_first_not_of(" \t", pos);
    if (q != std::string::npos && q < e) {
      int a, b;
      if (n <= line && !ptx.compare(q, 5, ".loc\t") || n <= line && !ptx.compare(q, 5, ".loc ")) {
        if (sscanf(ptx.c_str() + q + 5, "%d %d", &a, &b) == 2) f = a, l = b;
      } else if (n <= line && ptx.find(".entry", q) < e)
        f = 0;
      else if (!ptx.compare(q, 5, ".file")) {
        if (sscanf(ptx.c_str() + q + 5, " %d", &a) == 1) {
          size_t u = ptx.find('"', q);
          if (u < e) {
            std::string fn = ptx.substr(u + 1, ptx.find('"', u + 1) - u - 1);
            size_t u2 = ptx.find('"', ptx.find('"', u + 1) + 1);
            if (u2 < e) fn += "/" + ptx.substr(u2 + 1, ptx.find('"', u2 + 1) - u2 - 1);
            files[a] = fn;
          }
        }
      }
    }
    pos = e + 1;
    n++;
  }
  return f && files.count(f) ? strf("%s:%d", files[f].c_str(), l) : "";
}
static bool refuse(Kernel* k, int code, std::string why) {
  note("launch of %s refused: %s (CUDA error %d)", demangle(k->name).c_str(), why.c_str(), code);
  return true;
}

int launch(Kernel* k, const LaunchArgs& L, void** args, const void* packed, size_t packed_n) {
  Lock l(g_mu);
  if (g_sticky) return g_sticky;
  const Arch& A = arch();
  const vsim_api* S = sim();
  if (!S) return 999;
  u64 nt = (u64)L.block[0] * L.block[1] * L.block[2];
  if (!L.grid[0] || !L.grid[1] || !L.grid[2] || !nt || nt > 1024 || L.block[0] > 1024 ||
      L.block[1] > 1024 || L.block[2] > 64 || L.grid[0] > 0x7fffffffu || L.grid[1] > 65535 ||
      L.grid[2] > 65535) {
    refuse(k, 9,
           strf("grid %u x %u x %u, block %u x %u x %u", L.grid[0], L.grid[1], L.grid[2],
                L.block[0], L.block[1], L.block[2]));
    return 9;
  }
  if (k->reqntid[0] &&
      (L.block[0] != k->reqntid[0] || L.block[1] != k->reqntid[1] || L.block[2] != k->reqntid[2])) {
    refuse(k, 1, "block differs from .reqntid");
    return 1;
  }
  if (k->maxntid && nt > k->maxntid) {
    refuse(k, 701,
           strf("%llu threads per block exceed the kernel's launch bounds (%u)",
                (unsigned long long)nt, k->maxntid));
    return 701;
  }
  if (L.smem > (size_t)k->max_dyn_smem || k->static_smem + L.smem > A.smem_optin ||
      (k->static_smem + L.smem > 49152 && L.smem && k->max_dyn_smem <= 49152)) {
    refuse(k, 1,
           strf("%zu bytes of dynamic shared memory (plus %u static): the limit is %d per "
                "cudaFuncSetAttribute, device opt-in maximum %zu",
                L.smem, k->static_smem, k->max_dyn_smem, A.smem_optin));
    return 1;
  }
  if (!L.smem && k->static_smem > 49152) {
    refuse(k, 1, "more than 48 KiB static shared memory");
    return 1;
  }
  u32 cl[3];
  for (int d = 0; d < 3; d++) {
    cl[d] = k->reqcluster[0] ? k->reqcluster[d] : std::max(1u, L.cluster[d]);
    if (L.grid[d] % cl[d]) {
      refuse(k, 1, "grid is not a multiple of the cluster");
      return 1;
    }
  }
  u32 ncl = cl[0] * cl[1] * cl[2];
  if (ncl > 1 && A.sm < 90) {
    refuse(k, 912, "clusters need sm_90");
    return 912;
  }
  if (ncl > (k->nonportable_cluster ? 16u : 8u)) {
    refuse(k, 912, "cluster too large");
    return 912;
  }
  if (nt > 256 || getenv("VGPU_CHECK_REGS")) {
    kernel_resources(k);
    u64 need = (u64)((k->regs * 32 + 255) / 256 * 256) * ((nt + 31) / 32);
    if (need > 65536) {
      refuse(k, 701,
             strf("%d registers x %llu threads exceed the register file", k->regs,
                  (unsigned long long)nt));
      return 701;
    }
  }
  if (L.cooperative) {
    int o = occupancy(k, nt, L.smem);
    u64 g = (u64)L.grid[0] * L.grid[1] * L.grid[2];
    if (g > (u64)o * A.sms) {
      refuse(k, 720, "cooperative grid too large");
      return 720;
    }
  }
  if (k->grid_sync && !L.cooperative) {
    set_sticky(719, "========= vgpu: CUDA error 719 =========\n  kernel   " + demangle(k->name) +
                        "\n  fault    grid synchronisation in a kernel that was not launched "
                        "cooperatively (cudaLaunchCooperativeKernel)\n=========");
    return 719;
  }
  int e = module_prepare(k->mod);
  if (e) {
    refuse(k, e, k->mod->why_no_ptx);
    return e;
  }
  std::vector<u8> buf(std::max<size_t>(k->param_bytes, 1));
  if (packed)
    memcpy(buf.data(), packed, std::min<size_t>(packed_n, k->param_bytes));
  else
    for (size_t i = 0; i < k->params.size(); i++) {
      if (!args || !args[i]) {
        refuse(k, 1, "missing kernel argument");
        return 1;
      }
      memcpy(&buf[k->params[i].off], args[i], k->params[i].size);
    }
  std::vector<vsim_range> vr;
  mem_ranges(vr);
  vsim_launch c;
  memset(&c, 0, sizeof c);
  c.kernel = k->name.c_str();
  memcpy(c.grid, L.grid, 12);
  memcpy(c.block, L.block, 12);
  memcpy(c.cluster, cl, 12);
  c.smem = L.smem;
  static u64 seed0 = strtoull(env("VGPU_SEED", "0"), 0, 10);
  c.seed = seed0 * 1000003 + g_nlaunch;
  static u32 checks = [] {
    std::string ck = std::string(",") + env("VGPU_CHECKS", "all") + ",";
    auto has = [&](const char* w) { return ck.find(w) != std::string::npos; };
    u32 c = has(",all,") ? VSIM_RACE | VSIM_INIT : 0;
    return c | (has(",race,") * VSIM_RACE) | (has(",init,") * VSIM_INIT) |
           (has(",lanes,") * VSIM_LANES);
  }();
  c.checks = checks;
  c.max_insts = strtoull(env("VGPU_MAX_INSTS", "5000000000"), 0, 10);
  c.params = buf.data();
  c.param_bytes = k->param_bytes;
  std::vector<std::vector<u8>> maps(g_coverage ? vr.size() : 0);
  for (size_t i = 0; i < maps.size(); i++) {
    maps[i].resize(vr[i].size + 8);
    vr[i].map = maps[i].data();
  }
  c.ranges = vr.data();
  c.num_ranges = vr.size();
  if (g_resources) kernel_resources(k);
  u64 seq = g_nlaunch++;
  double t0 = now_ms();
  if (getenv("VGPU_TRACE"))
    note("launch %llu %s grid (%u,%u,%u) block (%u,%u,%u) smem %zu", (unsigned long long)seq,
         demangle(k->name).c_str(), L.grid[0], L.grid[1], L.grid[2], L.block[0], L.block[1],
         L.block[2], L.smem);
  const char* js = S->launch(k->mod->sim, &c);
  double ms = now_ms() - t0;
  std::string head = strf(
      "{\"seq\":%llu,\"kernel\":\"%s\",\"mangled\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],"
      "\"cluster\":[%u,%u,%u],\"smem\":%zu,\"static_smem\":%u,\"regs\":%d,\"stream\":%llu,\"ms\":%."
      "3f,",
      (unsigned long long)seq, jesc(demangle(k->name)).c_str(), jesc(k->name).c_str(), L.grid[0],
      L.grid[1], L.grid[2], L.block[0], L.block[1], L.block[2], cl[0], cl[1], cl[2], L.smem,
      k->static_smem, k->regs, (unsigned long long)L.stream, ms);
  auto log = [&](const std::string& s) {
    g_log.push_back(s);
    if (g_log.size() > 200000) {
      g_log.erase(g_log.begin(), g_log.begin() + 100000);
      g_log_base += 100000;
    }
  };
  if (js) {
    if (g_resources)
      head += strf("\"spill\":%d,\"stack\":%d,\"ctas_per_sm\":%d,", k->spill, k->stack,
                   occupancy(k, nt, L.smem));
    if (g_coverage) {
      u64 rd = 0, wr = 0;
      for (auto& m : maps)
        for (u8 b : m) {
          rd += b & 1;
          wr += b >> 1;
        }
      head += strf("\"unique_read_bytes\":%llu,\"unique_written_bytes\":%llu,",
                   (unsigned long long)rd, (unsigned long long)wr);
    }
    log(head + "\"ok\":true,\"counters\":" + js + "}");
    if (const char* p = strstr(js, "\"printf\":\"")) {
      p += 10;
      std::string o;
      for (; *p && *p != '"'; p++) {
        if (*p == '\\' && p[1]) {
          p++;
          o += *p == 'n' ? '\n' : *p == 't' ? '\t' : *p;
        } else
          o += *p;
      }
      if (!o.empty()) {
        fputs(o.c_str(), stdout);
        fflush(stdout);
      }
    }
    return 0;
  }
  const vsim_fault& fault = *S->fault();
  std::string msg = fault.text;
  int code = kErrors[fault.kind];
  std::string rep = strf(
      "========= vgpu: CUDA error %d (%s) =========\n  kernel   %s\n  launch   #%llu grid "
      "(%u,%u,%u) block (%u,%u,%u) dynamic smem %zu\n  fault    %s",
      code, err_name(code), demangle(k->name).c_str(), (unsigned long long)seq, L.grid[0],
      L.grid[1], L.grid[2], L.block[0], L.block[1], L.block[2], L.smem, msg.c_str());
  u64 fa = fault.address;
  if (fault.line) {
    std::string src = source_of(k->mod->ptx, fault.line);
    if (!src.empty()) rep += "\n  source   " + src;
  }
  if (fault.has_address) {
    rep += "\n  address  0x" + strf("%llx is ", (unsigned long long)fa) + mem_describe(fa);
    for (size_t i = 0; i < k->params.size(); i++)
      if (k->params[i].size == 8) {
        u64 v;
        memcpy(&v, &buf[k->params[i].off], 8);
        Range* r = nullptr;
        {
          Lock l2(g_mu);
          r = find_in(g_blocks, v);
          if (!r) r = find_in(g_mem, v);
        }
        if (r)
          rep += strf("\n  arg %-4zu 0x%llx -> ", i, (unsigned long long)v) +
                 rname(*r, find_in(g_blocks, v) != nullptr) +
                 strf(", fault is %+lld bytes from this pointer", (long long)(fa - v));
      }
  }
  rep += "\n=========";
  log(head + "\"ok\":false,\"error\":" + std::to_string(code) + ",\"fault\":\"" + fault.name +
      "\",\"message\":\"" + jesc(msg) + "\",\"counters\":{}}");
  if (code == 218) {
    note("%s", rep.c_str());
    return code;
  }  // nothing ran: not sticky
  set_sticky(code, rep);
  return code;
}
void reset_all() {
  Lock l(g_mu);
  g_sticky = 0;
  g_epoch++;
  g_report.clear();
}
}  // namespace vgpu
using namespace vgpu;

// control ABI (Python)
static thread_local std::string t_json;
EXPORT void vgpu_record(int resources, int coverage) {
  Lock l(g_mu);
  g_resources = resources;
  g_coverage = coverage;
}
EXPORT const char* vgpu_launches_from(uint64_t seq) {
  Lock l(g_mu);
  t_json = "[";
  bool first = true;
  for (u64 i = std::max(seq, g_log_base); i < g_log_base + g_log.size(); i++) {
    if (!first) t_json += ',';
    first = false;
    t_json += g_log[i - g_log_base];
  }
  t_json += "]";
  return t_json.c_str();
}
EXPORT uint64_t vgpu_launch_count() {
  Lock l(g_mu);
  return g_log_base + g_log.size();
}
EXPORT void vgpu_clear() {
  Lock l(g_mu);
  g_log_base += g_log.size();
  g_log.clear();
}
EXPORT void vgpu_reset() { reset_all(); }
EXPORT void* vgpu_host_ptr(const void* p) { return hp(p); }
EXPORT int vgpu_sticky() { return sticky(); }
EXPORT const char* vgpu_report() {
  Lock l(g_mu);
  t_json = g_report;
  return t_json.c_str();
}
EXPORT const char* vgpu_describe(uint64_t a) {
  t_json = mem_describe(a);
  return t_json.c_str();
}
EXPORT size_t vgpu_mem_used() { return mem_used(); }
EXPORT size_t vgpu_mem_peak() { return mem_peak(); }
EXPORT int vgpu_unmocked(const char* name, int driver) {
  note("UNMOCKED CUDA %s function %s was called", driver ? "driver" : "runtime", name);
  void* bt[24];
  int n = backtrace(bt, 24);
  if (getenv("VGPU_TRACE")) backtrace_symbols_fd(bt, n, 2);
  if (!strcmp(env("VGPU_UNMOCKED"), "abort")) abort();
  if (!driver) set_last(801);
  return 801;
}
