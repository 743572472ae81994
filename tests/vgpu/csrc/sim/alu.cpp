// Integer / float / half arithmetic, logic, compare, select, mov.
#include "fp.h"
namespace vsim {
#define HD(name)     \
  template <class T> \
  static void name(Exec&, Warp& w, const Inst& I, u32 m)
template <class T>
struct Wide;
template <>
struct Wide<u8> {
  typedef u16 t;
};
template <>
struct Wide<u16> {
  typedef u32 t;
};
template <>
struct Wide<i16> {
  typedef i32 t;
};
template <>
struct Wide<u32> {
  typedef u64 t;
};
template <>
struct Wide<i32> {
  typedef i64 t;
};
template <>
struct Wide<u64> {
  typedef unsigned __int128 t;
};
template <>
struct Wide<i64> {
  typedef __int128 t;
};

// integer
HD(h_add) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a + b; });
}
HD(h_sub) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a - b; });
}
HD(h_mullo) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return (T)((typename Wide<T>::t)a * b); });
}
template <>
void h_mullo<u32>(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes2<u32, u32, u32>(w, I, m, [](u32 a, u32 b) { return a * b; });
}
template <>
void h_mullo<u64>(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes2<u64, u64, u64>(w, I, m, [](u64 a, u64 b) { return a * b; });
}
HD(h_mulhi) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T {
    return (T)(((typename Wide<T>::t)a * (typename Wide<T>::t)b) >> (8 * sizeof(T)));
  });
}
HD(h_mulwide) {
  typedef typename Wide<T>::t W;
  lanes2<W, T, T>(w, I, m, [](T a, T b) -> W { return (W)a * (W)b; });
}
HD(h_madlo) {
  lanes3<T, T, T, T>(w, I, m,
                     [](T a, T b, T c) -> T { return (T)((typename Wide<T>::t)a * b + c); });
}
template <>
void h_madlo<u32>(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes3<u32, u32, u32, u32>(w, I, m, [](u32 a, u32 b, u32 c) { return a * b + c; });
}
template <>
void h_madlo<u64>(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes3<u64, u64, u64, u64>(w, I, m, [](u64 a, u64 b, u64 c) { return a * b + c; });
}
HD(h_madhi) {
  lanes3<T, T, T, T>(w, I, m, [](T a, T b, T c) -> T {
    return (T)((T)(((typename Wide<T>::t)a * (typename Wide<T>::t)b) >> (8 * sizeof(T))) + c);
  });
}
HD(h_madwide) {
  typedef typename Wide<T>::t W;
  typedef typename std::make_unsigned<W>::type UW;
  lanes3<W, T, T, W>(w, I, m, [](T a, T b, W c) -> W { return (W)((UW)((W)a * (W)b) + (UW)c); });
}
HD(h_div) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T {
    if (b == 0) return (T) ~(T)0;
    if (std::is_signed<T>::value && b == (T)-1)
      return (T)(0 - (typename std::make_unsigned<T>::type)a);
    return a / b;
  });
}
HD(h_rem) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T {
    if (b == 0) return a;
    if (std::is_signed<T>::value && b == (T)-1) return 0;
    return a % b;
  });
}
HD(h_min) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a < b ? a : b; });
}
HD(h_max) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a > b ? a : b; });
}
HD(h_abs) {
  lanes1<T, T>(w, I, m, [](T a) -> T {
    return a < 0 ? (T)(0 - (typename std::make_unsigned<T>::type)a) : a;
  });
}
HD(h_neg) {
  lanes1<T, T>(w, I, m, [](T a) -> T { return (T)(0 - a); });
}
HD(h_and) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a & b; });
}
HD(h_or) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a | b; });
}
HD(h_xor) {
  lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return a ^ b; });
}
HD(h_not) {
  lanes1<T, T>(w, I, m, [](T a) -> T { return (T)~a; });
}
HD(h_cnot) {
  lanes1<T, T>(w, I, m, [](T a) -> T { return a == 0; });
}
HD(h_shl) {
  lanes2<T, T, u32>(w, I, m, [](T a, u32 b) -> T {
    return b >= 8 * sizeof(T) ? (T)0 : (T)(a << (b & (8 * sizeof(T) - 1)));
  });
}
HD(h_shr) {
  lanes2<T, T, u32>(w, I, m, [](T a, u32 b) -> T {
    const u32 n = 8 * sizeof(T);
    if (std::is_signed<T>::value) return (T)(a >> (b >= n ? n - 1 : b));
    return b >= n ? (T)0 : (T)(a >> (b & (n - 1)));
  });
}
HD(h_popc) {
  lanes1<u32, T>(w, I, m, [](T a) -> u32 { return __builtin_popcountll(a); });
}
HD(h_clz) {
  lanes1<u32, T>(w, I, m, [](T a) -> u32 {
    return a ? __builtin_clzll(a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  });
}
HD(h_brev) {
  lanes1<T, T>(w, I, m, [](T a) -> T {
    T r = 0;
    for (size_t i = 0; i < 8 * sizeof(T); i++) {
      r = (r << 1) | (a & 1);
      a >>= 1;
    }
    return r;
  });
}
HD(h_bfind) {
  bool sh = I.flag;
  typedef typename std::make_unsigned<T>::type U;
  lanes1<u32, T>(w, I, m, [sh](T a) -> u32 {
    U v = (U)a;
    if (std::is_signed<T>::value && a < 0) v = ~v;
    if (!v) return ~0u;
    u32 p = 63 - __builtin_clzll(v);
    return sh ? (u32)(8 * sizeof(T) - 1 - p) : p;
  });
}
HD(h_bfe) {
  lanes3<T, T, u32, u32>(w, I, m, [](T a, u32 b, u32 c) -> T {
    typedef typename std::make_unsigned<T>::type U;
    const u32 msb = 8 * sizeof(T) - 1;
    u32 pos = b & 0xff, len = c & 0xff;
    if (len == 0) return 0;
    bool sg = std::is_signed<T>::value;
    u32 top = std::min(pos + len - 1, msb);
    bool sbit = sg && (((U)a >> top) & 1);
    U v = pos > msb ? 0 : (U)a >> pos;
    if (len <= msb) v &= (((U)1 << len) - 1);
    if (pos > msb) return sbit ? (T) ~(U)0 : 0;
    u32 have = std::min(len, msb + 1 - pos);
    if (sbit && have <= msb) v |= ~(U)0 << have;
    return (T)v;
  });
}
HD(h_bfi) {
  T* d = w.r<T>(I.d);
  const T *a = w.r<T>(I.a), *b = w.r<T>(I.b);
  const u32 *c = w.r<u32>(I.c), *e = w.r<u32>(I.e);
  LANES(m) {
    u32 pos = c[lane] & 0xff, len = e[lane] & 0xff;
    const u32 n = 8 * sizeof(T);
    T f = b[lane];
    for (u32 i = 0; i < len && pos + i < n; i++)
      f = (f & ~((T)1 << (pos + i))) | (((a[lane] >> i) & 1) << (pos + i));
    d[lane] = f;
  }
}
static void h_sad(Exec&, Warp& w, const Inst& I, u32 m) {
  if (I.t0 == S32)
    lanes3<u32, i32, i32, u32>(w, I, m, [](i32 a, i32 b, u32 c) -> u32 {
      return c + (a > b ? (u32)a - (u32)b : (u32)b - (u32)a);
    });
  else
    lanes3<u32, u32, u32, u32>(
        w, I, m, [](u32 a, u32 b, u32 c) -> u32 { return c + (a > b ? a - b : b - a); });
}
static void h_mul24(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b);
  LANES(m) {
    i64 x, y;
    if (I.t0 == S32) {
      x = (i32)(a[lane] << 8) >> 8;
      y = (i32)(b[lane] << 8) >> 8;
    } else {
      x = a[lane] & 0xffffff;
      y = b[lane] & 0xffffff;
    }
    i64 p = x * y;
    u32 r = I.op ? (u32)(p >> 16) : (u32)p;
    d[lane] = r + (I.flag ? w.r<u32>(I.c)[lane] : 0);
  }
}
static void h_subsat_s32(Exec&, Warp& w, const Inst& I, u32 m) {
  bool sub = I.op;
  lanes2<i32, i32, i32>(w, I, m, [sub](i32 a, i32 b) -> i32 {
    i64 r = sub ? (i64)a - b : (i64)a + b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (i32)r;
  });
}
// add/sub/mad with carry: flags in w (CC register kept in the constant area through a pred-like
// slot)
HD(h_carry) {  // op: 0 add 1 sub 2 madlo 3 madhi ; flag: carry in, flag2: carry out
  T* d = w.r<T>(I.d);
  const T *a = w.r<T>(I.a), *b = w.r<T>(I.b);
  u32& cc = w.pr(I.f);
  LANES(m) {
    u32 ci = I.flag ? (cc >> lane & 1) : 0;
    u128 r;
    T x = a[lane], y = b[lane];
    bool co;
    if (I.op == 1) {
      u128 s = (u128)y + ci;
      r = (u128)x - s;
      co = (u128)x < s;
    } else {
      if (I.op >= 2) {
        typedef typename Wide<T>::t W;
        W p = I.t1 == S32 || I.t1 == S64 ? (W)((__int128)(typename std::make_signed<T>::type)x *
                                               (__int128)(typename std::make_signed<T>::type)y)
                                         : (W)x * y;
        x = I.op == 2 ? (T)p : (T)(p >> (8 * sizeof(T)));
        y = w.r<T>(I.c)[lane];
      }
      r = (u128)x + y + ci;
      co = (r >> (8 * sizeof(T))) & 1;
    }
    d[lane] = (T)r;
    if (I.flag2) cc = (cc & ~(1u << lane)) | ((u32)co << lane);
  }
}
static void h_dp4a(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b), *c = w.r<u32>(I.c);
  LANES(m) {
    u32 s = c[lane];
    if (I.op == 0)
      for (int k = 0; k < 4; k++) {
        i32 x = I.t0 == S32 ? (i32)(i8)(a[lane] >> 8 * k) : (i32)(u8)(a[lane] >> 8 * k),
            y = I.t1 == S32 ? (i32)(i8)(b[lane] >> 8 * k) : (i32)(u8)(b[lane] >> 8 * k);
        s += x * y;
      }
    else
      for (int k = 0; k < 2; k++) {
        i32 x = I.t0 == S32 ? (i32)(i16)(a[lane] >> 16 * k) : (i32)(u16)(a[lane] >> 16 * k);
        int q = k + (I.op == 2 ? 2 : 0);
        i32 y = I.t1 == S32 ? (i32)(i8)(b[lane] >> 8 * q) : (i32)(u8)(b[lane] >> 8 * q);
        s += x * y;
      }
    d[lane] = s;
  }
}
static void h_lop3(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 lut = I.imm;
  u32* d = w.r<u32>(I.d);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b), *c = w.r<u32>(I.c);
  u32 t[32];
  for (int i = 0; i < 32; i++) t[i] = 0;
  for (int k = 0; k < 8; k++)
    if (lut >> k & 1) {
      u32 xa = k & 4 ? 0 : ~0u, xb = k & 2 ? 0 : ~0u, xc = k & 1 ? 0 : ~0u;
      for (int i = 0; i < 32; i++) t[i] |= (a[i] ^ xa) & (b[i] ^ xb) & (c[i] ^ xc);
    }
  if (m == FULL)
    memcpy(d, t, 128);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
