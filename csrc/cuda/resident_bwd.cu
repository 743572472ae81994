// Backward of bi_attention where one stream is short: a block owns all of its rows and finishes the
// gradients of the other's; seven products a tile, ds of both softmaxes added before the last two.
#include "attention_kernels.h"
#include "owner_bwd.cuh"
#include "tuning.h"

namespace fmm::cuda {
namespace {

template <typename T, int kWidth, int kRows>
__global__ void __launch_bounds__((ResidentBwd<kWidth, kRows>::kThreads), 1)
    resident_bwd_kernel(const __grid_constant__ Attention all) {
  extern __shared__ __align__(1024) char smem[];
  own_rows<true, true, true, T, kWidth, ResidentBwd<kWidth, kRows>>(all, smem);
}

// The resident stream's gradients from the chunks' shares, in order; four numbers a thread.
template <typename T>
__global__ void __launch_bounds__(128) sum_kernel(const __grid_constant__ Resident p) {
  const Stream& s = p.all.pair[0].b;
  const int one = static_cast<int>(s.rows * p.all.pair[0].width);
  const int both = one + static_cast<int>(s.rows * s.width_v);
  const Place place(blockIdx.x, ceil_div(one, 512) + ceil_div(both - one, 512), p.all.H);
  const int blocks = static_cast<int>(ceil_div(one, 512));
  const bool values = place.block >= blocks;
  const int from = values ? one : 0, size = values ? both - one : one;
  const int i = ((values ? place.block - blocks : place.block) * 128 + threadIdx.x) * 4;
  void* out = values ? s.dv : s.dqk;
  if (out == nullptr || i >= size) return;
  const int chunks = static_cast<int>(p.chunks);
  const bool vectors = (one | both) % 4 == 0;
  const float* part = p.part + int64_t{place.head} * chunks * both + from + i;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int c = 0; c < chunks; ++c, part += both) add_scaled4(sum, 1.0f, part, size - i, vectors);
  put4(static_cast<T*>(out) + int64_t{place.head} * size + i, sum, size - i, vectors);
}

// As the resident regime counts: rows of the stream that passes by, columns of the short one.
template <typename T, int kWidth, int kRows>
Kernel kernel() {
  using S = ResidentBwd<kWidth, kRows>;
  constexpr int kBytes = BwdLayout<true, true, T, kWidth, S>::kBytesThrough;
  return {reinterpret_cast<const void*>(&resident_bwd_kernel<T, kWidth, kRows>),
          S::kCols,
          kRows,
          S::kThreads,
          kBytes,
          256 / S::kThreads};
}

}  // namespace

Kernel resident_bwd(DType dtype, int width, int64_t cols) {
  return pick(dtype, width, [cols](auto type, auto w) {
    using T = typename decltype(type)::Type;
    constexpr int kW = w;
    if constexpr (sizeof(T) == 2 && kW <= 128) {
      if constexpr (kW >= 64) {
        if (cols <= 32) return kernel<T, kW, 32>();
      }
      if (cols <= 64) return kernel<T, kW, 64>();
      if (cols <= 128) return kernel<T, kW, 128>();
      if constexpr (kW <= 64) {
        if (cols <= 256) return kernel<T, kW, 256>();
      }
    }
    return Kernel{};
  });
}

Kernel sum_chunks(DType dtype) {
  return pick(dtype, 32, [](auto type, auto) {
    using T = typename decltype(type)::Type;
    return Kernel{reinterpret_cast<const void*>(&sum_kernel<T>), 512, 0, 128, 0};
  });
}

}  // namespace fmm::cuda
