// Tiles: packing of strided rows into panels, the register-blocked product, and scratch memory.
// A "unit" is one float or two bf16; kBlock rows and columns make a score tile.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "huge_pages.h"
#include "vec.h"

namespace fmm::cpu::FMM_ISA {

constexpr int kBlock = 96;          // rows and columns of a score tile
constexpr int kPanel = 2 * kLanes;  // columns of a packed panel
constexpr int kDepth = 128;  // units that a score sums at once: roundings grow with their number
#if defined(__AVX512F__)
constexpr int kRegRows = 12;  // 12 x 2 accumulators of 32 registers
#else
constexpr int kRegRows = 6;  // 6 x 2 accumulators of 16 registers
#endif
static_assert(kBlock % kPanel == 0 && kBlock % kRegRows == 0);

FMM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FMM_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FMM_INLINE int vectors(int64_t n) { return static_cast<int>(ceil_div(n, kLanes)); }

// Bump allocator, kept between calls up to `keep` bytes. Each thread has two: `local` for a task,
// `shared` for what the calling thread lends to all tasks; opening one frees what it lent before.
class Arena {
 public:
  explicit Arena(size_t keep = size_t{16} << 20) : keep_(keep) {}
  static Arena& local() {
    thread_local Arena arena;
    arena.reset();
    return arena;
  }
  template <class T>
  T* take(int64_t n) {
    const size_t bytes = round_up(n * static_cast<int64_t>(sizeof(T)) + 1, 64);
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) grow(bytes);
    char* p = blocks_.back().data.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }

 private:
  struct Free {
    std::align_val_t align;
    void operator()(char* p) const { ::operator delete[](p, align); }
  };
  struct Block {
    std::unique_ptr<char[], Free> data;
    size_t size;
  };
  static constexpr size_t kFirst = size_t{256} << 10;

  friend class SharedArena;

  void grow(size_t bytes) {
    const size_t size = bytes > kFirst ? bytes : kFirst;
    const std::align_val_t align{size < kHugeFrom ? 64 : kHugePage};
    char* p = static_cast<char*>(::operator new[](size, align));
    prefer_huge_pages(p, size);
    blocks_.push_back({std::unique_ptr<char[], Free>(p, Free{align}), size});
    used_ = 0;
  }
  // One block as large as all of the last call's, so that the next call does not allocate.
  void reset() {
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (const Block& b : blocks_) total += b.size;
      blocks_.clear();
      if (total <= keep_) grow(total);
    } else if (!blocks_.empty() && blocks_.back().size > keep_) {
      blocks_.clear();
    }
    used_ = 0;
  }

  std::vector<Block> blocks_;
  size_t keep_, used_ = 0;
};

// What the tasks of one call share, from the arena of the calling thread. The end of the call gives
// it back beyond kKeep: the next one may be far off, and a loss packs all of its rows. Below are
// partial sums of both sides of an attention, and a loss of 4096 x 768: to fault them in anew took
// a third of some steps on two threads.
class SharedArena {
  static constexpr size_t kKeep = size_t{48} << 20;

 public:
  ~SharedArena() { arena_.reset(); }
  Arena& operator*() { return arena_; }

 private:
  static thread_local inline Arena arena_{kKeep};
};

// Rows of a tensor: base address, strides, and which rows count (others read as zero).
struct RowSource {
  const char* data;
  DType dtype;
  int64_t row_stride, stride;  // elements
  const bool* keep;            // nullptr: all
  int64_t keep_stride;
  const float* factor;  // per row, nullptr: 1

  const void* row(int64_t i) const { return data + i * row_stride * size_of(dtype); }
  bool kept(int64_t i) const { return !keep || keep[i * keep_stride]; }
};

