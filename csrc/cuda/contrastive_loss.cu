// contrastive_loss: a block reduces tiles of s to partial statistics of rows and of columns, which
// merge in order; the backward turns tiles into scale * ds. Positives stay apart from negatives
// throughout. No atomics.
#include "pair_kernels.cuh"

namespace fmm::cuda {

constexpr float kNear = 90.0f, kLeast = 0x1p-90f;  // how far sums may lie from what they refer to

// Exponents are base 2 and start from fl(top * log2(e)), the same in every use.
__device__ inline float exp_of(float s, float top2) { return exp2_fast(fmaf(s, kLog2e, -top2)); }

struct Contrastive {
  static constexpr int kSums = 1;  // of ds * dots

  template <typename S>
  class Forward {
   public:
    static constexpr int kMT = S::kMT, kNT = S::kNT;

    // Of a row: its positives as in PartStat, entries outside the denominator, and ScoreRows.
    // clang-format off
    enum RowStat {
      kRowPosTop, kRowPosSum, kRowSumPos, kRowCountPos, kRowOut, kRowScale, kRowMate, kRowStats
    };
    // clang-format on

    struct Room {
      float top[S::kWarps][S::kCols];  // of a warp's columns, finite
      float columns[kPartStats][S::kWarps][S::kCols];
      float rows[kRowStats][S::kRows];  // what few tiles add to
      int positives[S::kWarps];         // whether a warp has any in the tile
    };

    __device__ Forward(const PairForward& p, const BlockAt<S>& block, Room& room)
        : p_(p), block_(block), room_(room) {
      const ScoreRows<kMT> known(p.scores, block.lane(0));
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        const int m = k / 2, h = k % 2;
        top_[m][h] = -kInf, sum_[m][h] = total_[m][h] = 0.0f;
        if (threadIdx.x % 4 != 0) continue;
        for (int i = 0; i < kRowStats; ++i) {
          room.rows[i][local(m, h)] = i == kRowPosTop ? -kInf : 0.0f;
        }
        room.rows[kRowScale][local(m, h)] = known.scale[m][h];
        room.rows[kRowMate][local(m, h)] = __int_as_float(known.mate[m][h]);
      }
    }

    // Products in, nothing of use left. The block's threads have passed a barrier since the tile
    // before.
    __device__ void tile(float (&s)[kMT][kNT][4], int n0) {
      ScoreRows<kMT> known;
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        const int m = k / 2, h = k % 2;
        known.scale[m][h] = room_.rows[kRowScale][local(m, h)];
        known.mate[m][h] = __float_as_int(room_.rows[kRowMate][local(m, h)]);
      }
#pragma unroll
      for (int i = 0; i < kMT * kNT * 4; ++i) {
        s[i / (kNT * 4)][i / 4 % kNT][i % 4] *= known.scale[i / (kNT * 4)][i % 4 / 2];
      }
      PairBits<kMT> pos, out;
      if (find_matches<kMT, kNT>(pos, out, p_.scores, known, block_.lane(n0))) {
        reduce<true>(s, pos, out);
      } else {
        reduce<false>(s, pos, out);
      }
      if (!p_.part_y) return;
      __syncthreads();  // orders the warps' shares before their merging
      merge_warps(n0);
    }

