// fma_peak: FLOP/s that `threads` threads reach on register-only products; best of a few tries.
#include <algorithm>
#include <chrono>
#include <vector>

#include "dispatch.h"
#include "launch.h"

namespace fmm::cpu {

double fma_peak(bool bf16, int64_t threads) {
  constexpr int64_t kRounds = 1 << 20;  // about 2 ms: long beside waking a thread
  constexpr int kTries = 5;
  double best = 0.0;
  for (int i = 0; i < kTries; ++i) {
    std::vector<double> flop(threads);
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) kernels().fma_chains(kRounds, bf16, &flop[t]);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    double total = 0.0;
    for (const double f : flop) total += f;
    best = std::max(best, total / took.count());
  }
  return best;
}

}  // namespace fmm::cpu