FMM_INLINE RowSource rows_of(const Tensor4& t, int64_t b, int64_t h, int64_t row0,
                             const KeyMask& mask = {}) {
  const bool* keep = mask.data ? mask.row(b) + row0 * mask.stride[1] : nullptr;
  return {static_cast<const char*>(at(t, t.offset(b, h, row0))),
          t.dtype,
          t.stride[2],
          t.stride[3],
          keep,
          mask.stride[1],
          nullptr};
}

// One row of `width` elements as units, zero-padded to whole units.
FMM_INLINE void read_row(float* dst, const RowSource& src, int64_t i, int64_t width) {
  if (!src.kept(i)) {
    std::memset(dst, 0, width * sizeof(float));
    return;
  }
  load_row(dst, src.row(i), src.dtype, src.stride, width);
  if (src.factor) {
    for (int64_t j = 0; j < width; ++j) dst[j] *= src.factor[i];
  }
}
FMM_INLINE void read_row(Bf2* dst, const RowSource& src, int64_t i, int64_t width) {
  auto* out = reinterpret_cast<uint16_t*>(dst);
  if (width % 2) out[width] = 0;
  if (!src.kept(i)) {
    std::memset(out, 0, width * sizeof(uint16_t));
    return;
  }
  const auto* in = static_cast<const uint16_t*>(src.row(i));
  if (src.factor) {
    for (int64_t j = 0; j < width; ++j) {
      out[j] = float_to_bf16(bf16_to_float(in[j * src.stride]) * src.factor[i]);
    }
  } else if (src.stride == 1) {
    std::memcpy(out, in, width * sizeof(uint16_t));
  } else {
    for (int64_t j = 0; j < width; ++j) out[j] = in[j * src.stride];
  }
}

// Whether row i of src can be read as units in place.
template <class U>
FMM_INLINE bool readable(const RowSource& src, int64_t i, int64_t width) {
  return (kPerUnit<U> == 2 || src.dtype == DType::kFloat) && src.stride == 1 && !src.factor &&
         width % kPerUnit<U> == 0 && src.kept(i) &&
         reinterpret_cast<uintptr_t>(src.row(i)) % sizeof(U) == 0;
}

// Whether all rows of a tensor whose first row is src's are readable.
template <class U>
FMM_INLINE bool readable_everywhere(const RowSource& src, int64_t width) {
  return readable<U>(src, 0, width) && src.row_stride % kPerUnit<U> == 0;
}

// A operand: unit (i, k) at data[i * ld + k], contraction along the row.
template <class U>
struct AOperand {
  const U* data;
  int64_t ld;
};

// B operand: unit (k, j) of panel p at data[p * panel + k * ld + j].
template <class U>
struct BOperand {
  const U* data;
  int64_t ld, panel;
};

// Whether a tensor's rows are an A operand as they lie: laid out as pack_a would.
template <class U>
inline bool is_a_operand(const Tensor4& t, int64_t width, const KeyMask& mask = {}) {
  return !mask.data && t.stride[2] == width && t.stride[0] % kPerUnit<U> == 0 &&
         t.stride[1] % kPerUnit<U> == 0 && readable_everywhere<U>(rows_of(t, 0, 0, 0), width);
}

// Whether they are a B operand for a contraction along them. Rows further apart would share sets
// of the first cache.
template <class U>
inline bool is_b_operand(const Tensor4& t, int64_t width, const KeyMask& mask = {}) {
  return kPerUnit<U> == 1 && width % kLanes == 0 && width <= 4 * kPanel &&
         is_a_operand<U>(t, width, mask);
}

template <class U>
FMM_INLINE AOperand<U> a_operand(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
  return {static_cast<const U*>(at(t, t.offset(b, h, row))), t.stride[2] / kPerUnit<U>};
}
template <class U>
FMM_INLINE BOperand<U> b_operand(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
  return {static_cast<const U*>(at(t, t.offset(b, h, row))), t.stride[2], kPanel};
}
template <class U>
FMM_INLINE AOperand<U> packed_a(const U* data, int64_t width) {
  return {data, units<U>(width)};
}
template <class U>
FMM_INLINE BOperand<U> packed_b(const U* data, int64_t rows) {
  return {data, kPanel, int64_t{units<U>(rows)} * kPanel};
}

