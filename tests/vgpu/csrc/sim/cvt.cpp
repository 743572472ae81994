// cvt in all supported forms, cvta.
#include "fp.h"
namespace vsim {
static inline i64 load_int(Warp& w, i32 off, int rs, Ty t, int lane) {
  u64 v = 0;
  const u8* p = w.R + off + lane * rs;
  memcpy(&v, p, rs);
  switch (ty_size(t)) {
    case 1:
      return ty_signed(t) ? (i64)(i8)v : (i64)(u8)v;
    case 2:
      return ty_signed(t) ? (i64)(i16)v : (i64)(u16)v;
    case 4:
      return ty_signed(t) ? (i64)(i32)v : (i64)(u32)v;
    default:
      return (i64)v;
  }
}
static inline void store_int(Warp& w, i32 off, int rs, i64 v, int lane) {
  memcpy(w.R + off + lane * rs, &v, rs);
}
static inline double load_flt(Warp& w, i32 off, Ty t, int lane, bool ftz) {
  switch (t) {
    case F32: {
      float f = w.r<float>(off)[lane];
      return ftz ? ftzf(f) : f;
    }
    case F64:
      return w.r<double>(off)[lane];
    case F16:
      return h2f1(w.r<u16>(off)[lane]);
    case BF16:
      return bf2f1(w.r<u16>(off)[lane]);
    default:
      fail(Fault::Unsupported, "cvt source");
  }
}
static double round_int(double x, int r) {
  switch (r) {
    case R_RNI:
      return std::nearbyint(x);
    case R_RZI:
      return std::trunc(x);
    case R_RMI:
      return std::floor(x);
    case R_RPI:
      return std::ceil(x);
    default:
      return x;
  }
}
static i64 wrap_int(i64 v, Ty t) {
  switch (t) {
    case U8:
    case B8:
      return (u8)v;
    case S8:
      return (i8)v;
    case U16:
    case B16:
      return (u16)v;
    case S16:
      return (i16)v;
    case U32:
    case B32:
      return (u32)v;
    case S32:
      return (i32)v;
    default:
      return v;
  }
}
static void irange(Ty t, double& lo, double& hi) {
  int b = 8 * ty_size(t);
  if (ty_signed(t)) {
    lo = -std::ldexp(1.0, b - 1);
    hi = std::ldexp(1.0, b - 1);
  } else {
    lo = 0;
    hi = std::ldexp(1.0, b);
  }
}
static void store_flt(Warp& w, const Inst& I, int lane,
                      double x) {  // x exact; rounds once to the destination
  bool rz = I.rnd == R_RZ || I.rnd == R_RZI;
  if (I.sat) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
  if (I.flag) x = x != x ? x : std::max(x, 0.0);  // relu
  switch (I.t0) {
    case F32: {
      float f;
      if (I.rnd == R_RM || I.rnd == R_RP || I.rnd == R_RZ) {
        volatile double v = x;
        fesetround(fe_mode(I.rnd));
        volatile float o = (float)v;
        fesetround(FE_TONEAREST);
        f = o;
      } else
        f = (float)x;
      if (I.ftz) f = ftzf(f);
      w.r<float>(I.d)[lane] = f != f ? u2f(0x7fffffff) : f;
      break;
    }
    case F64:
      w.r<double>(I.d)[lane] = x;
      break;
    case F16: {
      u16 h;
      if (x != x)
        h = 0x7fff;
      else {
        double y = round_to(x, 11, -14, rz);
        if (rz && !std::isinf(x) && std::fabs(y) > 65504) y = std::copysign(65504.0, y);
        h = f2h1((float)(std::fabs(y) > 1e30 ? std::copysign(INFINITY, y) : y));
      }
      if (I.flag2 && (h & 0x7fff) == 0x7c00) h = (h & 0x8000) | 0x7bff;
      w.r<u16>(I.d)[lane] = h;
      break;
    }
    case BF16: {
      u16 h;
      if (x != x)
        h = 0x7fff;
      else {
        double y = round_to(x, 8, -126, rz);
        if (rz && !std::isinf(x) && std::fabs(y) > 3.3895313892515355e38)
          y = std::copysign(3.3895313892515355e38, y);
        h = f2bf1((float)y);
      }
      if (I.flag2 && (h & 0x7fff) == 0x7f80) h = (h & 0x8000) | 0x7f7f;
      w.r<u16>(I.d)[lane] = h;
      break;
    }
    default:
      fail(Fault::Unsupported, "cvt destination");
  }
}
static void c_int_int(Exec&, Warp& w, const Inst& I, u32 m) {
  i64 t[32];
  switch (I.t1) {
    case U32:
    case B32:
      if (I.as == 4) {
        const u32* a = w.r<u32>(I.a);
        for (int i = 0; i < 32; i++) t[i] = a[i];
        break;
      }
      goto gen;
    case S32:
      if (I.as == 4) {
        const i32* a = w.r<i32>(I.a);
        for (int i = 0; i < 32; i++) t[i] = a[i];
        break;
      }
      goto gen;
    case U64:
    case S64:
    case B64:
      memcpy(t, w.R + I.a, 256);
      break;
    case U16:
    case B16:
      if (I.as == 2) {
        const u16* a = w.r<u16>(I.a);
        for (int i = 0; i < 32; i++) t[i] = a[i];
        break;
      }
      goto gen;
    default:
    gen:
      for (int i = 0; i < 32; i++) t[i] = load_int(w, I.a, I.as, I.t1, i);
  }
  if (I.sat)
    for (int i = 0; i < 32; i++) {
      bool us = I.t1 == U64;
      u64 uv = t[i];
      int b = 8 * ty_size(I.t0);
      if (ty_signed(I.t0)) {
        i64 hi = b == 64 ? INT64_MAX : (1ll << (b - 1)) - 1, lo = -hi - 1;
        if (us)
          t[i] = uv > (u64)hi ? hi : uv;
        else
          t[i] = t[i] > hi ? hi : t[i] < lo ? lo : t[i];
      } else {
        u64 hi = b == 64 ? ~0ull : (1ull << b) - 1;
        if (!us && t[i] < 0)
          t[i] = 0;
        else
          t[i] = uv > hi ? hi : uv;
      }
    }
  switch (ty_size(I.t0)) {
    case 1:
      for (int i = 0; i < 32; i++) t[i] = ty_signed(I.t0) ? (i64)(i8)t[i] : (i64)(u8)t[i];
      break;
    case 2:
      for (int i = 0; i < 32; i++) t[i] = ty_signed(I.t0) ? (i64)(i16)t[i] : (i64)(u16)t[i];
      break;
    case 4:
      if (I.ds == 8)
        for (int i = 0; i < 32; i++) t[i] = ty_signed(I.t0) ? (i64)(i32)t[i] : (i64)(u32)t[i];
      break;
  }
  switch (I.ds) {
    case 8: {
      i64* d = w.r<i64>(I.d);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
      break;
    }
    case 4: {
      u32* d = w.r<u32>(I.d);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? (u32)t[i] : d[i];
      break;
    }
    case 2: {
      u16* d = w.r<u16>(I.d);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? (u16)t[i] : d[i];
      break;
    }
    default:
      LANES(m) store_int(w, I.d, I.ds, t[lane], lane);
  }
}
static void c_int_flt(Exec&, Warp& w, const Inst& I, u32 m) {
  if (I.t0 == F32 && I.t1 == S32 && I.as == 4 && I.rnd == R_RN) {
    float* d = w.r<float>(I.d);
    const i32* a = w.r<i32>(I.a);
    for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? (float)a[i] : d[i];
    return;
  }
  LANES(m) {
    i64 v = load_int(w, I.a, I.as, I.t1, lane);
    if (I.t0 == F32) {
      float f;
      if (I.rnd == R_RN || I.rnd == R_NONE)
        f = I.t1 == U64 ? (float)(u64)v : (float)v;
      else {
        volatile i64 vv = v;
        fesetround(fe_mode(I.rnd));
        volatile float o = I.t1 == U64 ? (float)(u64)vv : (float)vv;
        fesetround(FE_TONEAREST);
        f = o;
      }
      if (I.sat) f = f < 0 ? 0 : f > 1 ? 1 : f;
      w.r<float>(I.d)[lane] = f;
    } else if (I.t0 == F64) {
      if (I.rnd == R_RN || I.rnd == R_NONE)
        w.r<double>(I.d)[lane] = I.t1 == U64 ? (double)(u64)v : (double)v;
      else {
        volatile i64 vv = v;
        fesetround(fe_mode(I.rnd));
        volatile double o = I.t1 == U64 ? (double)(u64)vv : (double)vv;
        fesetround(FE_TONEAREST);
        w.r<double>(I.d)[lane] = o;
      }
    } else
      store_flt(w, I, lane, I.t1 == U64 ? (double)(u64)v : (double)v);
  }
}
static void c_flt_int(Exec&, Warp& w, const Inst& I, u32 m) {
  double lo, hi;
  irange(I.t0, lo, hi);
  LANES(m) {
    double x = load_flt(w, I.a, I.t1, lane, I.ftz);
    i64 v;
    if (x != x)
      v = ty_size(I.t0) == 8 ? (i64)0x8000000000000000ull : 0;
    else {
      x = round_int(x, I.rnd);
      if (x >= hi)
        v = ty_signed(I.t0) ? (ty_size(I.t0) == 8 ? INT64_MAX : (i64)(hi - 1))
                            : (ty_size(I.t0) == 8 ? (i64)~0ull : (i64)(hi - 1));
      else if (x < lo)
        v = (i64)lo;
      else
        v = I.t0 == U64 ? (i64)(u64)x : (i64)x;
    }
    store_int(w, I.d, I.ds, wrap_int(v, I.t0), lane);
  }
}
static void c_flt_flt(Exec&, Warp& w, const Inst& I, u32 m) {
  if (!I.ftz && !I.sat && !I.flag && !I.flag2 && (I.rnd <= R_RN)) {
    if (I.t0 == F32 && I.t1 == F16) {
      float t[32];
      h2f(w.r<u16>(I.a), t, 32);
      float* d = w.r<float>(I.d);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
      return;
    }
    if (I.t0 == F32 && I.t1 == BF16) {
      float* d = w.r<float>(I.d);
      const u16* a = w.r<u16>(I.a);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? bf2f1(a[i]) : d[i];
      return;
    }
    if (I.t0 == BF16 && I.t1 == F32) {
      u16* d = w.r<u16>(I.d);
      const float* a = w.r<float>(I.a);
      for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? f2bf1(a[i]) : d[i];
      return;
    }
    if (I.t0 == F16 && I.t1 == F32) {
      u16* d = w.r<u16>(I.d);
      const float* a = w.r<float>(I.a);
      LANES(m) d[lane] = f2h1(a[lane]);
      return;
    }
  }
  LANES(m) {
    double x = load_flt(w, I.a, I.t1, lane, I.ftz);
    x = round_int(x, I.rnd);
    store_flt(w, I, lane, x);
  }
}
static void c_tf32(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const float* a = w.r<float>(I.a);
  LANES(m) {
    u32 b = f2u(a[lane]);
    if ((b & 0x7fffffff) > 0x7f800000) {
      d[lane] = 0x7fffffff;
      continue;
    }
    if ((b & 0x7fffffff) != 0x7f800000) {
      if (I.rnd == R_RNA)
        b += 0x1000;
      else if (I.rnd == R_RN)
        b += 0xfff + ((b >> 13) & 1);
      b &= 0xffffe000u;
    }
    if (I.flag && (b >> 31)) b = 0;
    d[lane] = b;
  }
}
static inline u16 to_half(const Inst& I, float f, bool bf) {
  if (I.flag) f = f != f ? f : std::max(f, 0.0f);
  u16 h = bf ? (I.rnd == R_RZ ? f2bf1_rz(f) : f2bf1(f)) : (I.rnd == R_RZ ? f2h1_rz(f) : f2h1(f));
  if (I.flag2) {
    if (bf && (h & 0x7fff) == 0x7f80) h -= 1;
    if (!bf && (h & 0x7fff) == 0x7c00) h -= 1;
  }
  return h;
}
static void c_x2_f32(Exec&, Warp& w, const Inst& I, u32 m) {
  u32* d = w.r<u32>(I.d);
  const float *a = w.r<float>(I.a), *b = w.r<float>(I.b);
  u32 t[32];
  if (I.t0 == BF16X2 && I.rnd == R_RN && !I.flag && !I.flag2)
    for (int i = 0; i < 32; i++) t[i] = (u32)f2bf1(a[i]) << 16 | f2bf1(b[i]);
  else {
    bool bf = I.t0 == BF16X2;
    for (int i = 0; i < 32; i++) t[i] = (u32)to_half(I, a[i], bf) << 16 | to_half(I, b[i], bf);
  }
  for (int i = 0; i < 32; i++) d[i] = (m >> i & 1) ? t[i] : d[i];
}
static void c_fp8(Exec&, Warp& w, const Inst& I, u32 m) {
  auto enc = [&](float f, Ty t) -> u16 {
    if (I.flag) f = f != f ? f : std::max(f, 0.0f);
    return t == E4M3X2 ? f_to_e4m3(f) : f_to_e5m2(f);
  };
  LANES(m) switch (I.op) {
    case 0:
      w.r<u16>(I.d)[lane] =
          enc(w.r<float>(I.a)[lane], I.t0) << 8 | enc(w.r<float>(I.b)[lane], I.t0);
      break;
    case 1: {
      u32 v = w.r<u32>(I.a)[lane];
      w.r<u16>(I.d)[lane] = enc(h2f1(v >> 16), I.t0) << 8 | enc(h2f1((u16)v), I.t0);
      break;
    }
    default: {
      u16 v = w.r<u16>(I.a)[lane];
      float lo = I.t1 == E4M3X2 ? e4m3_to_f(v) : e5m2_to_f(v),
            hi = I.t1 == E4M3X2 ? e4m3_to_f(v >> 8) : e5m2_to_f(v >> 8);
      if (I.flag) {
        lo = std::max(lo, 0.f);
        hi = std::max(hi, 0.f);
      }
      w.r<u32>(I.d)[lane] = (u32)f2h1(hi) << 16 | f2h1(lo);
    }
  }
}
static void c_pack(Exec&, Warp& w, const Inst& I, u32 m) {
  LANES(m) {
    auto s = [&](i32 v) -> u32 {
      i64 lo, hi;
      int b = 8 * ty_size(I.t0);
      if (ty_signed(I.t0)) {
        hi = (1ll << (b - 1)) - 1;
        lo = -hi - 1;
      } else {
        lo = 0;
        hi = (1ll << b) - 1;
      }
      i64 x = v;
      x = x < lo ? lo : x > hi ? hi : x;
      return (u32)x & (u32)((1ull << b) - 1);
    };
    u32 a = s(w.r<i32>(I.a)[lane]), b = s(w.r<i32>(I.b)[lane]);
    if (ty_size(I.t0) == 2)
      w.r<u32>(I.d)[lane] = a << 16 | b;
    else
      w.r<u32>(I.d)[lane] = (w.r<u32>(I.c)[lane] << 16) | a << 8 | b;
  }
}
static void h_cvta(Exec&, Warp& w, const Inst& I, u32 m) {
  i64 k = I.imm;
  if (I.ds == 8) {
    lanes1<u64, u64>(w, I, m, [k](u64 a) -> u64 { return a + k; });
  } else
    lanes1<u32, u32>(w, I, m, [](u32 a) { return a; });
}
bool decode_cvt(Dec& d) {
  const std::string& op = d.P.mods[0];
  Inst& I = d.I;
  if (op == "cvta") {
    bool to = d.take("to");
    I.cls = C_INT;
    i64 base = 0;
    if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster"))
      base = SHARED_BASE;
    else if (d.take("local"))
      base = LOCAL_BASE;
    else if (d.take("global") || d.take("const") || d.take("param"))
      base = 0;
    else
      d.bad("cvta space");
    Ty t = d.need_type();
    d.done();
    I.ds = ty_size(t);
    if (I.ds != 8 && base) d.bad("32-bit cvta");
    I.d = d.dst(d.op(0), I.ds);
    I.a = d.src(d.op(1), t);
    I.imm = to ? -base : base;
    I.fn = h_cvta;
    return true;
  }
  if (op != "cvt") return false;
  I.cls = C_CVT;
  I.kind = K_ALU;
  bool pack = d.take("pack");
  I.rnd = d.rounding();
  I.flag2 = d.take("satfinite");
  I.flag = d.take("relu");
  I.ftz = d.take("ftz");
  I.sat = d.take("sat");
  Ty t = d.need_type(), s = d.need_type();
  I.t0 = t;
  I.t1 = s;
  if (pack) {
    Ty r = d.take_type();
    (void)r;
    d.done();
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), S32);
    I.b = d.src(d.op(2), S32);
    if (ty_size(t) == 1) {
      I.c = d.src(d.op(3), B32);
    } else if (ty_size(t) != 2)
      d.bad("cvt.pack");
    I.fn = c_pack;
    return true;
  }
  d.done();
  if (t == F16X2 || t == BF16X2) {
    if (s == F32) {
      if (d.n() != 3 || (I.rnd != R_RN && I.rnd != R_RZ)) d.bad("cvt x2");
      I.d = d.dst(d.op(0), 4);
      I.a = d.src(d.op(1), F32);
      I.b = d.src(d.op(2), F32);
      I.fn = c_x2_f32;
      return true;
    }
    if (t == F16X2 && (s == E4M3X2 || s == E5M2X2)) {
      I.d = d.dst(d.op(0), 4);
      I.a = d.src(d.op(1), B16);
      I.op = 2;
      I.fn = c_fp8;
      return true;
    }
    d.bad("cvt x2 source");
  }
  if (t == E4M3X2 || t == E5M2X2) {
    if (!I.flag2 || I.rnd != R_RN) d.bad("fp8 cvt needs .rn.satfinite");
    I.d = d.dst(d.op(0), 2);
    if (s == F32) {
      I.a = d.src(d.op(1), F32);
      I.b = d.src(d.op(2), F32);
      I.op = 0;
    } else if (s == F16X2) {
      I.a = d.src(d.op(1), B32);
      I.op = 1;
    } else
      d.bad("fp8 source");
    I.fn = c_fp8;
    return true;
  }
  if (d.n() != 2) d.bad("cvt operands");
  if (t == TF32) {
    if (s != F32) d.bad("tf32");
    if (I.rnd != R_RNA && I.rnd != R_RN && I.rnd != R_RZ) d.bad("tf32 rounding");
    I.d = d.dst(d.op(0), 4);
    I.a = d.src(d.op(1), F32);
    I.fn = c_tf32;
    return true;
  }
  bool fd = ty_float(t), fs = ty_float(s);
  if (d.op(0).kind != Operand::Reg) d.bad("cvt destination");
  int ds = d.regsize(d.op(0)), as;
  if (ds < ty_size(t) || (fd && ds != ty_size(t))) d.bad("cvt destination size");
  I.d = d.dst(d.op(0), ds);
  I.ds = ds;
  I.a = d.src(d.op(1), s, &as, true);
  I.as = as;
  if (fs && as != ty_size(s)) d.bad("cvt source size");
  if (I.flag2 && !(t == F16 || t == BF16)) d.bad("satfinite");
  if (!fd && !fs) {
    if (I.rnd || I.ftz) d.bad("cvt modifiers");
    I.fn = c_int_int;
  } else if (fd && !fs) {
    I.fn = c_int_flt;
    if (I.rnd > R_RP) d.bad("rounding");
  } else if (!fd && fs) {
    if (I.rnd < R_RNI) d.bad("float to integer needs integer rounding");
    I.fn = c_flt_int;
  } else
    I.fn = c_flt_flt;
  return true;
}
}  // namespace vsim
