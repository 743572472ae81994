"""Tile primitives of the Triton kernels: masked loads, the score tile, softmax pieces, dropout.

Every jit function works on one tile and knows no op. Accumulation is fp32; fp32 inputs are
multiplied with input_precision="ieee". Tensors arrive as `Rows` (see _args.py).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def head(t, bh, H):
    """Pointer to the [L, width] matrix of head bh = b * H + h."""
    return t.ptr + (bh // H).to(tl.int64) * t.b + (bh % H).to(tl.int64) * t.h


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
        ptrs = keep.ptr + b.to(tl.int64) * keep.b + offs.to(tl.int64) * keep.m
        inside = inside & (tl.load(ptrs, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_row(ptr, bh, offs, L):
    """Entries offs of row bh of a contiguous [B * H, L] fp32 array, 0 outside."""
    return tl.load(ptr + bh.to(tl.int64) * L + offs, mask=offs < L, other=0.0)


@triton.jit
def store_row(ptr, bh, offs, L, value):
    """Writes the entries offs < L of row bh of a contiguous [B * H, L] array."""
    tl.store(ptr + bh.to(tl.int64) * L + offs, value, mask=offs < L)


@triton.jit
def dot_tile(a, b):
    """a @ b in fp32; a is rounded to b's type, as the tensor core wants it."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def s_tile(a, b, score, bias, bh, H, offs_m, offs_n, M, N):
    """Scores [BLOCK_M, BLOCK_N] = clamp(scale * a @ b.T) + bias, and where clamp passes gradient.

    Entries outside [M, N] are what the zero rows of a and b give: the caller masks them.
    """
    s = dot_tile(a, tl.trans(b)) * score.scale
    passes = s == s
    if score.CLAMPED:
        passes = (s >= -score.clamp) & (s <= score.clamp)
        s = tl.where(s > score.clamp, score.clamp, tl.where(s < -score.clamp, -score.clamp, s))
    if bias.HAS:
        ptrs = head(bias, bh, H) + offs_m[:, None].to(tl.int64) * bias.m
        ptrs += offs_n[None, :].to(tl.int64) * bias.d
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        s += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    return s, passes


@triton.jit
def finite_or(x, other):
    """x, with -inf replaced: the only guard of (-inf) - (-inf)."""
    return tl.where(x == float("-inf"), other, x)


@triton.jit
def p_from_lse(s, lse, fix):
    """exp(s - lse[:, None]) * 2^fix, 0 where s is -inf also if lse is; `fix` makes up for the
    rounding of a large lse (see delta_kernel)."""
    return tl.exp2((s - finite_or(lse, 0.0)[:, None]) * LOG2E + fix[:, None])


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
def p_both(s, la, lb, fix_a, fix_b, centre):
    """p_row = exp(s - la) * 2^fix_a by rows and p_col = exp(s - lb) * 2^fix_b by columns, from one
    exp where that is safe; la and lb are never -inf.

        c = (la + centre) / 2;  h = (lb - centre) / 2;  e = exp(s - c - h)
        p_row = e * exp(c - la) * exp(h);  p_col = e * exp(c - centre) * exp(-h)

    The factors are vectors and stay in range while la and lb lie within 60 of `centre`; otherwise
    the tile takes a second exp.
    """
    far = tl.maximum(tl.max(tl.abs(la - centre), 0), tl.max(tl.abs(lb - centre), 0))
    if far <= 60.0:
        c = 0.5 * (la + centre)
        h = (0.5 * LOG2E) * (lb - centre)
        e = tl.exp2((s - c[:, None]) * LOG2E - h[None, :])
        p_row = e * tl.exp2((c - la) * LOG2E + fix_a)[:, None] * tl.exp2(h)[None, :]
        p_col = e * tl.exp2((c - centre) * LOG2E)[:, None] * tl.exp2(fix_b - h)[None, :]
    else:
        p_row = tl.exp2((s - la[:, None]) * LOG2E + fix_a[:, None])
        p_col = tl.exp2((s - lb[None, :]) * LOG2E + fix_b[None, :])
    return p_row, p_col


@triton.jit
def e_both(s, s_row, s_col, keep_m, MASKED: tl.constexpr):
    """One exp for both maxima of a tile: e, u, w, r, top, col_max, near.

        u[i] = max_j s_row;  w[j] = max_i (s_col - u);  e = exp(s - u - w)
        exp(s - u)   = e * exp(w)              p of the row softmax, before its sum
        exp(s - top) = e * r * exp(w), r = exp(u - top), top = max of u over rows kept as keys

    s_row and s_col are s with -inf at keys that are masked in that direction. Rows that are no keys
    (MASKED says that there may be some) leave no trace in w, so theirs is bounded from below to
    keep e finite. `near` says that the column form keeps its bits: w + top is within 60 of the
    column's own maximum.
    """
    u = finite_or(tl.max(s_row, 1), 0.0)
    w = tl.max(s_col - u[:, None], 0)
    w = tl.maximum(w, -60.0) if MASKED else finite_or(w, 0.0)
    e = tl.exp(s - u[:, None] - w[None, :])
    top = tl.max(tl.where(keep_m, u, float("-inf")), 0)
    r = tl.where(keep_m, tl.exp(u - top), 0.0)
    col_max = tl.max(s_col, 0)
    near = tl.max(tl.where(col_max == float("-inf"), 0.0, w + top - col_max), 0) <= 60.0
    return e, u, w, r, top, col_max, near


@triton.jit
def p_col_of(e, s_col, w, r, top, col_max, near, ref):
    """exp(s_col - ref[None, :]) from e where near, by a second exp elsewhere; ref >= col_max."""
    safe = finite_or(ref, 0.0)
    if near:
        factor = tl.where(col_max == float("-inf"), 0.0, tl.exp(w + top - safe))
        p = e * r[:, None] * factor[None, :]
    else:
        p = tl.exp(s_col - safe[None, :])
    return p