// A operand: dst[i][unit], contraction along the row.
template <class U>
void pack_a(U* dst, const RowSource& src, int64_t n, int64_t width) {
  const int64_t k = units<U>(width);
  for (int64_t i = 0; i < n; ++i) read_row(dst + i * k, src, i, width);
}

// dst[k][j] = src[j][k] for kLanes rows of `n` units.
template <class U>
FMM_INLINE void transpose(U* dst, int64_t ld, const U* const* src, int64_t n) {
  int64_t k = 0;
#if defined(__AVX512F__)
  for (; k + 16 <= n; k += 16) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src[i] + k);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // 128-bit lane q of r[4g + i] holds column 4q + i of rows 4g..
      const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      const __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
      _mm512_storeu_si512(dst + (k + i) * ld, _mm512_shuffle_i32x4(a, c, 0x88));
      _mm512_storeu_si512(dst + (k + 8 + i) * ld, _mm512_shuffle_i32x4(a, c, 0xdd));
      _mm512_storeu_si512(dst + (k + 4 + i) * ld, _mm512_shuffle_i32x4(b, d, 0x88));
      _mm512_storeu_si512(dst + (k + 12 + i) * ld, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }
#endif
  for (; k < n; ++k) {
    for (int j = 0; j < kLanes; ++j) dst[k * ld + j] = src[j][k];
  }
}

// B operand, contraction along the rows' width: panel[p][unit][kPanel], column = row of src.
template <class U>
void pack_b_transposed(U* dst, U* scratch, const RowSource& src, int64_t n, int64_t width) {
  const int64_t k = units<U>(width);
  for (int64_t j0 = 0; j0 < round_up(n, kPanel); j0 += kLanes) {
    const U* rows[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      U* row = scratch + j * k;
      rows[j] = row;
      if (j0 + j >= n) {
        std::memset(static_cast<void*>(row), 0, k * sizeof(U));
      } else if (readable<U>(src, j0 + j, width)) {
        rows[j] = static_cast<const U*>(src.row(j0 + j));
      } else {
        read_row(row, src, j0 + j, width);
      }
    }
    transpose(dst + (j0 / kPanel) * k * kPanel + j0 % kPanel, kPanel, rows, k);
  }
}

// Row i in whole panels: as it lies, or read into `scratch`, which is zero past the width.
template <class U>
FMM_INLINE const U* whole_row(U* scratch, const RowSource& src, int64_t i, int64_t width) {
  if (width % kPanel == 0 && readable<U>(src, i, width)) return static_cast<const U*>(src.row(i));
  read_row(scratch, src, i, width);
  return scratch;
}

// B operand, contraction along the rows: panel[p][row unit][kPanel], column = element of the row.
inline void pack_b(float* dst, float* scratch, const RowSource& src, int64_t n, int64_t width) {
  const int64_t padded = round_up(width, kPanel);
  for (int64_t j = width; j < padded; ++j) scratch[j] = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = whole_row(scratch, src, i, width);
    for (int64_t p = 0; p < padded; p += kPanel) {
      std::memcpy(dst + (p * n + i * kPanel), row + p, kPanel * sizeof(float));
    }
  }
}
inline void pack_b(Bf2* dst, Bf2* scratch, const RowSource& src, int64_t n, int64_t width) {
  const int64_t padded = round_up(width, kPanel), k = units<Bf2>(n);
  Bf2 *scratch_odd = scratch + units<Bf2>(padded), *zeros = scratch_odd + units<Bf2>(padded);
  std::memset(static_cast<void*>(scratch), 0, 3 * padded * sizeof(uint16_t));
  for (int64_t i = 0; i < k; ++i) {
    const Bf2* next = 2 * i + 1 < n ? whole_row(scratch_odd, src, 2 * i + 1, width) : zeros;
    const auto* even = reinterpret_cast<const uint16_t*>(whole_row(scratch, src, 2 * i, width));
    const auto* odd = reinterpret_cast<const uint16_t*>(next);
    for (int64_t p = 0; p < padded; p += kPanel) {
      Bf2* out = dst + p * k + i * kPanel;
      for (int j = 0; j < kPanel; ++j) {
        out[j].bits = even[p + j] | static_cast<uint32_t>(odd[p + j]) << 16;
      }
    }
  }
}

