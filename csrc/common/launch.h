// The one way to launch a CUDA kernel: device guard, current stream, opt-in shared memory, grid
// limit, launch check. c10 headers only: ATen's CUDA context wants cusparse.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "check.h"

namespace fmm::cuda {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;  // blocks along x

// Bytes of shared memory that a block may have on the tensor's device.
inline int max_shared(const at::Tensor& on) {
  int bytes = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, on.device().index()));
  return bytes;
}

// And all blocks of a multiprocessor together.
inline int shared_of_multiprocessor(const at::Tensor& on) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                        on.device().index()));
  return bytes;
}

inline int multiprocessors(const at::Tensor& on) {
  int n = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, on.device().index()));
  return n;
}

// Runs `function(params)` on `grid` blocks, on the current stream of the device of `on`.
template <typename Params>
void launch(const void* function, int64_t grid, int threads, int smem, const Params& params,
            const at::Tensor& on) {
  if (grid == 0) return;
  FMM_CHECK(grid <= kMaxGrid, "a grid of ", grid, " blocks is above ", kMaxGrid);
  const c10::cuda::CUDAGuard guard(on.device());
  if (smem > 48 * 1024) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  }
  Params copy = params;
  void* arguments[] = {&copy};
  C10_CUDA_CHECK(cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)), dim3(threads),
                                  arguments, smem, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fmm::cuda
