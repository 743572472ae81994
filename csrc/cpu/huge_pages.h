// Large memory in huge pages: new memory is faulted in page by page as it is written, which in
// pages of 4 KiB costs as much as several passes over it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fmm::cpu {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeFrom = 2 * kHugePage;  // little of less would be whole pages

// Asks for huge pages in [data, data + bytes). Advice: the system may be set to never heed it, or
// have none free, and then nothing changes. static: the instruction sets must not
// share code.
static inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kHugeFrom) return;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fmm::cpu
