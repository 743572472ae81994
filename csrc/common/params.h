// What every kernel's Params struct is made of: tensors as raw pointers with strides in elements.
// No torch headers: kernels are testable and compile in seconds.
#pragma once

#include <cstdint>
#include <functional>

namespace fmm {

enum class DType : int32_t { kFloat, kHalf, kBFloat16 };

// [B, H, rows, width] (losses: H = 1). data == nullptr: absent.
struct Tensor4 {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride[4] = {0, 0, 0, 0};

  int64_t offset(int64_t b, int64_t h, int64_t row) const {
    return b * stride[0] + h * stride[1] + row * stride[2];
  }
};

// [B, keys], true = keep.
struct KeyMask {
  const bool* data = nullptr;
  int64_t stride[2] = {0, 0};

  const bool* row(int64_t b) const { return data ? data + b * stride[0] : nullptr; }
};

// Where a bias takes scores lower, but not to -inf, they count as this: in fp32 lower sums hold
// multiples of 16 of them at best, and a softmax of nothing else would be lost in the rounding of
// its lse, or of what its scores are measured from.
constexpr float kLeastScore = -134217728.0f;  // -2^27

// Bits of element [b, h, m, n]: word n % 4 of Philox4x32-10(seed; n / 4, m, b * H + h, direction).
struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;  // keep where bits >= threshold
  float factor = 1.0f;     // 1 / (1 - p)
};

// Runs body(begin, end) over [0, n) on the caller's threads; the launcher supplies it.
using Body = std::function<void(int64_t, int64_t)>;
using ParallelFor = void (*)(int64_t n, const Body& body);

}  // namespace fmm
