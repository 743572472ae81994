// Half / bfloat16 / fp8 conversions and helpers.
#pragma once
#include <cfenv>

#include "core.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif
namespace vsim {
static inline u32 f2u(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float u2f(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline u64 d2u(double f) {
  u64 u;
  memcpy(&u, &f, 8);
  return u;
}
static inline double u2d(u64 u) {
  double f;
  memcpy(&f, &u, 8);
  return f;
}
static inline float ftzf(float x) {
  u32 b = f2u(x);
  return (b & 0x7f800000u) == 0 ? u2f(b & 0x80000000u) : x;
}

static inline float h2f1(u16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  u32 s = (h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
  if (e == 31) return u2f(s | 0x7f800000u | (m << 13) | (m ? 0x400000u : 0));
  if (e == 0) {
    float v = m * 5.9604644775390625e-8f;
    return s ? -v : v;
  }
  return u2f(s | ((e + 112) << 23) | (m << 13));
#endif
}
// generic correctly rounded double -> small float (p mantissa bits incl. hidden, emin = min normal
// exponent). RNE or RZ.
static inline double round_to(double x, int p, int emin, bool rz = false) {
  if (!(x == x) || std::isinf(x) || x == 0) return x;
  int e = (int)((d2u(x) >> 52) & 0x7ff) - 1023;
  if (e < emin) e = emin;
  double ulp = u2d((u64)(e - (p - 1) + 1023) << 52), inv = u2d((u64)(1023 - (e - (p - 1))) << 52);
  double q = x * inv;
  q = rz ? std::trunc(q) : std::nearbyint(q);
  return q * ulp;
}
static inline u16 f2h1(float f) {  // RNE
#if defined(__F16C__)
  if (f != f) return 0x7fff;
  return _cvtss_sh(f, 0);
#else
  if (f != f) return 0x7fff;
  double r = round_to(f, 11, -14);
  u16 s = std::signbit(f) ? 0x8000 : 0;
  r = std::fabs(r);
  if (r > 65504) return s | 0x7c00;
  if (r == 0) return s;
  int e = (int)((d2u(r) >> 52) & 0x7ff) - 1023;
  if (e < -14) return s | (u16)(r * 16777216.0);
  return s | (u16)((e + 15) << 10) | (u16)((d2u(r) >> 42) & 0x3ff);
#endif
}
static inline u16 f2h1_rz(float f) {
  if (f != f) return 0x7fff;
  double r = std::isinf(f) ? (double)f : round_to(f, 11, -14, true);
  if (std::fabs(r) > 65504 && !std::isinf(f)) r = std::copysign(65504.0, r);
  return f2h1((float)r);
}
static inline float bf2f1(u16 b) { return u2f((u32)b << 16); }
static inline u16 f2bf1(float f) {
  u32 b = f2u(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline u16 f2bf1_rz(float f) {
  u32 b = f2u(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)(b >> 16);
}
static inline void h2f(const u16* s, float* d, int n) {
#if defined(__F16C__)
  for (int i = 0; i < n; i += 8)
    _mm256_storeu_ps(d + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(s + i))));
#else
  for (int i = 0; i < n; i++) d[i] = h2f1(s[i]);
#endif
}
static inline void f2h(const float* s, u16* d, int n) {
  for (int i = 0; i < n; i++) d[i] = f2h1(s[i]);
}
static inline void bf2f(const u16* s, float* d, int n) {
  for (int i = 0; i < n; i++) d[i] = bf2f1(s[i]);
}
static inline void f2bf(const float* s, u16* d, int n) {
  for (int i = 0; i < n; i++) d[i] = f2bf1(s[i]);
}
// exact a*b+c for half-type inputs, rounded to odd in double so a second rounding is harmless
static inline double fma_odd(double a, double b, double c) {
  double p = a * b, s = p + c;
  if (!(std::fabs(s) <= 1.7e308)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0) {
    u64 u = d2u(s);
    if (!(u & 1)) {
      if ((err > 0) == (s > 0))
        u |= 1;
      else
        u -= 1;
      s = u2d(u);
    }
  }
  return s;
}
static inline u16 d2h(double x) {
  if (x != x) return 0x7fff;
  return f2h1((float)round_to(x, 11, -14));
}
static inline u16 d2bf(double x) {
  if (x != x) return 0x7fff;
  return f2bf1((float)round_to(x, 8, -126));
}
static inline float tf32_trunc(float f) { return u2f(f2u(f) & 0xffffe000u); }

// fp8
static inline float e4m3_to_f(u8 v) {
  int s = v >> 7, e = (v >> 3) & 15, m = v & 7;
  float r;
  if (e == 15 && m == 7) return u2f(0x7fffffff);
  r = e ? std::ldexp(1.0f + m / 8.0f, e - 7) : std::ldexp(m / 8.0f, -6);
  return s ? -r : r;
}
static inline float e5m2_to_f(u8 v) { return h2f1((u16)v << 8); }
static inline u8 f_to_e4m3(float f) {  // RNE, satfinite
  if (f != f) return 0x7f;
  u8 s = std::signbit(f) ? 0x80 : 0;
  double r = std::fabs(round_to(f, 4, -6));
  if (r > 448) r = 448;
  if (r == 0) return s;
  int e = (int)((d2u(r) >> 52) & 0x7ff) - 1023;
  if (e < -6) return s | (u8)(r * 512);
  return s | (u8)((e + 7) << 3) | (u8)((d2u(r) >> 49) & 7);
}
static inline u8 f_to_e5m2(float f) {  // RNE, satfinite
  if (f != f) return 0x7f;
  u8 s = std::signbit(f) ? 0x80 : 0;
  double r = std::fabs(round_to(f, 3, -14));
  if (r > 57344) r = 57344;
  if (r == 0) return s;
  int e = (int)((d2u(r) >> 52) & 0x7ff) - 1023;
  if (e < -14) return s | (u8)(r * 65536);
  return s | (u8)((e + 15) << 2) | (u8)((d2u(r) >> 50) & 3);
}
// float op under a rounding mode (slow path)
enum { FO_ADD, FO_SUB, FO_MUL, FO_FMA, FO_DIV, FO_SQRT, FO_RCP };
static inline int fe_mode(int r) {
  return r == R_RZ ? FE_TOWARDZERO : r == R_RM ? FE_DOWNWARD : r == R_RP ? FE_UPWARD : FE_TONEAREST;
}
template <class T>
static T __attribute__((noinline)) fp_mode_op(int op, T a, T b, T c, int r) {
  volatile T x = a, y = b, z = c, o;
  fesetround(fe_mode(r));
  switch (op) {
    case FO_ADD:
      o = x + y;
      break;
    case FO_SUB:
      o = x - y;
      break;
    case FO_MUL:
      o = x * y;
      break;
    case FO_FMA: {
      T xx = x, yy = y, zz = z;
      o = std::fma(xx, yy, zz);
      break;
    }
    case FO_DIV:
      o = x / y;
      break;
    case FO_SQRT: {
      T xx = x;
      o = std::sqrt(xx);
      break;
    }
    default:
      o = (T)1 / x;
  }
  fesetround(FE_TONEAREST);
  return o;
}
}  // namespace vsim