    __device__ void finish() {
      if (!p_.part_x) return;
      const LaneAt at = block_.lane(0);
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        const int m = k / 2, h = k % 2, row = at.row_of(m, 2 * h);
        float top = quad_max(top_[m][h]);
        const float sum = quad_sum(sum_[m][h] * exp2_fast(top_[m][h] - finite_or(top, 0.0f)));
        if (sum == 0.0f) top = -kInf;  // a reference without entries
        const float total = quad_sum(total_[m][h]);
        if (threadIdx.x % 4 != 0 || row >= p_.scores.M) continue;
        const auto to = [&](int stat) -> float& {
          return *part(p_.part_x, block_.part, stat, p_.scores.M, row);
        };
        const auto own = [&](RowStat stat) { return room_.rows[stat][local(m, h)]; };
        to(kNegTop) = top, to(kNegSum) = sum, to(kTotal) = total;
        to(kCount) = static_cast<float>((block_.end - block_.begin) * S::kCols) - own(kRowOut);
        to(kPosTop) = own(kRowPosTop), to(kPosSum) = own(kRowPosSum);
        to(kSumPos) = own(kRowSumPos), to(kCountPos) = own(kRowCountPos);
      }
    }

   private:
    static __device__ int warp() { return threadIdx.x / 32; }
    static __device__ int local(int m, int h) {
      return warp() * 16 * kMT + threadIdx.x % 32 / 4 + 16 * m + 8 * h;
    }
    __device__ float* part(float* base, int64_t at, int stat, int64_t L, int64_t i) const {
      return base + ((at * kPartStats + stat) * p_.scores.G + block_.g) * L + i;
    }
    __device__ float* columns(int stat) { return room_.columns[stat][warp()]; }

    template <bool kMarked>
    __device__ void reduce(float (&s)[kMT][kNT][4], const PairBits<kMT>& pos, PairBits<kMT> out) {
      const auto value = [&](int m, int n, int i) {
        return kMarked && out.has(m, n, i) ? 0.0f : s[m][n][i];
      };
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        total_[k / 2][k % 2] += fold_row<kNT>(k / 2, k % 2, Add(), value);
      }
      if (p_.part_y) {
        if (kMarked) out = out.anew();
        fold_columns<kMT, kNT>(columns(kTotal), Add(), value);
        if constexpr (kMarked) {
          fold_columns<kMT, kNT>(columns(kCount), Add(), [&](int m, int n, int i) {
            return out.has(m, n, i) ? 0.0f : 1.0f;
          });
        } else {
          *reinterpret_cast<float2*>(columns(kCount) + threadIdx.x % 32 * 2) =
              make_float2(16.0f * kMT, 16.0f * kMT);
        }
      }
      bool any = false;
      if constexpr (kMarked) {
        uint32_t bits = 0;
#pragma unroll
        for (int m = 0; m < kMT; ++m) bits |= pos.word[m];
        any = __any_sync(~0u, bits != 0);
        if (any) positives(s, pos);
#pragma unroll
        for (int k = 0; k < 2 * kMT; ++k) {
          const uint32_t half = 0x33333333u << k % 2 * 2;
          const float outside = quad_sum(__popc(out.word[k / 2] & half));
          if (threadIdx.x % 4 == 0) room_.rows[kRowOut][local(k / 2, k % 2)] += outside;
        }
#pragma unroll
        for (int i = 0; i < kMT * kNT * 4; ++i) {
          const int m = i / (kNT * 4), n = i / 4 % kNT;
          if (pos.has(m, n, i % 4) || out.has(m, n, i % 4)) s[m][n][i % 4] = -kInf;
        }
      }
      if (threadIdx.x % 32 == 0) room_.positives[warp()] = any;
      if (ref_ == kInf) ref_ = reference(s);
      if (!kMarked && common_ && one_reference(s)) return;
      const auto self = [&](int m, int n, int i) { return s[m][n][i]; };
      if (p_.part_x) {
        bool near = true;
#pragma unroll
        for (int k = 0; k < 2 * kMT; ++k) {
          const int m = k / 2, h = k % 2;
          const float top = fmaxf(fold_row<kNT>(m, h, Most(), self) * kLog2e, top_[m][h]);
          const float safe = finite_or(top, 0.0f);
          const float sum = fold_row<kNT>(
              m, h, Add(), [&](int m, int n, int i) { return exp_of(s[m][n][i], safe); });
          sum_[m][h] = sum_[m][h] * exp2_fast(top_[m][h] - safe) + sum;
          top_[m][h] = top;
          near = near && (sum_[m][h] == 0.0f || fabsf(top - ref_) <= kNear);
        }
        common_ = common_ && __all_sync(~0u, near);
        if (common_ && ref_ < kInf) {
#pragma unroll
          for (int k = 0; k < 2 * kMT; ++k) {
            const float top = top_[k / 2][k % 2];
            sum_[k / 2][k % 2] *= exp2_fast(finite_or(top, ref_) - ref_), top_[k / 2][k % 2] = ref_;
          }
        }
      }
      if (p_.part_y) columns_lse(kNegTop, s, [](int, int, int) { return true; });
    }

    // The largest of the warp's entries, or 0 if that is not finite; +inf: there are none.
    __device__ float reference(const float (&s)[kMT][kNT][4]) const {
      float most = -kInf;
#pragma unroll
      for (int i = 0; i < kMT * kNT * 4; ++i) {
        most = fmaxf(most, s[i / (kNT * 4)][i / 4 % kNT][i % 4]);
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      return most == -kInf ? kInf : fabsf(most) < kInf ? most * kLog2e : 0.0f;
    }

    // Sums of rows and of columns from one exponential an entry; false, and nothing added, where
    // one is too far from ref_ to be exact.
    __device__ bool one_reference(const float (&s)[kMT][kNT][4]) {
      float v[2 * kNT], sum[kMT][2], least = kInf, most = 0.0f;
#pragma unroll
      for (int i = 0; i < kMT * kNT * 4; ++i) {
        const int m = i / (kNT * 4), n = i / 4 % kNT, c = i % 2, h = i % 4 / 2;
        const float e = exp_of(s[m][n][i % 4], ref_);
        float &of_row = sum[m][h], &of_column = v[2 * n + c];
        of_row = n == 0 && c == 0 ? e : of_row + e;
        of_column = m == 0 && h == 0 ? e : of_column + e;
      }
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        least = fminf(least, sum[k / 2][k % 2]), most = fmaxf(most, sum[k / 2][k % 2]);
      }
      if (p_.part_y) {
        share<kNT, 16>(v, Add());
        least = fminf(least, fminf(v[0], v[1])), most = fmaxf(most, fmaxf(v[0], v[1]));
      }
      // With the exponents of fp32 in reserve for what is far below a sum.
      if (!__all_sync(~0u, least >= kLeast && most <= 1.0f / kLeast)) return false;
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        sum_[k / 2][k % 2] += sum[k / 2][k % 2], top_[k / 2][k % 2] = ref_;
      }
      const int lane = threadIdx.x % 32;
      if (p_.part_y) {
        *reinterpret_cast<float2*>(columns(kNegTop) + 2 * lane) = make_float2(ref_, ref_);
        *reinterpret_cast<float2*>(columns(kNegSum) + 2 * lane) = make_float2(v[0], v[1]);
      }
      return true;
    }

    // Maximum and sum of exponentials of a warp's columns where in(m, n, i).
    template <typename In>
    __device__ void columns_lse(int stat, const float (&s)[kMT][kNT][4], const In& in) {
      const int lane = threadIdx.x % 32;
      fold_columns<kMT, kNT>(columns(stat), Most(),
                             [&](int m, int n, int i) { return in(m, n, i) ? s[m][n][i] : -kInf; });
      // A lane's own columns: no other lane reads or writes them before the barrier below.
      float2& top = *reinterpret_cast<float2*>(columns(stat) + 2 * lane);
      top = make_float2(top.x * kLog2e, top.y * kLog2e);
      *reinterpret_cast<float2*>(&room_.top[warp()][2 * lane]) =
          make_float2(finite_or(top.x, 0.0f), finite_or(top.y, 0.0f));
      __syncwarp();  // orders the maxima before their reads
      const float* refs = &room_.top[warp()][lane % 4 * 2];
      fold_columns<kMT, kNT>(columns(stat + 1), Add(), [&](int m, int n, int i) {
        return in(m, n, i) ? exp_of(s[m][n][i], refs[8 * n + i % 2]) : 0.0f;
      });
      __syncwarp();  // orders the reads of the maxima before their overwriting
    }

    // A warp's positives: into the rows' own, and the columns' statistics of the tile.
    __device__ void positives(const float (&s)[kMT][kNT][4], PairBits<kMT> pos) {
      const auto in = [&](int m, int n, int i) { return pos.has(m, n, i); };
      const auto value = [&](int m, int n, int i) { return in(m, n, i) ? s[m][n][i] : 0.0f; };
      const auto one = [&](int m, int n, int i) { return in(m, n, i) ? 1.0f : 0.0f; };
#pragma unroll
      for (int k = 0; k < 2 * kMT; ++k) {
        const int m = k / 2, h = k % 2, at = local(m, h);
        const float most = quad_max(fold_row<kNT>(
            m, h, Most(), [&](int m, int n, int i) { return in(m, n, i) ? s[m][n][i] : -kInf; }));
        float& old = room_.rows[kRowPosTop][at];
        const float top =
            fmaxf(__shfl_sync(~0u, threadIdx.x % 4 == 0 ? old : 0.0f, 0, 4), most * kLog2e);
        const float safe = finite_or(top, 0.0f);
        const float sum = quad_sum(fold_row<kNT>(m, h, Add(), [&](int m, int n, int i) {
          return in(m, n, i) ? exp_of(s[m][n][i], safe) : 0.0f;
        }));
        const float total = quad_sum(fold_row<kNT>(m, h, Add(), value));
        const float count = quad_sum(fold_row<kNT>(m, h, Add(), one));
        if (threadIdx.x % 4 == 0) {
          float& shares = room_.rows[kRowPosSum][at];
          shares = shares * exp2_fast(old - safe) + sum, old = top;
          room_.rows[kRowSumPos][at] += total, room_.rows[kRowCountPos][at] += count;
        }
      }
      if (!p_.part_y) return;
      pos = pos.anew();
      columns_lse(kPosTop, s, in);
      fold_columns<kMT, kNT>(columns(kSumPos), Add(), value);
      fold_columns<kMT, kNT>(columns(kCountPos), Add(), one);
    }

    // Joins the warps' statistics of a column, a thread each.
    __device__ void merge_warps(int n0) {
      const int c = threadIdx.x, col = n0 + c;
      if (c >= S::kCols || col >= p_.scores.N) return;
      float r[kPartStats] = {-kInf, 0.0f, -kInf, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        join(r[kNegTop], r[kNegSum], kNegTop, w, c);
        r[kTotal] += room_.columns[kTotal][w][c], r[kCount] += room_.columns[kCount][w][c];
        if (!room_.positives[w]) continue;
        join(r[kPosTop], r[kPosSum], kPosTop, w, c);
        r[kSumPos] += room_.columns[kSumPos][w][c];
        r[kCountPos] += room_.columns[kCountPos][w][c];
      }
#pragma unroll
      for (int k = 0; k < kPartStats; ++k) {
        *part(p_.part_y, block_.tile_m, k, p_.scores.N, col) = r[k];
      }
    }
    __device__ void join(float& top, float& sum, int stat, int w, int c) const {
      const float other = room_.columns[stat][w][c], most = fmaxf(top, other);
      const float safe = finite_or(most, 0.0f);
      sum = sum * exp2_fast(top - safe) + room_.columns[stat + 1][w][c] * exp2_fast(other - safe);
      top = most;
    }

    const PairForward& p_;
    const BlockAt<S>& block_;
    Room& room_;
    float top_[kMT][2], sum_[kMT][2], total_[kMT][2];  // a lane's shares
    // What all entries of the warp's rows refer to, in base 2, while all sums lie near it.
    float ref_ = kInf;  // +inf: not known yet
    bool common_ = true;
  };

  struct Known {
    float hi, lo, weight, shift, scale;

    Known() = default;
    template <int kRows>
    static __device__ void two(Known (&k)[2], FactTile<kRows> t, int row) {
      t.two(kLseHi, row, k[0].hi, k[1].hi), t.two(kLseLo, row, k[0].lo, k[1].lo);
      t.two(kWeight, row, k[0].weight, k[1].weight), t.two(kShift, row, k[0].shift, k[1].shift);
      t.two(kScale, row, k[0].scale, k[1].scale);
    }
    template <int kRows>
    __device__ Known(FactTile<kRows> t, int row)
        : hi(t.at(kLseHi, row)),
          lo(t.at(kLseLo, row)),
          weight(t.at(kWeight, row)),
          shift(t.at(kShift, row)),
          scale(t.at(kScale, row)) {}
    // Without weight 0 even where s is NaN.
    __device__ float p(float s) const {
      return weight == 0.0f ? 0.0f : exp2_fast(fmaf(s, kLog2e, -hi) - lo);
    }
    __device__ float ds(float s) const { return fmaf(p(s), weight, -shift); }
    // p - target, or its value at a single positive.
    template <int kRows>
    __device__ float ds_match(float s, FactTile<kRows> t, int row) const {
      const float single = t.at(kSingle, row), target = t.at(kTarget, row);
      return weight == 0.0f ? 0.0f : fmaf(single <= 1.0f ? single : p(s) - target, weight, -shift);
    }
  };
  static __device__ float score(float s, float) { return s; }
  static __device__ float ds(float s, const Known& r, const Known& c) { return r.ds(s) + c.ds(s); }
  template <int kRows, int kCols>
  static __device__ float ds_marked(bool match, float s, const Known& r, const Known& c,
                                    FactTile<kRows> rows, int row, FactTile<kCols> cols, int col) {
    float ds = r.ds(s) + c.ds(s);
    if (match) ds = r.ds_match(s, rows, row) + c.ds_match(s, cols, col);
    return ds;
  }
};