static void h_prmt(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b), *c = w.r<u32>(I.c);
  LANES(m) {
    u64 v = (u64)b[lane] << 32 | a[lane];
    u32 s = c[lane], r = 0;
    auto by = [&](u32 k) { return (u32)(v >> (8 * (k & 7))) & 0xff; };
    for (u32 i = 0; i < 4; i++) {
      u32 x, q = s & 3;
      switch (I.op) {
        case 0: {
          u32 sel = (s >> 4 * i) & 15;
          x = by(sel & 7);
          if (sel & 8) x = x & 0x80 ? 0xff : 0;
          break;
        }
        case 1:
          x = by(q + i);
          break;  // f4e
        case 2:
          x = by((q - i) & 7);
          break;  // b4e
        case 3:
          x = by(q);
          break;  // rc8
        case 4:
          x = by(i < q ? q : i);
          break;  // ecl
        case 5:
          x = by(i < q ? i : q);
          break;  // ecr
        default:
          x = by((q & 1) * 2 + (i & 1));
          break;  // rc16
      }
      r |= x << 8 * i;
    }
    d[lane] = r;
  }
}
static void h_shf(Exec&, Warp& w, const Inst& I, u32 m) {
  bool left = I.op, wrap = I.flag;
  lanes3<u32, u32, u32, u32>(w, I, m, [left, wrap](u32 a, u32 b, u32 c) -> u32 {
    u32 n = wrap ? c & 31 : std::min(c, 32u);
    u64 v = (u64)b << 32 | a;
    return left ? (u32)((v << n) >> 32) : (u32)(v >> n);
  });
}
static void h_szext(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const u32 *a = w.r<u32>(I.a), *b = w.r<u32>(I.b);
  LANES(m) {
    u32 n = I.flag ? b[lane] & 31 : std::min(b[lane], 32u);
    if (I.t0 == S32)
      d[lane] = n == 0 ? 0 : n >= 32 ? a[lane] : (u32)((i32)(a[lane] << (32 - n)) >> (32 - n));
    else
      d[lane] = n >= 32 ? a[lane] : a[lane] & ((1u << n) - 1);
  }
}
static void h_bmsk(Exec&, Warp& w, const Inst& I, u32 m) {
  bool wrap = I.flag;
  lanes2<u32, u32, u32>(w, I, m, [wrap](u32 a, u32 b) -> u32 {
    if (wrap) {
      a &= 31;
      b &= 31;
    }
    u64 mk = b >= 32 ? 0xffffffffull : (1ull << b) - 1;
    return a >= 32 ? 0 : (u32)(mk << a);
  });
}
template <class T>
static void h_x2(Exec&, Warp& w, const Inst& I, u32 m) {  // u16x2 / s16x2 add,min,max
  T* d = w.r<T>(I.d);
  const T *a = w.r<T>(I.a), *b = w.r<T>(I.b);
  LANES(m) for (int k = 0; k < 2; k++) {
    T x = a[2 * lane + k], y = b[2 * lane + k];
    d[2 * lane + k] = I.op == 0 ? (T)(x + y) : I.op == 1 ? std::min(x, y) : std::max(x, y);
  }
}

// f32/f64
static inline float fl(float x) { return ftzf(x); }
static inline double fl(double x) { return x; }
template <class T>
static inline T satf(T x) {
  return x != x ? (T)0 : x < 0 ? (T)0 : x > 1 ? (T)1 : (x == 0 ? (T)0 : x);
}
#define FBIN(name, FO, expr)                                        \
  template <class T>                                                \
  static void name(Exec&, Warp& w, const Inst& I, u32 m) {          \
    if (!I.ftz && !I.sat && I.rnd <= R_RN) {                        \
      lanes2<T, T, T>(w, I, m, [](T a, T b) -> T { return expr; }); \
      return;                                                       \
    }                                                               \
    bool ftz = I.ftz, sat = I.sat;                                  \
    int r = I.rnd;                                                  \
    if (r <= R_RN && !sat) {                                        \
      lanes2<T, T, T>(w, I, m, [](T a, T b) -> T {                  \
        a = fl(a);                                                  \
        b = fl(b);                                                  \
        return fl(expr);                                            \
      });                                                           \
      return;                                                       \
    }                                                               \
    lanes2<T, T, T>(w, I, m, [=](T a, T b) -> T {                   \
      if (ftz) {                                                    \
        a = fl(a);                                                  \
        b = fl(b);                                                  \
      }                                                             \
      T x = r <= R_RN ? expr : fp_mode_op<T>(FO, a, b, 0, r);       \
      if (ftz) x = fl(x);                                           \
      if (sat) x = satf(x);                                         \
      return x;                                                     \
    });                                                             \
  }
