// Picks the instruction set once: the best this machine runs, or what FUSEDMM_CPU_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fmm::cpu {

#define FMM_TABLE(ns)         \
  namespace ns {              \
  FMM_CPU_KERNELS(FMM_EXTERN) \
  }                           \
  static const Kernels table_##ns = {#ns FMM_CPU_KERNELS(FMM_AT)};
#define FMM_EXTERN(name, args) void name args;

#define FMM_AT(name, args) , baseline::name
FMM_TABLE(baseline)
#undef FMM_AT
#if defined(__x86_64__)
#define FMM_AT(name, args) , avx2::name
FMM_TABLE(avx2)
#undef FMM_AT
#define FMM_AT(name, args) , avx512::name
FMM_TABLE(avx512)
#undef FMM_AT
#define FMM_AT(name, args) , avx512bf16::name
FMM_TABLE(avx512bf16)
#undef FMM_AT
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&table_avx512bf16);
  if (avx512) found.push_back(&table_avx512);
  if (avx2) found.push_back(&table_avx2);
#endif
  found.push_back(&table_baseline);
  return found;
}

static const Kernels* choose() {
  const auto found = available();
  const char* wanted = std::getenv("FUSEDMM_CPU_ISA");
  if (!wanted || !*wanted) return found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (std::string(wanted) == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("FUSEDMM_CPU_ISA: expected one of " + names + ", got " + wanted);
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace fmm::cpu