namespace {

// log(exp(a) + exp(b))
__device__ inline double log_add(double a, double b) {
  const double top = a > b ? a : b;
  return top == -kInf ? a + b : top + log(exp(a - top) + exp(b - top));
}

constexpr int kMergeThreads = 128;

// kLanes threads merge the parts of one row or column, each every kLanes-th in order, and the first
// of them what they found, in order.
template <int kLanes>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Merge a) {
  constexpr int kRows = kMergeThreads / kLanes;
  const int row = threadIdx.x % kRows, lane = threadIdx.x / kRows;
  const int64_t at = int64_t{blockIdx.x} * kRows + row, all = a.G * a.L;
  const int64_t parts = at < all ? a.parts : 0;
  const auto part = [&](int64_t i, int stat) { return a.part[(i * kPartStats + stat) * all + at]; };
  __shared__ float tops[2][kLanes][kRows];
  __shared__ double sums[6][kLanes][kRows];
  float top[2] = {-kInf, -kInf};
  double sum[6] = {};
#pragma unroll 4
  for (int64_t i = lane; i < parts; i += kLanes) {
#pragma unroll
    for (int k = 0; k < 2; ++k) top[k] = fmaxf(top[k], part(i, 2 * k));
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[2 + k] += part(i, kSumPos + k);
  }
  if constexpr (kLanes > 1) {
    tops[0][lane][row] = top[0], tops[1][lane][row] = top[1];
    __syncthreads();  // orders the lanes' maxima before their reads
#pragma unroll
    for (int i = 0; i < 2 * kLanes; ++i) top[i % 2] = fmaxf(top[i % 2], tops[i % 2][i / 2][row]);
  }
  const float safe[2] = {finite_or(top[0], 0.0f), finite_or(top[1], 0.0f)};
#pragma unroll 4
  for (int64_t i = lane; i < parts; i += kLanes) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sum[k] += double{part(i, 2 * k + 1)} * exp2_fast(part(i, 2 * k) - safe[k]);
    }
  }
  if constexpr (kLanes > 1) {
#pragma unroll
    for (int k = 0; k < 6; ++k) sums[k][lane][row] = sum[k];
    __syncthreads();  // orders the lanes' sums before their reads
    if (lane > 0) return;
#pragma unroll
    for (int k = 0; k < 6; ++k) {
      for (int i = 1; i < kLanes; ++i) sum[k] += sums[k][i][row];
    }
  }
  if (at >= all) return;
  double* to = a.stats + at / a.L * a.stride[1] + at % a.L;
#pragma unroll
  for (int k = 0; k < 6; ++k) {
    double& v = to[k * a.stride[0]];
    if (k < 2) sum[k] = sum[k] == 0.0 ? -kInf : safe[k] / double{kLog2e} + log(sum[k]);
    v = !a.join ? sum[k] : k < 2 ? log_add(v, sum[k]) : v + sum[k];
  }
}

template <int kLanes>
Kernel merge() {
  return {reinterpret_cast<const void*>(&merge_kernel<kLanes>), kMergeThreads / kLanes, 0,
          kMergeThreads, 0};
}

}  // namespace

PairKernels contrastive_kernels(DType dtype, int width) {
  return kernels_of<Contrastive>(dtype, width);
}
// Few rows of many parts would leave most of the device idle.
Kernel merge_parts(int64_t parts, int64_t rows) {
  return parts >= 32 && rows <= 4096 ? merge<16>() : merge<1>();
}

}  // namespace fmm::cuda