FBIN(h_fadd, FO_ADD, a + b)
FBIN(h_fsub, FO_SUB, a - b)
FBIN(h_fmul, FO_MUL, a* b)
FBIN(h_fdiv, FO_DIV, a / b)
template <class T>
static void h_ffma(Exec&, Warp& w, const Inst& I, u32 m) {
  if (!I.ftz && !I.sat && I.rnd <= R_RN) {
    lanes3<T, T, T, T>(w, I, m, [](T a, T b, T c) -> T { return std::fma(a, b, c); });
    return;
  }
  bool ftz = I.ftz, sat = I.sat;
  int r = I.rnd;
  if (r <= R_RN && !sat) {
    lanes3<T, T, T, T>(w, I, m,
                       [](T a, T b, T c) -> T { return fl((T)std::fma(fl(a), fl(b), fl(c))); });
    return;
  }
  lanes3<T, T, T, T>(w, I, m, [=](T a, T b, T c) -> T {
    if (ftz) {
      a = fl(a);
      b = fl(b);
      c = fl(c);
    }
    T x = r <= R_RN ? std::fma(a, b, c) : fp_mode_op<T>(FO_FMA, a, b, c, r);
    if (ftz) x = fl(x);
    if (sat) x = satf(x);
    return x;
  });
}
template <class T>
static inline T pmin(T a, T b, bool nan) {
  if (a != a || b != b) {
    if (nan) return (T)NAN;
    return a != a ? b : a;
  }
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
static inline T pmax(T a, T b, bool nan) {
  if (a != a || b != b) {
    if (nan) return (T)NAN;
    return a != a ? b : a;
  }
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
static inline float cnan(float x) { return x != x ? u2f(0x7fffffff) : x; }
static inline double cnan(double x) { return x; }
template <class T>
static void h_fminmax(Exec&, Warp& w, const Inst& I, u32 m) {
  bool ftz = I.ftz, nan = I.flag, xs = I.flag2;
  auto f = [=](T a, T b, bool mx) -> T {
    if (ftz) {
      a = fl(a);
      b = fl(b);
    }
    T r;
    if (xs) {
      T x = std::fabs(a), y = std::fabs(b);
      bool s = std::signbit(a) ^ std::signbit(b);
      r = mx ? pmax(x, y, nan) : pmin(x, y, nan);
      return s ? -r : r;
    }
    r = mx ? pmax(a, b, nan) : pmin(a, b, nan);
    return cnan(r);
  };
  if (I.op)
    lanes2<T, T, T>(w, I, m, [=](T a, T b) -> T { return f(a, b, true); });
  else
    lanes2<T, T, T>(w, I, m, [=](T a, T b) -> T { return f(a, b, false); });
}
template <class T>
static void h_fabs(Exec&, Warp& w, const Inst& I, u32 m) {
  bool ftz = I.ftz;
  lanes1<T, T>(w, I, m, [=](T a) -> T {
    if (ftz) a = fl(a);
    return std::fabs(a);
  });
}
template <class T>
static void h_fneg(Exec&, Warp& w, const Inst& I, u32 m) {
  bool ftz = I.ftz;
  lanes1<T, T>(w, I, m, [=](T a) -> T {
    if (ftz) a = fl(a);
    return -a;
  });
}
enum { U_EX2, U_LG2, U_RCP, U_SQRT, U_RSQRT, U_SIN, U_COS, U_TANH };
template <class T>
static T unary(int op, T a, int r) {
  switch (op) {
    case U_EX2:
      return std::exp2(a);
    case U_LG2:
      return std::log2(a);
    case U_RCP:
      return r <= R_RN ? (T)1 / a : fp_mode_op<T>(FO_RCP, a, 0, 0, r);
    case U_SQRT:
      return r <= R_RN ? std::sqrt(a) : fp_mode_op<T>(FO_SQRT, a, 0, 0, r);
    case U_RSQRT:
      return (T)1 / std::sqrt(a);
    case U_SIN:
      return std::sin(a);
    case U_COS:
      return std::cos(a);
    default:
      return std::tanh(a);
  }
}
template <class T>
static void h_funary(Exec&, Warp& w, const Inst& I, u32 m) {
  T* d = w.r<T>(I.d);
  const T* a = w.r<T>(I.a);
  LANES(m) {
    T x = a[lane];
    if (I.ftz) x = fl(x);
    T y = unary<T>(I.op, x, I.rnd);
    if (I.ftz) y = fl(y);
    d[lane] = cnan(y);
  }
}
static void h_copysign32(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes2<u32, u32, u32>(w, I, m,
                        [](u32 a, u32 b) { return (a & 0x80000000u) | (b & 0x7fffffffu); });
}
static void h_copysign64(Exec&, Warp& w, const Inst& I, u32 m) {
  lanes2<u64, u64, u64>(w, I, m,
                        [](u64 a, u64 b) { return (a & (1ull << 63)) | (b & ~(1ull << 63)); });
}
static void h_testp(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 r = 0;
  LANES(m) {
    double x = I.t0 == F32 ? w.r<float>(I.a)[lane] : w.r<double>(I.a)[lane];
    bool sub = I.t0 == F32 ? ((f2u((float)x) & 0x7f800000) == 0 && x != 0)
                           : (std::fpclassify(x) == FP_SUBNORMAL);
    bool v = false;
    switch (I.op) {
      case 0:
        v = std::isfinite(x);
        break;
      case 1:
        v = std::isinf(x);
        break;
      case 2:
        v = x == x;
        break;
      case 3:
        v = x != x;
        break;
      case 4:
        v = std::isfinite(x) && x != 0 && !sub;
        break;
      case 5:
        v = sub;
        break;
    }
    r |= (u32)v << lane;
  }
  w.pr(I.d) = (w.pr(I.d) & ~m) | r;
}

// half types: registers viewed as arrays of 16-bit elements (32 or 64 of them)
enum {
  HO_ADD,
  HO_SUB,
  HO_MUL,
  HO_FMA,
  HO_MIN,
  HO_MAX,
  HO_ABS,
  HO_NEG,
  HO_EX2,
  HO_TANH,
  HO_LG2,
  HO_RCP,
  HO_RSQRT,
  HO_SIN,
  HO_COS,
  HO_SQRT
};
template <bool BF>
static void h_half(Exec&, Warp& w, const Inst& I, u32 m) {
  int n = I.vec * 32;
  u16* d = w.r<u16>(I.d);
  const u16* a = w.r<u16>(I.a);
  const u16* b = I.b == NOREG ? a : w.r<u16>(I.b);
  const u16* c = I.c == NOREG ? a : w.r<u16>(I.c);
  u16 t[64];
  float fa[64], fb[64], fc[64], fr[64];
  auto in = [&](const u16* s, float* f) {
    if (BF)
      bf2f(s, f, n);
    else
      h2f(s, f, n);
    if (I.ftz)
      for (int i = 0; i < n; i++) {
        if (BF)
          f[i] = ftzf(f[i]);
        else if (std::fabs(f[i]) < 6.103515625e-5f)
          f[i] = std::copysign(0.0f, f[i]);
      }
  };
  if (I.op == HO_ABS) {
    for (int i = 0; i < n; i++) t[i] = a[i] & 0x7fff;
  } else if (I.op == HO_NEG) {
    for (int i = 0; i < n; i++) t[i] = a[i] ^ 0x8000;
  } else {
    in(a, fa);
    if (I.b != NOREG) in(b, fb);
    if (I.c != NOREG) in(c, fc);
    switch (I.op) {
      case HO_ADD:
        for (int i = 0; i < n; i++) fr[i] = fa[i] + fb[i];
        break;
      case HO_SUB:
        for (int i = 0; i < n; i++) fr[i] = fa[i] - fb[i];
        break;
      case HO_MUL:
        for (int i = 0; i < n; i++) fr[i] = fa[i] * fb[i];
        break;
      case HO_FMA:
        for (int i = 0; i < n; i++) {
          double s = fma_odd(fa[i], fb[i], fc[i]);
          fr[i] = s != s ? NAN : (float)round_to(s, BF ? 8 : 11, BF ? -126 : -14);
        }
        break;
      case HO_MIN:
        for (int i = 0; i < n; i++) fr[i] = pmin(fa[i], fb[i], I.flag);
        break;
      case HO_MAX:
        for (int i = 0; i < n; i++) fr[i] = pmax(fa[i], fb[i], I.flag);
        break;
      case HO_EX2:
        for (int i = 0; i < n; i++) fr[i] = exp2f(fa[i]);
        break;
      case HO_TANH:
        for (int i = 0; i < n; i++) fr[i] = tanhf(fa[i]);
        break;
      default:
        fail(Fault::Unsupported, "half op");
    }
    if (I.sat)
      for (int i = 0; i < n; i++) fr[i] = satf(fr[i]);
    if (I.flag2)
      for (int i = 0; i < n; i++)
        fr[i] = fr[i] != fr[i] ? fr[i] : std::max(fr[i], 0.0f);  // relu keeps NaN
    if (BF)
      f2bf(fr, t, n);
    else
      f2h(fr, t, n);
    if (I.ftz && !BF)
      for (int i = 0; i < n; i++)
        if (!(t[i] & 0x7c00)) t[i] &= 0x8000;
    if (I.ftz && BF)
      for (int i = 0; i < n; i++)
        if (!(t[i] & 0x7f80)) t[i] &= 0x8000;
  }
  if (m == FULL)
    memcpy(d, t, 2 * n);
  else if (I.vec == 1) {
    for (int i = 0; i < 32; i++)
      if (m >> i & 1) d[i] = t[i];
  } else
    for (int i = 0; i < 32; i++)
      if (m >> i & 1) {
        d[2 * i] = t[2 * i];
        d[2 * i + 1] = t[2 * i + 1];
      }
}

// compare
enum {
  CO_EQ,
  CO_NE,
  CO_LT,
  CO_LE,
  CO_GT,
  CO_GE,
  CO_EQU,
  CO_NEU,
  CO_LTU,
  CO_LEU,
  CO_GTU,
  CO_GEU,
  CO_NUM,
  CO_NAN
};
static inline u32 mask_of(const u8* t) {
#if defined(__AVX2__)
  return (u32)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i*)t));
