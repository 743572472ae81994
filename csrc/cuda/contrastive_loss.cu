// contrastive_loss: a block reduces tiles of s to partial statistics of rows and of columns, which
// merge in order; the backward turns tiles into scale * ds. Positives stay apart from negatives
// throughout. No atomics.
#include "pair_kernels.cuh"

namespace fmm::cuda {

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
        const float top = quad_max(top_[m][h]);
        const float sum = quad_sum(sum_[m][h] * exp2_fast(top_[m][h] - finite_or(top, 0.0f)));
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
      const auto self = [&](int m, int n, int i) { return s[m][n][i]; };
      if (p_.part_x) {
#pragma unroll
        for (int k = 0; k < 2 * kMT; ++k) {
          const int m = k / 2, h = k % 2;
          const float top = fmaxf(fold_row<kNT>(m, h, Most(), self) * kLog2e, top_[m][h]);
          const float safe = finite_or(top, 0.0f);
          const float sum = fold_row<kNT>(
              m, h, Add(), [&](int m, int n, int i) { return exp_of(s[m][n][i], safe); });
          sum_[m][h] = sum_[m][h] * exp2_fast(top_[m][h] - safe) + sum;
          top_[m][h] = top;
        }
      }
      if (p_.part_y) columns_lse(kNegTop, s, [](int, int, int) { return true; });
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
    float top_[kMT][2], sum_[kMT][2], total_[kMT][2], count_[kMT][2];  // a lane's shares
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

// A thread merges all parts of one row or column, in order.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Merge a) {
  const int64_t at = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (at >= a.G * a.L) return;
  const auto part = [&](int64_t i, int stat) {
    return a.part[(i * kPartStats + stat) * a.G * a.L + at];
  };
  double r[6];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float top = -kInf;
    for (int64_t i = 0; i < a.parts; ++i) top = fmaxf(top, part(i, 2 * k));
    const float safe = finite_or(top, 0.0f);
    double sum = 0.0;
    for (int64_t i = 0; i < a.parts; ++i) {
      sum += double{part(i, 2 * k + 1)} * exp2_fast(part(i, 2 * k) - safe);
    }
    r[k] = sum == 0.0 ? -kInf : safe / double{kLog2e} + log(sum);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    double sum = 0.0;
    for (int64_t i = 0; i < a.parts; ++i) sum += part(i, kSumPos + k);
    r[2 + k] = sum;
  }
  double* to = a.stats + at / a.L * a.stride[1] + at % a.L;
#pragma unroll
  for (int k = 0; k < 6; ++k) {
    double& v = to[k * a.stride[0]];
    v = !a.join ? r[k] : k < 2 ? log_add(v, r[k]) : v + r[k];
  }
}

}  // namespace

PairKernels contrastive_kernels(DType dtype, int width) {
  return kernels_of<Contrastive>(dtype, width);
}
Kernel merge_parts() {
  return {reinterpret_cast<const void*>(&merge_kernel), kMergeThreads, 0, kMergeThreads, 0};
}

}  // namespace fmm::cuda
