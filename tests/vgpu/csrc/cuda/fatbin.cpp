// PTX out of a fatbin: raw, LZ4 and zstd entries here, anything else through cuobjdump.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core.h"
namespace vgpu {
#pragma pack(push, 1)
struct FatHdr {
  u32 magic;
  uint16_t version, hdr;
  u64 size;
};
struct FatEnt {
  uint16_t kind, ver;
  u32 hdr;
  u64 size;
  u32 csize;
  u32 unk1;
  uint16_t minor, major;
  u32 arch;
  u32 name_off, name_len;
  u64 flags;
  u64 zero;
  u64 usize;
};
#pragma pack(pop)
static bool lz4(const u8* s, size_t n, std::string& out, size_t want) {
  const u8* e = s + n;
  out.clear();
  out.reserve(want);
  while (s < e) {
    u32 t = *s++, L = t >> 4;
    if (L == 15) {
      u8 b;
      do {
        if (s >= e) return false;
        b = *s++;
        L += b;
      } while (b == 255);
    }
    if (s + L > e) return false;
    out.append((const char*)s, L);
    s += L;
    if (s >= e || out.size() >= want) break;
    u32 off = s[0] | s[1] << 8;
    s += 2;
    u32 M = t & 15;
    if (M == 15) {
      u8 b;
      do {
        if (s >= e) return false;
        b = *s++;
        M += b;
      } while (b == 255);
    }
    M += 4;
    if (!off || off > out.size()) return false;
    size_t p = out.size() - off;
    while (M--) out.push_back(out[p++]);
  }
  return out.size() == want;
}
static bool zstd(const u8* s, size_t n, std::string& out, size_t want) {
  typedef size_t (*F)(void*, size_t, const void*, size_t);
  static F f = [] {
    void* h = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    return h ? (F)dlsym(h, "ZSTD_decompress") : nullptr;
  }();
  if (!f) return false;
  out.resize(want);
  return f(&out[0], want, s, n) == want;
}
static std::string from_cuobjdump(const std::string& path, int best_arch) {
  static std::string tool = [] {
    std::string p = env("VGPU_CUOBJDUMP", "");
    return p.empty() ? std::string("cuobjdump") : p;
  }();
  std::string dir = in_temp("vgpu_coXXXXXX");
  if (path.empty() || !mkdtemp(dir.data())) return "";
  std::string cmd = strf("cd '%s' && env -u LD_PRELOAD %s -xptx all '%s' >/dev/null 2>&1",
                         dir.c_str(), tool.c_str(), path.c_str());
  if (system(cmd.c_str())) {
  }
  std::string pat = strf("ls '%s'/*sm_%d*.ptx 2>/dev/null", dir.c_str(), best_arch);
  FILE* f = popen(("env -u LD_PRELOAD " + pat).c_str(), "r");
  char fn[1024];
  std::string out;
  int nf = 0;
  while (f && fgets(fn, sizeof fn, f)) {
    fn[strcspn(fn, "\n")] = 0;
    nf++;
    if (FILE* g = fopen(fn, "r")) {
      char b[65536];
      size_t k;
      std::string one;
      while ((k = fread(b, 1, sizeof b, g))) one.append(b, k);
      fclose(g);
      if (nf == 1) out = one;
    }
  }
  if (f) pclose(f);
  if (system(("rm -rf '" + dir + "'").c_str())) {
  }
  if (nf > 1) {
    note("%s holds %d PTX images in a compression this build cannot read; cannot tell which",
         path.c_str(), nf);
    return "";
  }
  return out;
}
std::string pick_ptx(const void* image, const std::string& path, std::string& why, int* target) {
  const u32* w = (const u32*)image;
  const u8* p = (const u8*)image;
  if (*w == 0x466243b1u) p = *(const u8* const*)((const u8*)image + 8);
  if (*(const u32*)p != 0xba55ed50u) {
    if (why.empty()) why = "not a fatbin";
    return "";
  }
  const FatHdr* h = (const FatHdr*)p;
  const u8* q = p + h->hdr;
  const u8* end = q + h->size;
  const FatEnt* best = nullptr;
  std::string seen;
  int sm = arch().sm;
  for (; q + sizeof(FatEnt) <= end;) {
    const FatEnt* e = (const FatEnt*)q;
    if (!e->hdr || !e->size) break;
    bool ptx = e->kind == 1;
    seen += strf("%s%s sm_%u", seen.empty() ? "" : ", ", ptx ? "PTX" : "SASS", e->arch);
    if (ptx && (int)e->arch <= sm && (!best || e->arch > best->arch)) best = e;
    q += e->hdr + e->size;
  }
  if (!best) {
    why = strf(
        "no PTX for sm_%d or older in it (it holds: %s); compile with "
        "TORCH_CUDA_ARCH_LIST=\"%d.%d+PTX\"",
        sm, seen.empty() ? "nothing" : seen.c_str(), sm / 10, sm % 10);
    return "";
  }
  const u8* d = (const u8*)best + best->hdr;
  std::string out;
  bool ok = false;
  size_t want = best->usize;
  if (getenv("VGPU_FORCE_CUOBJDUMP"))
    ok = false;
  else if (!best->csize && !want) {
    out.assign((const char*)d, best->size);
    ok = true;
  } else {
    size_t cs = best->csize ? best->csize : best->size;
    if (cs > best->size) cs = best->size;
    u32 m;
    memcpy(&m, d, 4);
    ok = m == 0xfd2fb528u ? zstd(d, cs, out, want) : lz4(d, cs, out, want);
  }
  if (!ok) {
    out = from_cuobjdump(path, best->arch);
    if (out.empty()) {
      why = strf(
          "PTX sm_%u is compressed in an unknown way (flags 0x%llx) and cuobjdump gave nothing",
          best->arch, (unsigned long long)best->flags);
      return "";
    }
  }
  while (!out.empty() && !out.back()) out.pop_back();
  if (out.find('\0') != std::string::npos) out.resize(out.find('\0'));
  *target = best->arch;
  return out;
}
}  // namespace vgpu