#else
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)(t[i] >> 7) << i;
  return r;
#endif
}
template <class T, class F>
static inline u32 cmpl(const T* a, const T* b, F f) {
  u8 t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i]) ? 0xff : 0;
  return mask_of(t);
}
template <class T>
static u32 cmp_int(int op, const T* a, const T* b) {
  switch (op) {
    case CO_EQ:
      return cmpl(a, b, [](T x, T y) { return x == y; });
    case CO_NE:
      return cmpl(a, b, [](T x, T y) { return x != y; });
    case CO_LT:
      return cmpl(a, b, [](T x, T y) { return x < y; });
    case CO_LE:
      return cmpl(a, b, [](T x, T y) { return x <= y; });
    case CO_GT:
      return cmpl(a, b, [](T x, T y) { return x > y; });
    default:
      return cmpl(a, b, [](T x, T y) { return x >= y; });
  }
}
template <class T>
static u32 cmp_flt(int op, const T* a, const T* b) {
  switch (op) {
    case CO_EQ:
      return cmpl(a, b, [](T x, T y) { return x == y; });
    case CO_NE:
      return cmpl(a, b, [](T x, T y) { return x < y || x > y; });
    case CO_LT:
      return cmpl(a, b, [](T x, T y) { return x < y; });
    case CO_LE:
      return cmpl(a, b, [](T x, T y) { return x <= y; });
    case CO_GT:
      return cmpl(a, b, [](T x, T y) { return x > y; });
    case CO_GE:
      return cmpl(a, b, [](T x, T y) { return x >= y; });
    case CO_EQU:
      return cmpl(a, b, [](T x, T y) { return !(x < y || x > y); });
    case CO_NEU:
      return cmpl(a, b, [](T x, T y) { return !(x == y); });
    case CO_LTU:
      return cmpl(a, b, [](T x, T y) { return !(x >= y); });
    case CO_LEU:
      return cmpl(a, b, [](T x, T y) { return !(x > y); });
    case CO_GTU:
      return cmpl(a, b, [](T x, T y) { return !(x <= y); });
    case CO_GEU:
      return cmpl(a, b, [](T x, T y) { return !(x < y); });
    case CO_NUM:
      return cmpl(a, b, [](T x, T y) { return x == x && y == y; });
    default:
      return cmpl(a, b, [](T x, T y) { return x != x || y != y; });
  }
}
static u32 compare(Warp& w, const Inst& I, u32* hi) {
  switch (I.t0) {
    case B16:
    case U16:
      return cmp_int(I.op, w.r<u16>(I.a), w.r<u16>(I.b));
    case S16:
      return cmp_int(I.op, w.r<i16>(I.a), w.r<i16>(I.b));
    case B32:
    case U32:
      return cmp_int(I.op, w.r<u32>(I.a), w.r<u32>(I.b));
    case S32:
      return cmp_int(I.op, w.r<i32>(I.a), w.r<i32>(I.b));
    case B64:
    case U64:
      return cmp_int(I.op, w.r<u64>(I.a), w.r<u64>(I.b));
    case S64:
      return cmp_int(I.op, w.r<i64>(I.a), w.r<i64>(I.b));
    case F32:
      if (I.ftz) {
        float x[32], y[32];
        for (int i = 0; i < 32; i++) {
          x[i] = ftzf(w.r<float>(I.a)[i]);
          y[i] = ftzf(w.r<float>(I.b)[i]);
        }
        return cmp_flt(I.op, x, y);
      }
      return cmp_flt(I.op, w.r<float>(I.a), w.r<float>(I.b));
    case F64:
      return cmp_flt(I.op, w.r<double>(I.a), w.r<double>(I.b));
    case F16:
    case BF16: {
      float x[32], y[32];
      if (I.t0 == F16) {
        h2f(w.r<u16>(I.a), x, 32);
        h2f(w.r<u16>(I.b), y, 32);
      } else {
        bf2f(w.r<u16>(I.a), x, 32);
        bf2f(w.r<u16>(I.b), y, 32);
      }
      return cmp_flt(I.op, x, y);
    }
    case F16X2:
    case BF16X2: {
      float x[64], y[64], p[32], q[32];
      if (I.t0 == F16X2) {
        h2f(w.r<u16>(I.a), x, 64);
        h2f(w.r<u16>(I.b), y, 64);
      } else {
        bf2f(w.r<u16>(I.a), x, 64);
        bf2f(w.r<u16>(I.b), y, 64);
      }
      for (int i = 0; i < 32; i++) {
        p[i] = x[2 * i + 1];
        q[i] = y[2 * i + 1];
      }
      *hi = cmp_flt(I.op, p, q);
      for (int i = 0; i < 32; i++) {
        p[i] = x[2 * i];
        q[i] = y[2 * i];
      }
      return cmp_flt(I.op, p, q);
    }
    default:
      fail(Fault::Unsupported, "compare type");
  }
}
static inline u32 boolop(int o, u32 a, u32 c) {
  return o == 1 ? a & c : o == 2 ? a | c : o == 3 ? a ^ c : a;
}
static void h_setp(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 hi = 0, r = compare(w, I, &hi), q = ~r;
  bool x2 = I.t0 == F16X2 || I.t0 == BF16X2;
  if (x2) q = hi;
  if (I.op2) {
    u32 c = w.pr(I.c);
    if (I.neg) c = ~c;
    r = boolop(I.op2, r, c);
    q = boolop(I.op2, q, c);
  }
  u32& d = w.pr(I.d);
  d = (d & ~m) | (r & m);
  if (I.e != NOREG) {
    u32& e = w.pr(I.e);
    e = (e & ~m) | (q & m);
  }
}
static void h_set(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 hi = 0, r = compare(w, I, &hi);
  if (I.op2) {
    u32 c = w.pr(I.c);
    if (I.neg) c = ~c;
    r = boolop(I.op2, r, c);
    hi = boolop(I.op2, hi, c);
  }
  LANES(m) {
    bool v = r >> lane & 1, h = hi >> lane & 1;
    switch (I.t1) {
      case F32:
        w.r<float>(I.d)[lane] = v;
        break;
      case U32:
      case S32:
        w.r<u32>(I.d)[lane] = v ? ~0u : 0;
        break;
      case F16:
        w.r<u16>(I.d)[lane] = v ? 0x3c00 : 0;
        break;
      case BF16:
        w.r<u16>(I.d)[lane] = v ? 0x3f80 : 0;
        break;
      case U16:
      case S16:
        w.r<u16>(I.d)[lane] = v ? 0xffff : 0;
        break;
      case F16X2:
        w.r<u32>(I.d)[lane] = (v ? 0x3c00 : 0) | (h ? 0x3c000000 : 0);
        break;
      case BF16X2:
        w.r<u32>(I.d)[lane] = (v ? 0x3f80 : 0) | (h ? 0x3f800000 : 0);
        break;
      default:
        fail(Fault::Unsupported, "set type");
    }
  }
  if ((I.t0 == F16X2 || I.t0 == BF16X2) && I.t1 == U32) LANES(m)
  w.r<u32>(I.d)[lane] = ((r >> lane & 1) ? 0xffff : 0) | ((hi >> lane & 1) ? 0xffff0000u : 0);
}
HD(h_selp) {
  T* d = w.r<T>(I.d);
  const T *a = w.r<T>(I.a), *b = w.r<T>(I.b);
  u32 p = w.pr(I.c);
  if (I.neg) p = ~p;
  T t[32];
  for (int i = 0; i < 32; i++) t[i] = (p >> i & 1) ? a[i] : b[i];
  if (m == FULL)
    memcpy(d, t, sizeof t);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
HD(h_slct) {
  T* d = w.r<T>(I.d);
  const T *a = w.r<T>(I.a), *b = w.r<T>(I.b);
  LANES(m) {
    bool ge = I.t1 == F32 ? (I.ftz ? ftzf(w.r<float>(I.c)[lane]) : w.r<float>(I.c)[lane]) >= 0
                          : w.r<i32>(I.c)[lane] >= 0;
    d[lane] = ge ? a[lane] : b[lane];
  }
}
// predicates, mov
static void h_plogic(Exec&, Warp& w, const Inst& I, u32 m) {
  u32 a = w.pr(I.a), b = I.b == NOREG ? 0 : w.pr(I.b);
  if (I.neg) a = ~a;
  if (I.flag) b = ~b;
  u32 r = I.op == 0 ? a & b : I.op == 1 ? a | b : I.op == 2 ? a ^ b : I.op == 3 ? ~a : a;
  u32& d = w.pr(I.d);
  d = (d & ~m) | (r & m);
}
HD(h_mov) {
  T* d = w.r<T>(I.d);
  const T* a = w.r<T>(I.a);
  if (m == FULL)
    memmove(d, a, sizeof(T) * 32);
  else
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? a[i] : d[i];
}
static void h_pack(Exec&, Warp& w, const Inst& I, u32 m) {
  int es = I.sz, n = I.x.size();
  if (n == 2 && es == 2) {
    u32* d = w.r<u32>(I.d);
    const u16 *a = w.r<u16>(I.x[0]), *b = w.r<u16>(I.x[1]);
    u32 t[32];
    for (int i = 0; i < 32; i++) t[i] = a[i] | (u32)b[i] << 16;
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
    return;
  }
  if (n == 2 && es == 4) {
    u64* d = w.r<u64>(I.d);
    const u32 *a = w.r<u32>(I.x[0]), *b = w.r<u32>(I.x[1]);
    u64 t[32];
    for (int i = 0; i < 32; i++) t[i] = a[i] | (u64)b[i] << 32;
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
    return;
  }
  u8* d = w.R + I.d;
  int ds = es * n;
  LANES(m) {
    u8 t[16];
    for (int k = 0; k < n; k++) memcpy(t + k * es, w.R + I.x[k] + lane * es, es);
    memcpy(d + lane * ds, t, ds);
  }
}
static void h_unpack(Exec&, Warp& w, const Inst& I, u32 m) {
  int es = I.sz, n = I.x.size();
  if (n == 2 && es == 2) {
    const u32* a = w.r<u32>(I.a);
    u32 t[32];
    memcpy(t, a, 128);
    if (I.x[0] != NOREG) {
      u16* d = w.r<u16>(I.x[0]);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? (u16)t[i] : d[i];
    }
    if (I.x[1] != NOREG) {
      u16* d = w.r<u16>(I.x[1]);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? (u16)(t[i] >> 16) : d[i];
    }
    return;
  }
  u8 t[512];
  int ss = es * n;
  memcpy(t, w.R + I.a, ss * 32);
  LANES(m)
  for (int k = 0; k < n; k++)
    if (I.x[k] != NOREG) memcpy(w.R + I.x[k] + lane * es, t + lane * ss + k * es, es);
}
static void h_clock(Exec& E, Warp& w, const Inst& I, u32 m) {
  E.clock += 16;
  if (I.sz == 4) {
    LANES(m) w.r<u32>(I.d)[lane] = (u32)E.clock;
  } else {
    LANES(m) w.r<u64>(I.d)[lane] = E.clock;
  }
}

static void h_fns(Exec&, Warp& w, const Inst& I, u32 m) {
  LANES(m) {
    u32 mk = w.r<u32>(I.a)[lane], d = ~0u;
    int pos = (int)w.r<u32>(I.b)[lane], off = w.r<i32>(I.c)[lane];
    if (pos > 31) {
      w.r<u32>(I.d)[lane] = d;
      continue;
    }
    if (off == 0) {
      if (mk >> pos & 1) d = pos;
    } else {
      int cnt = std::abs(off) - 1, inc = off > 0 ? 1 : -1;
      for (; pos >= 0 && pos < 32; pos += inc)
        if (mk >> pos & 1) {
          if (!cnt) {
            d = pos;
            break;
          }
          cnt--;
        }
    }
    w.r<u32>(I.d)[lane] = d;
  }
}
// SIMD video instructions on 2 halves or 4 bytes: op, signedness of d/a/b, saturation, optional
// accumulation
static void h_video(Exec&, Warp& w, const Inst& I, u32 m) {
  int n = I.vec, b = 32 / n;
  u32 mk = n == 4 ? 0xff : 0xffff;
  LANES(m) {
    u32 x = w.r<u32>(I.a)[lane], y = w.r<u32>(I.b)[lane], c = w.r<u32>(I.c)[lane], d = 0;
    i64 sum = 0;
    for (int k = 0; k < n; k++) {
      u32 xu = x >> (b * k) & mk, yu = y >> (b * k) & mk;
      i32 p = I.t1 == S32 ? (i32)(xu << (32 - b)) >> (32 - b) : (i32)xu,
          q = I.t2 == S32 ? (i32)(yu << (32 - b)) >> (32 - b) : (i32)yu;
      i32 r = 0;
      switch (I.op) {
        case 0:
          r = p + q;
          break;
        case 1:
          r = p - q;
          break;
        case 2:
          r = (p + q + ((p + q) >= 0 ? 1 : 0)) >> 1;
          break;
        case 3:
          r = std::abs(p - q);
          break;
        case 4:
          r = std::min(p, q);
          break;
        case 5:
          r = std::max(p, q);
          break;
        default:
          r = I.op2 == 0   ? p == q
              : I.op2 == 1 ? p != q
              : I.op2 == 2 ? p < q
              : I.op2 == 3 ? p <= q
              : I.op2 == 4 ? p > q
                           : p >= q;
      }
      if (I.sat) {
        i32 lo = I.t0 == S32 ? -(1 << (b - 1)) : 0, hi = I.t0 == S32 ? (1 << (b - 1)) - 1 : (i32)mk;
        r = std::max(lo, std::min(hi, r));
      }
      sum += r;
      d |= ((u32)r & mk) << (b * k);
    }
    w.r<u32>(I.d)[lane] = I.flag ? c + (u32)sum : d;
  }
}
#define TI(H, t) pick_int(t, {H<u16>, H<i16>, H<u32>, H<i32>, H<u64>, H<i64>})
struct H6 {
  Handler h[6];
};
static Handler pick_int(Ty t, H6 h) {
  switch (t) {
    case B16:
    case U16:
      return h.h[0];
    case S16:
      return h.h[1];
    case B32:
    case U32:
      return h.h[2];
    case S32:
      return h.h[3];
    case B64:
    case U64:
      return h.h[4];
    case S64:
      return h.h[5];
    default:
      return nullptr;
  }
}
#define TU(H, t) pick_uns(t, H<u16>, H<u32>, H<u64>)
static Handler pick_uns(Ty t, Handler a, Handler b, Handler c) {
  switch (ty_size(t)) {
    case 2:
      return a;
    case 4:
      return b;
    case 8:
      return c;
    default:
      return nullptr;
  }
}
static bool is_half(Ty t) { return t == F16 || t == F16X2 || t == BF16 || t == BF16X2; }

bool decode_alu(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  I.cls = C_INT;
  I.kind = K_ALU;
  auto bin = [&](Ty t) {
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    I.b = d.src(d.op(2), t);
  };
  auto nops = [&](size_t n) {
    if (d.n() != n) d.bad("operand count");
  };
  auto halfop = [&](Ty t, int o, int na) {
    I.op = o;
    I.vec = (t == F16X2 || t == BF16X2) ? 2 : 1;
    I.cls = C_FP16;
    I.t0 = t;
    nops(na + 1);
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    if (na > 1) I.b = d.src(d.op(2), t);
    if (na > 2) I.c = d.src(d.op(3), t);
    I.fn = (t == BF16 || t == BF16X2) ? h_half<true> : h_half<false>;
    d.done();
    return true;
  };
  if (op == "add" || op == "sub" || op == "addc" || op == "subc") {
    bool sub = op[0] == 's', ci = op.size() == 4, co = d.take("cc");
    I.rnd = d.rounding();
    I.ftz = d.take("ftz");
    I.sat = d.take("sat");
    Ty t = d.need_type();
    I.t0 = t;
    if (ci || co) {
      if (I.sat || ty_float(t)) d.bad("carry form");
      bin(t);
      I.op = sub;
      I.flag = ci;
      I.flag2 = co;
      I.f = d.konst(4, 0, 0, -3);
      I.fn = ty_size(t) == 8 ? h_carry<u64> : ty_size(t) == 4 ? h_carry<u32> : nullptr;
      d.done();
      return true;
    }
    if (t == F32 || t == F64) {
      if (t == F64 && (I.ftz || I.sat)) d.bad("f64 modifier");
      bin(t);
      I.cls = t == F32 ? C_FP32 : C_FP64;
      I.fn = t == F32 ? (sub ? h_fsub<float> : h_fadd<float>)
                      : (sub ? h_fsub<double> : h_fadd<double>);
      d.done();
      nops(3);
      return true;
    }
    if (is_half(t)) {
      if (I.rnd > R_RN) d.bad("rounding");
      return halfop(t, sub ? HO_SUB : HO_ADD, 2);
    }
    if (t == U16X2 || t == S16X2) {
      bin(t);
      I.op = 0;
      if (sub) d.bad("sub x2");
      I.fn = h_x2<u16>;
      d.done();
      return true;
    }
    if (I.rnd || I.ftz) d.bad("integer modifier");
    bin(t);
    nops(3);
    if (I.sat) {
      if (t != S32) d.bad(".sat");
      I.op = sub;
      I.fn = h_subsat_s32;
    } else
      I.fn = sub ? TU(h_sub, t) : TU(h_add, t);
    d.done();
    return true;
  }
  if (op == "mul" || op == "mad" || op == "fma" || op == "madc") {
    bool three = op != "mul", cc = d.take("cc"), ci = op == "madc";
    I.rnd = d.rounding();
    bool lo = d.take("lo"), hi = d.take("hi"), wide = d.take("wide");
    I.ftz = d.take("ftz");
    bool relu = d.take("relu");
    I.sat = d.take("sat");
    Ty t = d.need_type();
    I.t0 = t;
    if (t == F32 || t == F64) {
      if (lo || hi || wide || relu || cc || ci) d.bad("modifier");
      bin(t);
      if (three) I.c = d.src(d.op(3), t);
      nops(three ? 4 : 3);
      I.cls = t == F32 ? C_FP32 : C_FP64;
      I.fn = t == F32 ? (three ? h_ffma<float> : h_fmul<float>)
                      : (three ? h_ffma<double> : h_fmul<double>);
      d.done();
      return true;
    }
    if (is_half(t)) {
      if (I.rnd > R_RN) d.bad("rounding");
      I.flag2 = relu;
      return halfop(t, three ? HO_FMA : HO_MUL, three ? 3 : 2);
    }
    if (op == "fma" || I.rnd || I.ftz || relu || I.sat || (lo + hi + wide) != 1)
      d.bad("integer multiply modifiers");
    if (ty_float(t)) d.bad("type");
    if (cc || ci) {
      if (!three || wide) d.bad("carry form");
      bin(t);
      I.c = d.src(d.op(3), t);
      I.op = hi ? 3 : 2;
      I.t1 = t;
      I.flag = ci;
      I.flag2 = cc;
      I.f = d.konst(4, 0, 0, -3);
      I.fn = ty_size(t) == 8 ? h_carry<u64> : ty_size(t) == 4 ? h_carry<u32> : nullptr;
      d.done();
      return true;
    }
    if (wide) {
      Ty wt = ty_size(t) == 2 ? U32 : ty_size(t) == 4 ? U64 : T_NONE;
      if (wt == T_NONE) d.bad("wide");
      I.d = d.dst(d.op(0), ty_size(wt));
      I.a = d.src(d.op(1), t);
      I.b = d.src(d.op(2), t);
      if (three) I.c = d.src(d.op(3), wt);
      switch (t) {
        case U16:
          I.fn = three ? h_madwide<u16> : h_mulwide<u16>;
          break;
        case S16:
          I.fn = three ? h_madwide<i16> : h_mulwide<i16>;
          break;
        case U32:
          I.fn = three ? h_madwide<u32> : h_mulwide<u32>;
          break;
        case S32:
          I.fn = three ? h_madwide<i32> : h_mulwide<i32>;
          break;
        default:
          d.bad("wide type");
      }
    } else {
      bin(t);
      if (three) I.c = d.src(d.op(3), t);
      if (lo)
        I.fn = three ? TU(h_madlo, t) : TU(h_mullo, t);
      else
        I.fn = three ? TI(h_madhi, t) : TI(h_mulhi, t);
    }
    nops(three ? 4 : 3);
    d.done();
    return true;
  }
  if (op == "mul24" || op == "mad24") {
    bool hi = d.take("hi");
    d.take("lo");
    I.t0 = d.need_type();
    bin(I.t0);
    I.op = hi;
    if (op == "mad24") {
      I.flag = true;
      I.c = d.src(d.op(3), I.t0);
    }
    I.fn = h_mul24;
    d.done();
    return true;
  }
  if (op == "div") {
    bool ap = d.take("approx") | d.take("full");
    I.rnd = d.rounding();
    I.ftz = d.take("ftz");
    Ty t = d.need_type();
    I.t0 = t;
    bin(t);
    nops(3);
    d.done();
    if (t == F32) {
      I.cls = C_MUFU;
      I.fn = h_fdiv<float>;
    } else if (t == F64) {
      I.cls = C_FP64;
      I.fn = h_fdiv<double>;
    } else if (ap || I.ftz || I.rnd)
      d.bad("modifier");
    else
      I.fn = TI(h_div, t);
    return true;
  }
  if (op == "rem") {
    Ty t = d.need_type();
    bin(t);
    d.done();
    I.fn = TI(h_rem, t);
    return true;
  }
  if (op == "min" || op == "max") {
    bool mx = op == "max";
    I.ftz = d.take("ftz");
    I.flag = d.take("NaN");
    bool relu = d.take("relu");
    bool xs = d.take("xorsign");
    if (xs) d.take("abs");
    Ty t = d.need_type();
    I.t0 = t;
    I.flag2 = xs;
    if (t == F32 || t == F64) {
      bin(t);
      nops(3);
      I.op = mx;
      I.cls = t == F32 ? C_FP32 : C_FP64;
      I.fn = t == F32 ? h_fminmax<float> : h_fminmax<double>;
      d.done();
      return true;
    }
    if (is_half(t)) {
      if (relu || xs) d.bad("modifier");
      return halfop(t, mx ? HO_MAX : HO_MIN, 2);
    }
    if (relu) d.bad("relu");
    if (t == U16X2 || t == S16X2) {
      bin(t);
      I.op = mx ? 2 : 1;
      I.fn = t == U16X2 ? h_x2<u16> : h_x2<i16>;
      d.done();
      return true;
    }
    bin(t);
    nops(3);
    I.fn = mx ? TI(h_max, t) : TI(h_min, t);
    d.done();
    return true;
  }
  if (op == "abs" || op == "neg") {
    I.ftz = d.take("ftz");
    Ty t = d.need_type();
    I.t0 = t;
    if (is_half(t)) return halfop(t, op == "abs" ? HO_ABS : HO_NEG, 1);
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    nops(2);
    d.done();
    if (t == F32) {
      I.cls = C_FP32;
      I.fn = op == "abs" ? h_fabs<float> : h_fneg<float>;
    } else if (t == F64) {
      I.cls = C_FP64;
      I.fn = op == "abs" ? h_fabs<double> : h_fneg<double>;
    } else if (op == "neg")
      I.fn = TU(h_neg, t);
    else
      I.fn = t == S16 ? h_abs<i16> : t == S32 ? h_abs<i32> : t == S64 ? h_abs<i64> : nullptr;
    return true;
  }
  if (op == "and" || op == "or" || op == "xor" || op == "not") {
    Ty t = d.need_type();
    d.done();
    bool un = op == "not";
    nops(un ? 2 : 3);
    int o = op == "and" ? 0 : op == "or" ? 1 : op == "xor" ? 2 : 3;
    if (t == PRED) {
      I.d = d.dst(d.op(0), 4);
      I.a = d.pred(d.op(1), &I.neg);
      if (!un) I.b = d.pred(d.op(2), &I.flag);
      I.op = o;
      I.fn = h_plogic;
      return true;
    }
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    if (!un) I.b = d.src(d.op(2), t);
    I.fn = o == 0 ? TU(h_and, t) : o == 1 ? TU(h_or, t) : o == 2 ? TU(h_xor, t) : TU(h_not, t);
    return true;
  }
  if (op == "cnot") {
    Ty t = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    I.fn = TU(h_cnot, t);
    return true;
  }
  if (op == "shl" || op == "shr") {
    Ty t = d.need_type();
    d.done();
    nops(3);
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    I.b = d.src(d.op(2), U32);
    I.fn = op == "shl" ? TU(h_shl, t) : TI(h_shr, t);
    return true;
  }
  if (op == "shf") {
    I.op = d.take("l");
    if (!I.op && !d.take("r")) d.bad("shf");
    I.flag = d.take("wrap");
    if (!I.flag && !d.take("clamp")) d.bad("shf");
    Ty t = d.need_type();
    d.done();
    bin(t);
    I.c = d.src(d.op(3), U32);
    I.fn = h_shf;
    return true;
  }
  if (op == "popc" || op == "clz") {
    Ty t = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), t);
    I.fn = op == "popc" ? (ty_size(t) == 8 ? h_popc<u64> : h_popc<u32>)
                        : (ty_size(t) == 8 ? h_clz<u64> : h_clz<u32>);
    return true;
  }
  if (op == "brev") {
    Ty t = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    I.fn = ty_size(t) == 8 ? h_brev<u64> : h_brev<u32>;
    return true;
  }
  if (op == "bfind") {
    I.flag = d.take("shiftamt");
    Ty t = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), t);
    I.fn = TI(h_bfind, t);
    return true;
  }
  if (op == "bfe") {
    Ty t = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    I.b = d.src(d.op(2), U32);
    I.c = d.src(d.op(3), U32);
    I.fn = TI(h_bfe, t);
    return true;
  }
  if (op == "bfi") {
    Ty t = d.need_type();
    d.done();
    bin(t);
    I.c = d.src(d.op(3), U32);
    I.e = d.src(d.op(4), U32);
    I.fn = ty_size(t) == 8 ? h_bfi<u64> : h_bfi<u32>;
    return true;
  }
  if (op == "sad") {
    Ty t = d.need_type();
    d.done();
    I.t0 = t;
    if (ty_size(t) != 4) d.bad("sad type");
    bin(t);
    I.c = d.src(d.op(3), t);
    I.fn = h_sad;
    return true;
  }
  if (op == "dp4a" || op == "dp2a") {
    I.op = 0;
    if (op == "dp2a") I.op = d.take("hi") ? 2 : (d.take("lo"), 1);
    I.t0 = d.need_type();
    I.t1 = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), B32);
    I.b = d.src(d.op(2), B32);
    I.c = d.src(d.op(3), B32);
    I.fn = h_dp4a;
    return true;
  }
  if (op == "lop3") {
    if (d.take("and") || d.take("or")) d.bad("lop3 with predicate");
    d.need_type();
    d.done();
    bin(B32);
    I.c = d.src(d.op(3), B32);
    I.imm = d.immval(d.op(4));
    I.fn = h_lop3;
    return true;
  }
  if (op == "prmt") {
    d.need_type();
    static const char* md[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (int k = 0; k < 6; k++)
      if (d.take(md[k])) I.op = k + 1;
    d.done();
    bin(B32);
    I.c = d.src(d.op(3), B32);
    I.fn = h_prmt;
    return true;
  }
  if (op == "fns") {
    d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), B32);
    I.b = d.src(d.op(2), B32);
    I.c = d.src(d.op(3), S32);
    I.fn = h_fns;
    return true;
  }
  {
    static const char* V[] = {"vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax", "vset"};
    int vo = -1, vn = 0;
    for (int k = 0; k < 7; k++)
      for (int n : {2, 4})
        if (op == V[k] + std::to_string(n)) {
          vo = k;
          vn = n;
        }
    if (vo >= 0) {
      I.op = vo;
      I.vec = vn;
      I.flag = d.take("add");
      I.sat = d.take("sat");
      if (vo == 6) {
        static const char* C[] = {"eq", "ne", "lt", "le", "gt", "ge"};
        int c = -1;
        for (int k = 0; k < 6; k++)
          if (d.take(C[k])) c = k;
        if (c < 0) d.bad("vset");
        I.op2 = c;
        I.t0 = U32;
      } else
        I.t0 = d.need_type();
      I.t1 = d.need_type();
      I.t2 = d.need_type();
      d.done();
      nops(4);
      I.d = d.dst(d.op(0), 4);
      I.a = d.src(d.op(1), B32);
      I.b = d.src(d.op(2), B32);
      I.c = d.src(d.op(3), B32);
      I.fn = h_video;
      return true;
    }
  }
  if (op == "szext") {
    I.flag = d.take("wrap");
    d.take("clamp");
    I.t0 = d.need_type();
    d.done();
    bin(I.t0);
    I.fn = h_szext;
    return true;
  }
  if (op == "bmsk") {
    I.flag = d.take("wrap");
    d.take("clamp");
    d.need_type();
    d.done();
    bin(B32);
    I.fn = h_bmsk;
    return true;
  }
  if (op == "copysign") {
    Ty t = d.need_type();
    d.done();
    bin(t);
    I.cls = C_FP32;
    I.fn = t == F32 ? h_copysign32 : h_copysign64;
    return true;
  }
  if (op == "testp") {
    static const char* md[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    int o = -1;
    for (int k = 0; k < 6; k++)
      if (d.take(md[k])) o = k;
    if (o < 0) d.bad("testp");
    I.op = o;
    I.t0 = d.need_type();
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), I.t0);
    I.fn = h_testp;
    return true;
  }
  if (op == "ex2" || op == "lg2" || op == "rcp" || op == "sqrt" || op == "rsqrt" || op == "sin" ||
      op == "cos" || op == "tanh") {
    static const char* nm[] = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"};
    for (int k = 0; k < 8; k++)
      if (op == nm[k]) I.op = k;
    bool ap = d.take("approx");
    I.rnd = d.rounding();
    I.ftz = d.take("ftz");
    Ty t = d.need_type();
    I.t0 = t;
    (void)ap;
    if (is_half(t)) {
      int o = op == "ex2" ? HO_EX2 : op == "tanh" ? HO_TANH : -1;
      if (o < 0) d.bad("half unary");
      halfop(t, o, 1);
      I.cls = C_MUFU;
      return true;
    }
    I.d = d.dst(d.op(0), ty_size(t));
    I.a = d.src(d.op(1), t);
    nops(2);
    d.done();
    I.cls = C_MUFU;
    I.fn = t == F32 ? h_funary<float> : t == F64 ? h_funary<double> : nullptr;
    return true;
  }
  if (op == "setp" || op == "set") {
    static const struct {
      const char* n;
      int o;
    } C[] = {{"eq", CO_EQ},   {"ne", CO_NE},   {"lt", CO_LT},   {"le", CO_LE},   {"gt", CO_GT},
             {"ge", CO_GE},   {"lo", CO_LT},   {"ls", CO_LE},   {"hi", CO_GT},   {"hs", CO_GE},
             {"equ", CO_EQU}, {"neu", CO_NEU}, {"ltu", CO_LTU}, {"leu", CO_LEU}, {"gtu", CO_GTU},
             {"geu", CO_GEU}, {"num", CO_NUM}, {"nan", CO_NAN}};
    int o = -1;
    for (auto& c : C)
      if (d.take(c.n)) {
        o = c.o;
        break;
      }
    if (o < 0) d.bad("comparison");
    I.op = o;
    I.op2 = d.take("and") ? 1 : d.take("or") ? 2 : d.take("xor") ? 3 : 0;
    I.ftz = d.take("ftz");
    if (op == "set") I.t1 = d.need_type();
    Ty t = d.need_type();
    I.t0 = t;
    d.done();
    if (!ty_float(t) && o > CO_GE) d.bad("float comparison on integers");
    I.cls = ty_float(t) ? (is_half(t) ? C_FP16 : t == F64 ? C_FP64 : C_FP32) : C_INT;
    size_t k = 0;
    if (op == "setp") {
      if (d.op(0).kind != Operand::Sink)
        I.d = d.dst(d.op(0), 4);
      else
        I.d = d.konst(16, 0xdead, 0, -2);
      k = 1;
      if (d.P.pipe == 0) {
        I.e = d.dst(d.op(1), 4);
        k = 2;
      }
      I.fn = h_setp;
    } else {
      I.d = d.dst(d.op(0), ty_size(I.t1));
      k = 1;
      I.fn = h_set;
    }
    I.a = d.src(d.op(k), t);
    I.b = d.src(d.op(k + 1), t);
    if (I.op2) I.c = d.pred(d.op(k + 2), &I.neg);
    nops(k + 2 + (I.op2 ? 1 : 0));
    return true;
  }
  if (op == "selp") {
    Ty t = d.need_type();
    d.done();
    I.cls = C_INT;
    if (t == PRED) d.bad("selp.pred");
    bin(t);
    I.c = d.pred(d.op(3), &I.neg);
    I.fn = TU(h_selp, t);
    return true;
  }
  if (op == "slct") {
    I.ftz = d.take("ftz");
    Ty t = d.need_type();
    I.t1 = d.need_type();
    d.done();
    bin(t);
    I.c = d.src(d.op(3), I.t1);
    I.fn = TU(h_slct, t);
    return true;
  }
  if (op == "mov") {
    Ty t = d.need_type();
    d.done();
    nops(2);
    I.cls = C_MOV;
    const Operand &o0 = d.op(0), &o1 = d.op(1);
    if (t == PRED) {
      I.d = d.dst(o0, 4);
      I.a = d.pred(o1, &I.neg);
      I.op = 4;
      I.fn = h_plogic;
      return true;
    }
    int sz = ty_size(t);
    if (o0.kind == Operand::Vec) {
      I.sz = sz / o0.el.size();
      Ty et = I.sz == 8 ? B64 : I.sz == 4 ? B32 : I.sz == 2 ? B16 : B8;
      (void)et;
      for (auto& e : o0.el) I.x.push_back(e.kind == Operand::Sink ? NOREG : d.dst(e, I.sz));
      I.a = d.src(o1, t);
      I.fn = h_unpack;
      return true;
    }
    if (o1.kind == Operand::Vec) {
      I.sz = sz / o1.el.size();
      Ty et = I.sz == 8 ? B64 : I.sz == 4 ? B32 : I.sz == 2 ? B16 : B8;
      for (auto& e : o1.el) I.x.push_back(d.src(e, et));
      I.d = d.dst(o0, sz);
      I.fn = h_pack;
      return true;
    }
    I.d = d.dst(o0, sz);
    if (o1.kind == Operand::Label &&
        (o1.name == "%clock" || o1.name == "%clock_hi" || o1.name == "%clock64" ||
         o1.name == "%globaltimer" || o1.name == "%globaltimer_lo")) {
      I.sz = sz;
      I.fn = h_clock;
      return true;
    }
    I.a = d.src(o1, t);
    I.fn = sz == 1    ? h_mov<u8>
           : sz == 2  ? h_mov<u16>
           : sz == 4  ? h_mov<u32>
           : sz == 8  ? h_mov<u64>
           : sz == 16 ? h_mov<u128>
                      : nullptr;
    return true;
  }
  return false;
}
}  // namespace vsim