// Units that the packs above write, and that their scratch needs.
template <class U>
FMM_INLINE int64_t a_units(int64_t n, int64_t width) {
  return n * units<U>(width);
}
template <class U>
FMM_INLINE int64_t bt_units(int64_t n, int64_t width) {
  return round_up(n, kPanel) * units<U>(width);
}
template <class U>
FMM_INLINE int64_t b_units(int64_t n, int64_t width) {
  return units<U>(n) * round_up(width, kPanel);
}
template <class U>
FMM_INLINE int64_t scratch_units(int64_t width) {
  return (kLanes + 2) * (width + kPanel);
}

// A term of a sum of products over k units: a as micro reads it, from row 0, and b.
template <class U>
struct Term {
  const U* a;
  BOperand<U> b;
  int k;
};

// Terms after the first, at a's row (in units) and b's panel.
template <class U>
struct MoreTerms {
  const Term<U>*next, *end;
  ptrdiff_t row;
  int panel;
};

// c[R][V] (+)= a . b over k units, and more terms if any. kRows: a's unit (r, k) is at r * lda + k,
// else at k * lda + r.
template <class U, int R, int V, bool kRows>
__attribute__((noinline)) void micro(int k, const U* a, ptrdiff_t lda, const U* b, ptrdiff_t ldb,
                                     float* c, ptrdiff_t ldc, bool accumulate,
                                     const MoreTerms<U>* more) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[r][v] = Vec{};
      if (accumulate) __builtin_prefetch(c + r * ldc + v * kLanes, 1);  // rows far apart
    }
  }
  for (const Term<U>* t = more ? more->next : nullptr;; ++t) {
    for (int i = 0; i < k; ++i) {
      Vec bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const U x = kRows ? a[r * lda] : a[r];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], x, bv[v]);
      }
      a += kRows ? 1 : lda;
      b += ldb;
    }
    if (!more || t == more->end) break;
    a = t->a + more->row, b = t->b.data + more->panel * t->b.panel, ldb = t->b.ld, k = t->k;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* p = c + r * ldc + v * kLanes;
      store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class U, int V, bool kRows, int R = kRegRows>
FMM_INLINE void micro_tail(int rows, int k, const U* a, ptrdiff_t lda, const U* b, ptrdiff_t ldb,
                           float* c, ptrdiff_t ldc, bool accumulate, const MoreTerms<U>* more) {
  if constexpr (R > 0) {
    if (rows == R) {
      micro<U, R, V, kRows>(k, a, lda, b, ldb, c, ldc, accumulate, more);
    } else {
      micro_tail<U, V, kRows, R - 1>(rows, k, a, lda, b, ldb, c, ldc, accumulate, more);
    }
  }
}

// Rows that the next block will read, asked for a few cache lines at a time while products run: the
// packs would wait for memory, and all lines at once would wait for each other.
class Ahead {
 public:
  void clear() { count_ = next_ = at_ = 0; }
  void add(const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t width) {
    if (t.stride[3] != 1 || rows <= 0 || count_ == kMost) return;
    const int64_t stride = t.stride[2] * size_of(t.dtype), bytes = width * size_of(t.dtype);
    const auto* data = static_cast<const char*>(fmm::cpu::FMM_ISA::at(t, t.offset(b, h, row)));
    ranges_[count_++] =
        stride == bytes ? Range{data, 0, rows * bytes, 1} : Range{data, stride, bytes, rows};
  }
  FMM_INLINE void step() {
    for (int lines = kLines; lines > 0 && next_ < count_;) {
      Range& r = ranges_[next_];
      for (; lines > 0 && at_ < r.bytes; at_ += 64, --lines) __builtin_prefetch(r.data + at_);
      if (at_ < r.bytes) return;
      at_ = 0;
      r.data += r.stride;
      if (--r.rows == 0) ++next_;
    }
  }

