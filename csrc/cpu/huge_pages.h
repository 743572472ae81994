// Large memory in huge pages: new memory is faulted in page by page as it is written, which in
// pages of 4 KiB costs as much as several passes over it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fmm::cpu {

// Asks for huge pages in [data, data + bytes). Advice: the system may be set to never heed it, or
// have none free, and then nothing changes. Below 4 MiB little of it would be whole pages. static:
// the instruction sets must not share its code.
static inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < 2 * kPage) return;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fmm::cpu
