// The simulator as vgpu sees it: a table of C functions exported by libvgpu_sim.so.
// sim_ptxsim.cpp implements it over ptxsim; sim_stub.cpp only logs.
#pragma once
#include <stddef.h>
#include <stdint.h>
extern "C" {
struct vsim_range {
  uint64_t base, size;
  uint64_t id;
  uint32_t readonly;
  const char* name;
  void* host;
};
struct vsim_cfg {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t smem;
  uint64_t seed;
  uint32_t checks;
  uint64_t max_insts;
  uint32_t arch, num_sms;
};
enum { VSIM_RACE = 1, VSIM_INIT = 2, VSIM_SHADOW = 4, VSIM_LANES = 8 };
// Gives a module variable its device address (0: no memory) and where its bytes are.
typedef uint64_t (*vsim_place_fn)(void* ctx, const char* name, uint64_t size, uint64_t align,
                                  void** host);
struct vsim_api {
  int version;  // 1
  const char* name;
  // Parse PTX; every .global/.const variable is placed at the address that place() returns.
  void* (*load)(const char* ptx, vsim_place_fn place, void* ctx);
  void (*unload)(void* mod);
  // Memory the kernel may touch: sorted, disjoint, base is the device address, host where its bytes
  // are. Returns statistics as JSON, or null when a check fired (then error()).
  const char* (*launch)(void* mod, const char* kernel, const vsim_cfg* cfg, const void* params,
                        uint32_t nparams, const vsim_range* ranges, uint32_t nranges);
  const char* (*error)();
  // Fill a 128-byte CUtensorMap in the simulator's own encoding (arguments already validated;
  // dtype is a CUtensorMapDataType).  Null when tensor maps are not supported.
  void (*tensor_map)(void* out, int dtype, int rank, uint64_t base, const uint64_t* dim,
                     const uint64_t* stride, const uint32_t* box, const uint32_t* estride,
                     int swizzle, int fill_nan);
};
typedef const vsim_api* (*vsim_entry_fn)();  // symbol: vsim_get
}