 private:
  struct Range {
    const char* data;
    int64_t stride, bytes, rows;  // in bytes
  };
  static constexpr int kMost = 8;
  static constexpr int kLines = 40;  // a micro-kernel's call
  Range ranges_[kMost];
  int64_t at_ = 0;
  int count_ = 0, next_ = 0;
};

// Asks for the part of a panel's lines that is due at row r of m.
template <class U>
FMM_INLINE void prefetch_panel(const Term<U>& t, int panel, int r, int m) {
  const auto* lines = reinterpret_cast<const char*>(t.b.data + panel * t.b.panel);
  const int bytes = t.k * kPanel * static_cast<int>(sizeof(U)), part = bytes / m * kRegRows + 64;
  const int end = std::min(bytes, (r / kRegRows + 1) * part);
  for (int at = r / kRegRows * part; at < end; at += 64) __builtin_prefetch(lines + at);
}

// c[m][nv * kLanes] (+)= a[m][k] . b[k][..], or a sum of several, whose b then come from further
// than the second-level cache.
template <class U, bool kRows>
void gemm(int m, int nv, const Term<U>* terms, int count, ptrdiff_t lda, float* c, ptrdiff_t ldc,
          bool accumulate, Ahead* ahead) {
  const Term<U>& t = terms[0];
  const U* b = t.b.data;
  const ptrdiff_t ldb = t.b.ld;
  for (int v = 0, panel = 0; v < nv; v += 2, ++panel, b += t.b.panel, c += kPanel) {
    for (int r = 0; r < m; r += kRegRows) {
      const int rows = m - r < kRegRows ? m - r : kRegRows;
      const ptrdiff_t row = kRows ? r * lda : r;
      const MoreTerms<U> rest{terms + 1, terms + count, row, panel};
      const MoreTerms<U>* more = count > 1 ? &rest : nullptr;
      if (ahead) ahead->step();
      for (int i = 0; more && v + 2 < nv && i < count; ++i) {
        prefetch_panel(terms[i], panel + 1, r, m);
      }
      for (int k0 = 0; k0 == 0 || k0 < t.k; k0 += kDepth) {
        const int k = std::min(kDepth, t.k - k0);
        const U *a = t.a + row + k0 * (kRows ? 1 : lda), *panel_b = b + k0 * ldb;
        const bool add = accumulate || k0 > 0;
        if (nv - v >= 2) {
          micro_tail<U, 2, kRows>(rows, k, a, lda, panel_b, ldb, c + r * ldc, ldc, add, more);
        } else {
          micro_tail<U, 1, kRows>(rows, k, a, lda, panel_b, ldb, c + r * ldc, ldc, add, more);
        }
      }
    }
  }
}

// A tile of probabilities as the A operand of two products: `rm` contracts along its columns,
// `tr` along its rows. For float both are the same kBlock x kBlock matrix.
template <class U>
struct PTile {
  U *rm, *tr;
  static constexpr int kLd = kBlock;                  // of tr, and of rm for float
  static constexpr int kLdRm = kBlock / kPerUnit<U>;  // of rm

  static constexpr bool kTwo = kPerUnit<U> == 2;  // rm and tr are different memory

