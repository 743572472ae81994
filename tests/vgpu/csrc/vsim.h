// The simulator's only door: a table of C functions exported by libvgpu_sim.so, used by the CUDA
// runtime (cuda/) and by Python (sim.py). The caller owns all memory and chooses its addresses;
// the simulator keeps modules and the last fault. Not thread-safe: one call at a time.
#pragma once
#include <stdint.h>

#define VSIM_VERSION 1

enum vsim_check {       // bounds, alignment, barriers and asynchronous copies are always checked
  VSIM_RACE = 1,        // shared memory, between warps
  VSIM_INIT = 2,        // reads of shared memory that was never written
  VSIM_LANES = 4,       // shared memory, between lanes of a warp
  VSIM_LINE_COUNTS = 8  // not a check: executions per PTX line in the statistics
};

enum vsim_fault_kind {
  VSIM_OK,
  VSIM_ADDRESS,      // out of bounds, or a write to constant memory
  VSIM_ALIGNMENT,    // misaligned
  VSIM_UNINIT,       // shared memory that was never written
  VSIM_DATA_RACE,    // shared memory accesses without synchronisation in between
  VSIM_ASYNC,        // bytes or registers of an outstanding asynchronous operation, missing fence
  VSIM_BARRIER,      // divergence, member masks, misuse of an mbarrier
  VSIM_DEADLOCK,     // no warp can proceed
  VSIM_TRAP,         // trap instruction
  VSIM_ASSERT,       // assert()
  VSIM_LIMIT,        // too many instructions, endless loop
  VSIM_UNSUPPORTED,  // PTX that the simulator does not know
  VSIM_INVALID,      // operands or launch parameters out of their domain
  VSIM_FAULT_KINDS
};

extern "C" {
typedef struct vsim_module vsim_module;

struct vsim_fault {
  int kind;          // vsim_fault_kind
  const char* name;  // of the kind, e.g. "race"
  const char* text;  // for people: kernel, PTX line, thread, what happened
  uint32_t line;     // of the PTX, 0 unknown
  int has_thread, has_address;
  uint32_t cta[3], thread[3];
  uint64_t address;  // of global memory
};

// A range of device memory that a kernel may touch. Ranges are sorted by base and disjoint.
struct vsim_range {
  uint64_t base, size;
  void* host;        // where its bytes are
  uint8_t* map;      // null, or a byte per byte that launches or with 1 (read) and 2 (written)
  const char* name;  // for reports
  uint32_t readonly;
};

// Gives a module variable its device address (0: no memory) and says where its bytes are.
typedef uint64_t (*vsim_place_fn)(void* ctx, const char* name, uint64_t size, uint64_t align,
                                  int readonly, void** host);

struct vsim_launch {
  const char* kernel;
  uint32_t grid[3], block[3], cluster[3];
  uint32_t smem;    // dynamic shared memory, bytes
  uint32_t checks;  // of vsim_check
  uint64_t seed, max_insts;
  const void* params;
  const struct vsim_range* ranges;
  uint32_t param_bytes, num_ranges;
};

struct vsim_api {
  uint32_t version;  // VSIM_VERSION
  const char* name;
  // Parses PTX and writes the initial values of its variables where place() says.
  vsim_module* (*load)(const char* ptx, vsim_place_fn place, void* ctx);
  void (*unload)(vsim_module*);
  const char* (*kernels)(vsim_module*);                     // JSON: names, parameters
  int (*decode)(vsim_module*, const char* kernel);          // 0, or -1 and a fault
  const char* (*launch)(vsim_module*, const vsim_launch*);  // JSON: counters; null and a fault
  const vsim_fault* (*fault)();                             // the last one
  // Fills a 128-byte tensor map in the simulator's own encoding; arguments as validated by
  // cuTensorMapEncodeTiled, dtype is a CUtensorMapDataType.
  void (*tensor_map)(void* out, int dtype, int rank, uint64_t base, const uint64_t* dim,
                     const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride,
                     int swizzle, int fill_nan);
};

// The table, or null if the caller was built against another version of this header.
const vsim_api* vsim_get(uint32_t version);
typedef const vsim_api* (*vsim_get_fn)(uint32_t version);
}
