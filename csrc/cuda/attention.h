// What the attention kernels take. Both ops are pairs of streams: a's tokens look at b's and, in
// bi_attention, b's at a's through the same scores. No torch headers.
#pragma once

#include "../common/params.h"

namespace fmm::cuda {

// `vectors`: elements of a row are adjacent and every row starts at a multiple of 16 bytes.
struct Strided : Tensor4 {
  bool vectors = false;
};

// Rows of Stats, each [B * H, padded]: lse in base 2 as hi + lo, delta = rowsum(do * o) - dlse, up
// = 2^(lse - centre) and down = 2^(centre - lse).
enum Stat { kHi, kLo, kDelta, kUp, kDown, kStats };
constexpr int kStatRows = 64;  // `padded` is a multiple

struct Stats {
  float* data = nullptr;
  float* far = nullptr;  // [B * H, padded / 16]: max |lse - centre| of 16 rows
  int64_t padded = 0;
};

struct Stream {
  int64_t rows = 0, width_v = 0, width_o = 0;
  Strided qk;         // [B, H, rows, D]
  Strided v;          // [B, H, rows, width_v], as keys
  KeyMask keep;       // as keys
  Strided d_o, o_in;  // [B, H, rows, width_o], as queries
  Stats stats;
  const float* dlse = nullptr;  // nullptr: 0
  double* lse = nullptr;        // natural log; the forward writes it
  void* o = nullptr;            // this and what follows: contiguous results
  void *dqk = nullptr, *dv = nullptr;
};

// s[m, n] = clamp(scale * <a.qk[m], b.qk[n]>) + bias[m, n]. `plain`: neither clamp nor bias, and a
// positive scale, which then moves into the exponent.
struct Pair {
  Stream a, b;
  int64_t width = 0;  // D
  Tensor4 bias;
  float scale = 1.0f, clamp = 0.0f;  // clamp: +inf for none
  bool plain = true;
  int drop_a = 0, drop_b = 1;      // dropout's direction where a, and where b looks
  bool flip = false;               // dropout counts b's tokens as m, a's as n
  const double* centre = nullptr;  // [B * H] with stride: an lse near which all others should lie
  int64_t centre_stride = 0;
  // Where a's tokens are too few to keep the device busy, blocks share their keys: each walks
  // `chunk` of b's tokens and leaves its share of a's results, to be merged in order.
  int64_t chunks = 1, chunk = 0;
  float* part = nullptr;       // forward [B * H, chunks, rows, width_o]; backward [.., D + width_v]
  double* part_lse = nullptr;  // [B * H, chunks, rows], base 2
};

struct Attention {
  int64_t B = 0, H = 0;
  Pair pair[2];
  int64_t first = 0;  // programs of pair[0]; the others run pair[1]
  Dropout dropout;
};

// bi_attention whose stream b = pair[0].b is resident: a block walks `chunk` rows of a, and leaves
// its share of b's results in `part` if a head has several chunks, to be merged in order.
struct Resident {
  Attention all;
  int64_t chunks, chunk;
  float* part;  // as Pair's
  double* part_lse;
};

// Gradient of a bias [B or 1, H or 1, M or 1, N or 1], contiguous: ds of pair[0] summed over the
// dimensions of size 1.
struct BiasGrad {
  Attention all;
  float* db;
  int64_t sizes[4];
};

// The same scores with the streams' parts exchanged.
inline Pair swapped(const Pair& p) {
  Pair r = p;
  r.a = p.b, r.b = p.a;
  r.bias.stride[2] = p.bias.stride[3], r.bias.stride[3] = p.bias.stride[2];
  r.drop_a = p.drop_b, r.drop_b = p.drop_a;
  r.flip = !p.flip;
  return r;
}

}  // namespace fmm::cuda
