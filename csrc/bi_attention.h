// bi_attention: one score matrix s [M, N] per (b, h), softmax over either axis.
#pragma once

#include "common/params.h"

namespace fmm {

struct BiAttention {
  int64_t B, H, M, N, D, Dv_x, Dv_y;  // v_x [.., M, Dv_x], v_y [.., N, Dv_y]
  Tensor4 qk_x, qk_y, v_x, v_y, bias;
  KeyMask mask_x, mask_y;
  float scale;
  float clamp;  // +inf: none
  Dropout dropout;
  // All heads meet one x (stride 0 over heads): o_x and the gradients at x are sums over heads.
  bool sum_heads;
  // Forward's results, contiguous: o_x [B, H or 1, M, Dv_y], o_y [B, H, N, Dv_x] in the input
  // dtype.
  void *o_x, *o_y;
  double *lse_x, *lse_y;  // natural log
};

struct BiAttentionGrad {
  Tensor4 do_x, do_y, o_x, o_y;  // o_x absent with sum_heads
  const double *lse_x, *lse_y;   // contiguous
  const float *dlse_x, *dlse_y;
  // Gradients, contiguous, nullptr where not needed; dbias fp32 with bias-like strides, zeroed.
  // With sum_heads, scale 1 and D == Dv_x, dv_x may be dqk_x: the sum of both.
  void *dqk_x, *dqk_y, *dv_x, *dv_y;
  float* dbias;
  int64_t dbias_stride[4];
};

}  // namespace fmm
