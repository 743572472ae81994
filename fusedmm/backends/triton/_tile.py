"""Tile primitives of the Triton kernels: masked loads, the score tile, softmax pieces, dropout.

Every jit function works on one tile and knows no op. Accumulation is fp32; fp32 inputs are
multiplied with input_precision="ieee". Tensors arrive as `Rows` (see _args.py).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST_SCORE = tl.constexpr(-float(2**27))  # kLeastScore of csrc/common/params.h
FUSED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter's tl.fma refuses tensors


@triton.jit
def head(t, bh, H):
    """Pointer to the [L, width] matrix of head bh = b * H + h."""
    return t.ptr + tl.cast(bh // H, tl.int64) * t.b + tl.cast(bh % H, tl.int64) * t.h


@triton.jit
def load_tile(ptr, t, offs_m, keep_m, EVEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows offs_m of the matrix at ptr, [BLOCK_M, BLOCK]; rows not kept and columns past WIDTH are
    0, also where memory holds NaN. EVEN says that every row is kept."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = ptr + offs_m[:, None].to(tl.int64) * t.m + offs_d[None, :].to(tl.int64) * t.d
    if WIDTH == BLOCK:
        if EVEN:
            return tl.load(ptrs)
        return tl.load(ptrs, mask=keep_m[:, None], other=0.0)
    return tl.load(ptrs, mask=keep_m[:, None] & (offs_d < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, t, offs_m, M, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows offs_m < M and the columns below WIDTH."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = ptr + offs_m[:, None].to(tl.int64) * t.m + offs_d[None, :].to(tl.int64) * t.d
    inside = (offs_m < M)[:, None] & (offs_d < WIDTH)[None, :]
    tl.store(ptrs, value.to(t.ptr.dtype.element_ty), mask=inside)


@triton.jit
def kept(keep, b, offs, L):
    """offs < L and, with a mask, kept by it: [BLOCK] bool."""
    inside = offs < L
    if keep.HAS:
        ptrs = keep.ptr + tl.cast(b, tl.int64) * keep.b + offs.to(tl.int64) * keep.m
        inside = inside & (tl.load(ptrs, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_row(ptr, bh, offs, L):
    """Entries offs of row bh of a contiguous [B * H, L] array, 0 outside."""
    return tl.load(ptr + tl.cast(bh, tl.int64) * L + offs, mask=offs < L, other=0.0)


@triton.jit
def store_row(ptr, bh, offs, L, value):
    """Writes the entries offs < L of row bh of a contiguous [B * H, L] array."""
    tl.store(ptr + tl.cast(bh, tl.int64) * L + offs, value, mask=offs < L)


@triton.jit
def dot_tile(a, b):
    """a @ b in fp32; a is rounded to b's type, as the tensor core wants it."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def dot_scores(a, b):
    """a @ b.T of whole rows. fp32: sums of 128 products at most, added, for roundings add up; which
    128 of 256 they are is left to what costs no exchange, every other one."""
    WIDTH: tl.constexpr = a.shape[1]
    if a.dtype == tl.float32 and WIDTH > 128:
        a0, a1 = tl.split(tl.reshape(a, (a.shape[0], WIDTH // 2, 2)))
        b0, b1 = tl.split(tl.reshape(b, (b.shape[0], WIDTH // 2, 2)))
        # A product that is added would become one sum with what it is added to.
        return dot_tile(a0, tl.trans(b0)) - dot_tile(-a1, tl.trans(b1))
    return dot_tile(a, tl.trans(b))


@triton.jit
def s_tile(a, b, score, bias, bh, H, offs_m, offs_n, M, N):
    """Raw scores [BLOCK_M, BLOCK_N], and where the clamp passes gradient. Raw is
    s = clamp(scale * a @ b.T) + bias, but for a scale that `unit_of` has; times that, s in base 2.

    Entries outside [M, N] are what the zero rows of a and b give: the caller masks them.
    """
    s = dot_scores(a, b)
    passes = s == s
    if not score.PLAIN:
        s = s * score.scale
    if score.CLAMPED:
        passes = (s >= -score.clamp) & (s <= score.clamp)
        s = tl.where(s > score.clamp, score.clamp, tl.where(s < -score.clamp, -score.clamp, s))
    if bias.HAS:
        ptrs = head(bias, bh, H) + offs_m[:, None].to(tl.int64) * bias.m
        ptrs += offs_n[None, :].to(tl.int64) * bias.d
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        s += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        s = tl.where((s < LEAST_SCORE) & (s > -float("inf")), LEAST_SCORE, s)
    return s, passes


@triton.jit
def unit_of(score):
    """What turns raw scores into exponents of 2: one fused multiply-add per entry."""
    return score.scale * LOG2E if score.PLAIN else LOG2E


@triton.jit
def finite_or(x, other):
    """x, with -inf replaced: the only guard of (-inf) - (-inf)."""
    return tl.where(x == float("-inf"), other, x)


@triton.jit
def beyond(s, unit, ref):
    """s * unit - ref, the product not rounded: ref is a rounded one, and what they differ by is
    part of what goes with ref. The compiler fuses only what stands in one block."""
    if FUSED:
        return tl.fma(s, unit + tl.zeros_like(s), tl.broadcast_to(-ref, s.shape))
    return s * unit - ref


@triton.jit
def exp_from(s, unit, ref):
    """2^(s * unit - ref)."""
    return tl.exp2(beyond(s, unit, ref))


@triton.jit
def lse_of(total, top):
    """log(total * 2^top) in fp64, -inf for an empty sum: at scores of 1e4 an fp32 lse is off by
    5e-4, and so would p be."""
    lse = (top.to(tl.float64) + tl.log2(total).to(tl.float64)) * LN2
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def base2(lse, centre):
    """(ref, fix): lse in base 2 is ref - fix, ref rounded to fp32; the centre for -inf."""
    lse = lse / LN2
    ref = finite_or(lse.to(tl.float32), centre)
    return ref, tl.where(lse == float("-inf"), 0.0, (ref.to(tl.float64) - lse).to(tl.float32))


@triton.jit
def p_from_lse(s, unit, ref, fix):
    """exp(s - lse[:, None]) of raw scores, lse as of base2."""
    return tl.exp2(beyond(s, unit, ref[:, None]) + fix[:, None])


@triton.jit
def dropped(p, drop, seed, DIRECTION: tl.constexpr, FLIP: tl.constexpr, bh, m0, n0):
    """Tile p at row m0 and column n0 with dropped entries 0 and kept ones times 1 / (1 - p).

    Word n % 4 of Philox counter (n // 4, m, b * H + h, direction) decides entry [m, n]; with FLIP
    the tile holds entry [n, m]. m0 and n0 are multiples of 4.
    """
    if FLIP:
        keep = tl.trans(_keep(drop, seed, DIRECTION, bh, n0, m0, p.shape[1], p.shape[0]))
    else:
        keep = _keep(drop, seed, DIRECTION, bh, m0, n0, p.shape[0], p.shape[1])
    return tl.where(keep, p * drop.inverse, 0.0)


@triton.jit
def _keep(
    drop, seed, DIRECTION: tl.constexpr, bh, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Dropout's decision at rows m0.. and columns n0..: one Philox call draws four columns."""
    FOURS: tl.constexpr = BLOCK_N // 4
    m = tl.broadcast_to((m0 + tl.arange(0, BLOCK_M))[:, None], (BLOCK_M, FOURS)).to(tl.int32)
    n4 = tl.broadcast_to((n0 // 4 + tl.arange(0, FOURS))[None, :], (BLOCK_M, FOURS)).to(tl.int32)
    zero = tl.zeros((BLOCK_M, FOURS), tl.int32)
    r0, r1, r2, r3 = tl.philox(seed.to(tl.int64), n4, m, zero + bh, zero + DIRECTION)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK_M, BLOCK_N))
    return words.to(tl.uint32, bitcast=True) >= drop.threshold.to(tl.uint32)


@triton.jit
def split_lse(ref, fix, centre):
    """Half way c from the centre to lse, in base 2, with the factors of p_near:
    (c, c - centre, 2^(c - centre), 2^(c - lse))."""
    c = 0.5 * (ref + centre)
    return c, c - centre, tl.exp2(c - centre), tl.exp2(c - ref + fix)


@triton.jit
def near(a, b):
    """Whether p_near is safe for rows and columns with the split_lse a and b: its factors stay in
    range while every lse lies within 60 of the centre."""
    _, half_a, _, _ = a
    _, half_b, _, _ = b
    return tl.maximum(tl.max(tl.abs(half_a), 0), tl.max(tl.abs(half_b), 0)) <= 43.0


@triton.jit
def p_near(s, unit, a, b):
    """p_row = exp(s - lse_a) by rows and p_col = exp(s - lse_b) by columns from one exp of raw
    scores; a and b are split_lse of rows and columns, never -inf.

        e = exp(s - c_a - (c_b - centre))
        p_row = e * exp(c_a - lse_a) * exp(c_b - centre)
        p_col = e * exp(c_a - centre) * exp(c_b - lse_b)
    """
    c_a, _, up_a, down_a = a
    _, half_b, up_b, down_b = b
    e = tl.exp2(beyond(s, unit, c_a[:, None]) - half_b[None, :])
    return e * down_a[:, None] * up_b[None, :], e * up_a[:, None] * down_b[None, :]


@triton.jit
def e_both(s, s_row, s_col, unit, keep_m, MASKED: tl.constexpr):
    """One exp of raw scores for both maxima of a tile: e, u, r, top, col_max, near.

        u[i] = max_j s_row * unit;  e = exp2(s * unit - u);  top = max of u over rows kept as keys
        exp2(s * unit - top) = e * r, r = exp2(u - top)

    All in base 2 and rounded once, so that u cancels exactly however large s is. s_row and s_col
    are s with -inf at keys that are masked in that direction; MASKED says that columns may be, so
    that s * unit - u may exceed 0. `near` says that e * r keeps the bits of every column: top is
    within 24 of the column's own maximum (an exponent of 80 is off by 4e-6), and no e overflows.
    """
    u = finite_or(tl.max(s_row, 1) * unit, 0.0)
    e = exp_from(s, unit, u[:, None])
    top = tl.max(tl.where(keep_m, u, float("-inf")), 0)
    r = tl.where(keep_m, tl.exp2(u - top), 0.0)
    col_max = tl.max(s_col, 0) * unit
    gap = tl.max(tl.where(col_max == float("-inf"), 0.0, top - col_max), 0)
    if MASKED:
        gap = tl.maximum(gap, tl.max(tl.max(s_col * unit - u[:, None], 1), 0))
    return e, u, r, top, col_max, gap <= 24.0


@triton.jit
def p_col_of(e, s_col, unit, r, top, col_max, near, ref):
    """exp2(s_col * unit - ref[None, :]) from e where near, by a second exp elsewhere;
    ref >= col_max."""
    safe = finite_or(ref, 0.0)
    if near:
        factor = tl.where(col_max == float("-inf"), 0.0, tl.exp2(top - safe))
        p = e * r[:, None] * factor[None, :]
    else:
        p = exp_from(s_col, unit, safe[None, :])
    return p