  static PTile make(Arena& arena, bool rows, bool columns) {
    PTile t{};
    if (rows) t.rm = arena.take<U>(kBlock * kLdRm);
    if (columns) t.tr = kPerUnit<U> == 1 && rows ? t.rm : arena.take<U>(kBlock * kLd);
    return t;
  }
  // One element, in both forms.
  FMM_INLINE void set(int i, int j, float p) const {
    if constexpr (kTwo) {
      const uint16_t h = float_to_bf16(p);
      std::memcpy(reinterpret_cast<char*>(rm) + (i * 2 * kLdRm + j) * 2, &h, 2);
      std::memcpy(reinterpret_cast<char*>(tr) + ((i / 2 * kLd + j) * 2 + i % 2) * 2, &h, 2);
    } else {
      rm[i * kLdRm + j] = p;
    }
  }
  // Rows i and i + 1 (i even) of vector v, in the forms asked for; zeros where there is no row.
  template <bool kRm, bool kTr>
  FMM_INLINE void put(int i, int v, Vec p, Vec next) const {
    if constexpr (kPerUnit<U> == 1) {
      float* out = (kRm ? rm : tr) + i * kBlock + v * kLanes;
      store(out, p);
      store(out + kBlock, next);
    } else {
#if defined(__AVX512BF16__)
      const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)p);
      if constexpr (kRm) {
        U* out = rm + i * kLdRm + v * (kLanes / 2);
        _mm256_storeu_si256((__m256i*)out, _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i*)(out + kLdRm), _mm512_extracti64x4_epi64(both, 1));
      }
      if constexpr (kTr) {
        const __m512i order =
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                             22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(tr + i / 2 * kLd + v * kLanes, _mm512_permutexvar_epi16(order, both));
      }
#endif
    }
  }
  // Row i, vector v of the tile as `rm`.
  FMM_INLINE void put_rm(int i, int v, Vec p) const {
    if constexpr (kPerUnit<U> == 1) {
      store(rm + i * kLdRm + v * kLanes, p);
    } else {
#if defined(__AVX512BF16__)
      const __m256bh half = _mm512_cvtneps_pbh((__m512)p);
      __builtin_memcpy(rm + i * kLdRm + v * (kLanes / 2), &half, sizeof half);
#endif
    }
  }
};

// p . b, contracting the tile's columns (n of them).
template <class U>
FMM_INLINE Term<U> rows_term(const PTile<U>& p, int n, const BOperand<U>& b) {
  return {p.rm, b, units<U>(n)};
}
// p^T . b, contracting the tile's rows (m of them).
template <class U>
FMM_INLINE Term<U> columns_term(const PTile<U>& p, int m, const BOperand<U>& b) {
  return {p.tr, b, units<U>(m)};
}
// c = p . b, or added to c.
template <class U>
FMM_INLINE void times_rows(const PTile<U>& p, int m, int n, const BOperand<U>& b, int nv, float* c,
                           int64_t ldc, bool accumulate = true, Ahead* ahead = nullptr) {
  const Term<U> term = rows_term(p, n, b);
  gemm<U, true>(m, nv, &term, 1, PTile<U>::kLdRm, c, ldc, accumulate, ahead);
}
// c = p^T . b, or added to c.
template <class U>
FMM_INLINE void times_columns(const PTile<U>& p, int m, int n, const BOperand<U>& b, int nv,
                              float* c, int64_t ldc, bool accumulate = true,
                              Ahead* ahead = nullptr) {
  const Term<U> term = columns_term(p, m, b);
  gemm<U, false>(n, nv, &term, 1, PTile<U>::kLd, c, ldc, accumulate, ahead);
}
// s[m][kBlock] = rows row0.. of a . bt over the width, bt packed.
template <class U>
FMM_INLINE void scores(const AOperand<U>& a, int64_t row0, const U* bt, int m, int n, int64_t width,
                       float* s, Ahead* ahead = nullptr) {
  const Term<U> term{a.data + row0 * a.ld, packed_b(bt, width), units<U>(width)};
  gemm<U, true>(m, vectors(n), &term, 1, a.ld, s, kBlock, false, ahead);
}

}  // namespace fmm::cpu::FMM_ISA
