// The machine's ceiling: as many independent chains of multiply-add in registers as the
// micro-kernel has accumulators, nothing loaded or stored. Benchmarks divide by it.
#include "kernels.h"
#include "tile.h"

namespace fmm::cpu::FMM_ISA {
namespace {

constexpr int kChains = 2 * kRegRows;  // the accumulators of the micro-kernel

// The float chains multiply the accumulator: a loop-invariant product would be hoisted.
FMM_INLINE Vec link(Vec acc, float a, Vec b) { return acc * b + a; }
#if defined(__AVX512BF16__)
FMM_INLINE Vec link(Vec acc, Bf2 a, Vec b) { return dot(acc, a, b); }
#endif

// `rounds` products on each chain; the sum depends on all of them.
template <class U>
float chains(U a, Vec b, int64_t rounds) {
  Vec acc[kChains];
  for (int c = 0; c < kChains; ++c)
    acc[c] = splat(static_cast<float>(c));  // equal ones would merge
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) acc[c] = link(acc[c], a, b);
  }
  Vec total{};
  for (int c = 0; c < kChains; ++c) total += acc[c];
  return sum(total);
}

}  // namespace

void fma_chains(int64_t rounds, bool bf16, double* flop) {
  volatile float seed = 0.0f, sink;  // a value the compiler cannot know, and one it cannot drop
  *flop = 2.0 * kChains * kLanes * static_cast<double>(rounds);
#if defined(__AVX512BF16__)
  if (bf16) {
    *flop *= kPerUnit<Bf2>;
    sink = chains(Bf2{static_cast<uint32_t>(seed)}, splat(seed), rounds);
    return;
  }
#endif
  static_cast<void>(bf16);  // elsewhere bf16 is multiplied as float
  sink = chains(float{seed}, splat(seed), rounds);
  static_cast<void>(sink);
}

}  // namespace fmm::cpu::FMM_ISA
