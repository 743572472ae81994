// co_attention: two directions of attention, each with its own score matrix.
#pragma once

#include "common/params.h"

namespace fmm {

// One direction: M queries look at N keys.
struct AttentionSide {
  int64_t M, N, D, Dv;
  Tensor4 q, k, v, bias;
  KeyMask mask;  // of the keys
  float scale;
  void* o;      // contiguous [B, H, M, Dv]
  double* lse;  // contiguous [B, H, M], natural log
};

struct AttentionSideGrad {
  Tensor4 d_o, o;
  const double* lse;
  const float* dlse;
  void *dq, *dk, *dv;  // contiguous, nullptr where not needed
  float* dbias;        // fp32 with bias-like strides, zeroed; nullptr where not needed
  int64_t dbias_stride[4];
};

struct CoAttention {
  int64_t B, H;
  AttentionSide side[2];  // x looks at y, y looks at x
  Dropout dropout;
};

struct CoAttentionGrad {
  AttentionSideGrad side[2];
};

}  // namespace fmm
