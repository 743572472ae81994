// From run-time dtype and width to template arguments: the only list of instantiations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "params.h"

namespace fmm {

template <typename T>
struct TypeTag {
  using Type = T;
};

// The padded width that serves `width`, up to 256.
inline int padded_width(int64_t width) {
  for (int w : {32, 64, 128}) {
    if (width <= w) return w;
  }
  return 256;
}

template <typename T, typename F>
auto pick_width(int width, const F& f) {
  switch (width) {
    case 32:
      return f(TypeTag<T>(), std::integral_constant<int, 32>());
    case 64:
      return f(TypeTag<T>(), std::integral_constant<int, 64>());
    case 128:
      return f(TypeTag<T>(), std::integral_constant<int, 128>());
    default:
      return f(TypeTag<T>(), std::integral_constant<int, 256>());
  }
}

// f(TypeTag<T>).
template <typename F>
auto pick(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kHalf:
      return f(TypeTag<__half>());
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>());
    default:
      return f(TypeTag<float>());
  }
}

// f(TypeTag<T>, width as a constant) for a padded width.
template <typename F>
auto pick(DType dtype, int width, const F& f) {
  return pick(dtype,
              [&](auto type) { return pick_width<typename decltype(type)::Type>(width, f); });
}

}  // namespace fmm
