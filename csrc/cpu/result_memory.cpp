#include "result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <list>
#include <memory>
#include <mutex>

#include "huge_pages.h"

namespace fmm::cpu {

#if defined(MADV_FREE)
namespace {

constexpr size_t kFrom = size_t{1} << 20;  // malloc keeps what is smaller
constexpr size_t kHeld = size_t{64} << 20;
constexpr size_t kAll = size_t{256} << 20;

struct Block {
  void* data;
  size_t size;
  bool lent = false;
};

class Blocks {
 public:
  // The smallest of the kept ones that is large enough and not a quarter larger, else a new one.
  // Where there is no memory those kept are given back first; then data is null.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->size >= bytes && it->size - bytes <= bytes / 4;
      if (fits && (best == kept_.end() || it->size < best->size)) best = it;
    }
    if (best == kept_.end()) {
      const Block fresh = map(bytes);
      if (fresh.data) return fresh;
      drop(kept_.begin());
      return map(bytes);
    }
    const Block found{best->data, best->size};
    kept_.erase(best);
    return found;
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.size > kAll) {
      munmap(block.data, block.size);
      return;
    }
    kept_.push_front(block);
    size_t total = 0;
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      total += it->size;
      if (total > kAll) return drop(it);
      if (total > kHeld && !it->lent) it->lent = madvise(it->data, it->size, MADV_FREE) == 0;
    }
  }

 private:
  void drop(std::list<Block>::iterator first) {
    for (auto it = first; it != kept_.end(); ++it) munmap(it->data, it->size);
    kept_.erase(first, kept_.end());
  }

  static Block map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return {nullptr, 0};
    prefer_huge_pages(p, bytes);
    return {p, bytes};
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // newest first
};

Blocks& blocks() {
  static Blocks* const one = new Blocks;  // outlives tensors freed at exit
  return *one;
}

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kFrom) return c10::GetCPUAllocator()->allocate(bytes);
    const Block block = blocks().take(bytes);
    if (!block.data) return c10::GetCPUAllocator()->allocate(bytes);  // it has words for it
    c10::profiledCPUMemoryReporter().New(block.data, block.size);
    return {block.data, new Block(block), &release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    blocks().give(*block);
  }
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static ResultAllocator* const allocator = new ResultAllocator;
  constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  return at::detail::empty_generic(sizes, allocator, cpu, dtype, std::nullopt);
}
#else
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}
#endif

}  // namespace fmm::cpu
