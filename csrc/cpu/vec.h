// The vector type of the instruction set this file is compiled for, and its elementwise maths.
// GCC/Clang vector extensions; intrinsics only where the compiler has no better expression.
// Everything is in the namespace FMM_ISA, one copy per instruction set.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/params.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define FMM_HAS_ASSOC_BARRIER 1
#endif
#endif

#define FMM_INLINE inline __attribute__((always_inline))

namespace fmm::cpu::FMM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

// Two bf16 that stand next to each other along the contraction: the unit of vdpbf16ps.
struct Bf2 {
  uint32_t bits;
};
template <class U>
constexpr int kPerUnit = 1;
template <>
inline constexpr int kPerUnit<Bf2> = 2;

template <class U>
FMM_INLINE int units(int64_t n) {
  return static_cast<int>((n + kPerUnit<U> - 1) / kPerUnit<U>);
}

template <class T>
FMM_INLINE Vec load(const T* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FMM_INLINE void store(T* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof v);
}
FMM_INLINE Vec splat(float x) { return x - Vec{}; }

// A product as rounded to fp32. A compiler would fuse it into the next addition, and the scores of
// the backward would differ from the forward's by half a unit in the last place.
template <class T>
FMM_INLINE T rounded(T x) {
#ifdef FMM_HAS_ASSOC_BARRIER
  return __builtin_assoc_barrier(x);
#else
  volatile T y = x;
  return y;
#endif
}

// a where it is greater, else b: NaN in a is passed over.
FMM_INLINE Vec max_skip_nan(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FMM_INLINE bool any(IVec m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)m) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= m[i];
  return r != 0;
#endif
}

// -1 in lanes below n, else 0.
FMM_INLINE IVec first_lanes(int n) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

FMM_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// acc + a * b, where a is one unit of the contraction and b a vector of units.
FMM_INLINE Vec dot(Vec acc, float a, Vec b) { return acc + a * b; }
#if defined(__AVX512BF16__)
FMM_INLINE Vec dot(Vec acc, Bf2 a, Vec b) {
  const __m512i wide = _mm512_set1_epi32(static_cast<int>(a.bits));
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)wide, (__m512bh)b);
}
#endif
// The same where a is a vector of units as well.
template <class U>
FMM_INLINE Vec dot_lanes(Vec acc, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kPerUnit<U> == 2) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
#endif
  return acc + a * b;
}

// 2^t to 1.2e-7 relative, 0 below 2^-126 (also for -inf), NaN for NaN; t <= 127.
// Degree-5 minimax polynomial of 2^f on [-1/2, 1/2], fitted with p(0) = 1.
FMM_INLINE Vec exp2(Vec t) {
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)t, 0);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(t)
  const Vec shifted = t + magic;
  const Vec n = shifted - magic;
#endif
  const Vec f = t - n;
  Vec p = f * 1.3264726e-03f + 9.6715131e-03f;
  p = p * f + 5.5507338e-02f;
  p = p * f + 2.4022242e-01f;
  p = p * f + 6.9314698e-01f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  UVec bits, raised;  // wraps above 127, as where a tile's last row has no partner
  __builtin_memcpy(&bits, &p, sizeof p);
  __builtin_memcpy(&raised, &shifted, sizeof shifted);
  bits += raised << 23;
  Vec r;
  __builtin_memcpy(&r, &bits, sizeof r);
  r = t < splat(-126.0f) ? Vec{} : r;
  return t == t ? r : t;
#endif
}

FMM_INLINE float exp2(float t) { return t == -kInf ? 0.0f : std::exp2(t); }

FMM_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float r = 0.0f;
  for (int i = 0; i < kLanes; ++i) r += v[i];
  return r;
#endif
}

FMM_INLINE float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = v[i] > r ? v[i] : r;
  return r;
#endif
}

typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));

// The nearest integers of x, |x| < 2^15.
FMM_INLINE ShortVec to_short(Vec x) {
#if defined(__AVX512F__)
  return (ShortVec)_mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x));
#else
  return __builtin_convertvector((IVec)(x + 12582912.0f), ShortVec);  // the sum's low bits
#endif
}
FMM_INLINE Vec to_float(ShortVec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32((__m256i)n));
#else
  return __builtin_convertvector(n, Vec);
#endif
}

FMM_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
FMM_INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(f == f ? rounded : 0x7fc0u);
}

FMM_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t bits = (h & 0x7fffu) << 13;
  float f;
  if ((h & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    __builtin_memcpy(&f, &bits, 4);
  } else {  // scaling by 2^112 makes subnormals exact
    __builtin_memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}

FMM_INLINE uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, 0));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    float g;
    __builtin_memcpy(&g, &bits, 4);
    g += 0.5f;
    __builtin_memcpy(&bits, &g, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
#endif
}

FMM_INLINE int64_t size_of(DType t) { return t == DType::kFloat ? 4 : 2; }

// n elements at `src` (byte address), `stride` elements apart, as float.
FMM_INLINE void load_row(float* dst, const void* src, DType dtype, int64_t stride, int64_t n) {
  const auto* h = static_cast<const uint16_t*>(src);
  if (dtype == DType::kFloat) {
    const auto* f = static_cast<const float*>(src);
    if (stride == 1) {
      std::memcpy(dst, f, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = f[i * stride];
    }
  } else if (dtype == DType::kBFloat16) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_float(h[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_float(h[i * stride]);
    }
  } else {
    int64_t i = 0;
#if defined(__AVX512F__)
    if (stride == 1) {
      for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(h + i))));
      }
    }
#endif
    for (; i < n; ++i) dst[i] = half_to_float(h[i * stride]);
  }
}

// n floats, each times `factor`, to contiguous elements of dtype.
FMM_INLINE void store_row(void* dst, const float* src, DType dtype, float factor, int64_t n) {
  if (dtype == DType::kFloat) {
    auto* f = static_cast<float*>(dst);
    for (int64_t i = 0; i < n; ++i) f[i] = src[i] * factor;
  } else if (dtype == DType::kBFloat16) {
    auto* h = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(src[i] * factor);
  } else {
    auto* h = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_half(src[i] * factor);
  }
}

FMM_INLINE const void* at(const Tensor4& t, int64_t offset) {
  return static_cast<const char*>(t.data) + offset * size_of(t.dtype);
}

}  // namespace fmm::cpu::FMM_ISA
