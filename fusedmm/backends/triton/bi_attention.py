"""bi_attention on Triton: one S for both softmaxes.

Short stream resident (it fits one tile): a program streams the long stream once, with one S and one
exp for both directions, and column results are reduced once at its end; one program a head needs
no reduction, which is also the tiny regime's single launch. Both streams long: one launch computes
both directions, sharing nothing; the backward shares S, dP and ds in each of its two walks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...tuning import lookup
from . import _attend
from ._args import (
    Bias,
    Keep,
    Rows,
    bias_of,
    drop_of,
    keep_of,
    padded,
    reject_attention,
    rows,
    score_of,
    tiles,
)
from ._attend import centre_of, db_end, db_slot, db_store
from ._tile import (
    beyond,
    dot_tile,
    dropped,
    exp_from,
    finite_or,
    head,
    kept,
    load_row,
    load_tile,
    lse_of,
    near,
    p_near,
    s_tile,
    split_lse,
    store_row,
    store_tile,
    unit_of,
)

OP = "bi_attention"
ROWS = 128  # of the long stream: what a program at least walks where several share a head


class Stream(NamedTuple):
    """One stream: L tokens that look at the other stream and are looked at by it."""

    qk: Rows
    v: Rows
    keep: Keep
    o: Rows
    lse: Any
    M: Any  # tokens
    D: Any
    DV: Any  # width of o: that of the other stream's v
    DVK: Any  # width of v
    INDEX: Any  # direction in which this stream's tokens are the queries
    FLIP: Any  # whether this is y, the columns of s


class StreamGrads(NamedTuple):
    """Gradients of a Stream; delta, ref and fix as in _attend.py."""

    do: Rows
    delta: Any
    ref: Any
    fix: Any
    up: Any
    down: Any
    dqk: Rows
    dv: Rows
    KNOWN: Any = tl.constexpr(True)  # as in Grads


def reject(problem) -> list[str]:
    """Limits of these kernels."""
    return reject_attention(problem)


@triton.jit
def _inside(
    a, b, qk_a, qk_b, score, bias, bh, H, offs_m, offs_n, in_m, in_n, EVEN: tl.constexpr
):  # fmt: skip
    """s of a tile, -inf outside both streams."""
    s, _ = s_tile(qk_a, qk_b, score, bias, bh, H, offs_m, offs_n, a.M, b.M)
    return s if EVEN else tl.where(in_m[:, None] & in_n[None, :], s, float("-inf"))


@triton.jit
def resident_fwd_kernel(
    a, b, bias, part_acc, part_lse, H, chunks, chunk, score, seed, drop, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o and lse of both streams; all of stream b is one tile, stream a passes by in tiles.

        e = exp(s - u), u[i] = max_j s;  p_row = e;  p_col = e * exp(u - top) * gain

    u, top and ref are in base 2 and rounded once, so that they cancel exactly however large s is.
    gain[j] = exp(top - ref[j]) with references `ref` of the columns that stay until a tile exceeds
    them by 2^10 or lies out of reach; then they are set anew and acc rescaled. Where columns are
    near one another, ref is `top` for all of them. log2 of the largest gain is `lead`.
    total_n keeps partial sums, so that no tile reduces across lanes or warps.

    Grid: chunks of `chunk` rows of a, fastest, times B * H. With SPLIT a program leaves its share
    of b's output, normalised, in part_acc [B * H, chunks, N, DV], and in part_lse
    [B * H, chunks, 2, N] its references and logs of the sums.
    """
    pid = tl.program_id(0)
    bh = pid // chunks
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < b.M
    keep_n = kept(b.keep, bh // H, offs_n, b.M)
    full_n: tl.constexpr = EVEN and not b.keep.HAS
    full_m: tl.constexpr = EVEN and not a.keep.HAS
    qk_b = load_tile(head(b.qk, bh, H), b.qk, offs_n, in_n, EVEN, a.D, BLOCK_D)
    v_b = load_tile(head(b.v, bh, H), b.v, offs_n, keep_n, full_n, b.DVK, BLOCK_DV)
    a_ptr = head(a.qk, bh, H)
    v_ptr = head(a.v, bh, H)
    o_ptr = head(a.o, bh, H)
    unit = unit_of(score)
    top = 0.0
    lead = 0.0
    ref = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    gain = tl.zeros((BLOCK_N,), tl.float32)
    stale = 1
    # How small a column's largest p may be under a common reference: p is rounded to v's type.
    NEAR: tl.constexpr = 2.0**-4 if v_b.dtype == tl.float16 else 2.0**-60
    total_n = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start = pid % chunks * chunk
    for m0 in range(start, tl.minimum(start + chunk, a.M), BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        in_m = offs_m < a.M
        keep_m = kept(a.keep, bh // H, offs_m, a.M)
        qk_a = load_tile(a_ptr, a.qk, offs_m, in_m, EVEN, a.D, BLOCK_D)
        v_a = load_tile(v_ptr, a.v, offs_m, keep_m, full_m, a.DVK, BLOCK_DV)
        s = _inside(a, b, qk_a, qk_b, score, bias, bh, H, offs_m, offs_n, in_m, in_n, EVEN)
        s_row = tl.where(keep_n[None, :], s, float("-inf")) if b.keep.HAS else s
        u = finite_or(tl.max(s_row, 1) * unit, 0.0)
        e = exp_from(s, unit, u[:, None])

        p = tl.where(keep_n[None, :], e, 0.0) if b.keep.HAS else e
        total = tl.sum(p, 1)
        if drop.ON:
            p = dropped(p, drop, seed, a.INDEX, a.FLIP, bh, m0, 0)
        o = dot_tile(p, v_b) * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        store_tile(o_ptr, a.o, offs_m, a.M, o, a.DV, BLOCK_DV)
        lse = lse_of(total, u)
        store_row(a.lse, bh, offs_m, a.M, lse)

        r = tl.where(keep_m, tl.exp2(u - top), 0.0)
        p = e * r[:, None] * gain[None, :]
        highest = finite_or(tl.max(tl.where(keep_m, u, float("-inf")), 0), 0.0)
        over = highest - top + lead > 10.0
        bounded = True
        if b.keep.HAS:  # s may exceed u, and e overflow, at keys that are masked
            s_col = tl.where(keep_m[:, None], s, float("-inf"))
            bounded = tl.max(tl.max(s_col * unit - u[:, None], 1), 0) <= 64.0
            over = (tl.max(tl.max(p, 1), 0) > 1024.0) | (not bounded)
        elif over:  # a bound; most of the time no p is that large
            over = tl.max(tl.max(p, 1), 0) > 1024.0
        if over | (stale != 0):
            top = tl.maximum(highest, finite_or(tl.max(ref, 0), highest))
            r = tl.where(keep_m, tl.exp2(u - top), 0.0)
            p = e * r[:, None]
            near = tl.max(p, 0)
            if m0 > start:
                near = tl.maximum(near, tl.exp2(ref - top))
            far = tl.max((in_n & (near < NEAR)).to(tl.int32), 0)
            if bounded & (far == 0):  # one reference for all columns
                best = tl.where(in_n, top, float("-inf"))
                gain = in_n.to(tl.float32)
                lead = 0.0
                stale = 0
            else:
                # s anew: kept until here it would cost the registers of a tile
                s = _inside(a, b, qk_a, qk_b, score, bias, bh, H, offs_m, offs_n, in_m, in_n, EVEN)
                s = tl.where(keep_m[:, None], s, float("-inf"))
                best = tl.maximum(ref, tl.max(s, 0) * unit)
                top = tl.maximum(top, finite_or(tl.max(best, 0), top))
                seen = best > float("-inf")
                reach = tl.where(seen, top - best, 0.0)
                gain = tl.where(seen, tl.exp2(reach), 0.0)
                lead = tl.max(reach, 0)
                stale = tl.max((in_n & ((reach > 80.0) | (best == float("-inf")))).to(tl.int32), 0)
                p = exp_from(s, unit, finite_or(best, 0.0)[None, :])
            if m0 > start:
                alpha = tl.exp2(ref - finite_or(best, 0.0))
                acc *= alpha[:, None]
                total_n *= alpha[None, None, :]
            ref = best
        if a.keep.HAS:
            p = tl.where(keep_m[:, None], p, 0.0)
        total_n += tl.sum(tl.reshape(p, (BLOCK_M // 16, 2, 8, BLOCK_N)), 1)
        if drop.ON:
            p = dropped(p, drop, seed, b.INDEX, a.FLIP, bh, m0, 0)
        acc += dot_tile(tl.trans(p.to(v_a.dtype)), v_a)
    total = tl.sum(tl.sum(total_n, 0), 0)
    acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if SPLIT:
        offs_d = tl.arange(0, BLOCK_DV)
        ptrs = part_acc + pid.to(tl.int64) * b.M * b.DV
        ptrs += offs_n[:, None] * b.DV + offs_d[None, :]
        tl.store(ptrs, acc, mask=in_n[:, None] & (offs_d < b.DV)[None, :])
        store_row(part_lse, 2 * pid, offs_n, b.M, finite_or(ref, 0.0))
        store_row(part_lse, 2 * pid + 1, offs_n, b.M, tl.log2(total))
    else:
        store_tile(head(b.o, bh, H), b.o, offs_n, b.M, acc, b.DV, BLOCK_DV)
        store_row(b.lse, bh, offs_n, b.M, lse_of(total, ref))


@triton.jit
def merge_kernel(
    b, part_acc, part_lse, H, chunks, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """o and lse of stream b from the chunks' shares, in order. Grid: tiles of BLOCK_N, B * H."""
    pid = tl.program_id(0)
    bh = pid // tl.cdiv(b.M, BLOCK_N)
    offs_n = pid % tl.cdiv(b.M, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_DV)
    inside = offs_n < b.M
    first = tl.cast(bh, tl.int64) * chunks
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for c in range(0, chunks):
        ptrs = part_lse + 2 * (first + c) * b.M + offs_n
        ref, log = (
            tl.load(ptrs, mask=inside, other=0.0),
            tl.load(ptrs + b.M, mask=inside, other=0.0),
        )
        top = tl.maximum(top, tl.where(log == float("-inf"), float("-inf"), ref))
    safe = finite_or(top, 0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for c in range(0, chunks):
        ptrs = part_lse + 2 * (first + c) * b.M + offs_n
        ref, log = (
            tl.load(ptrs, mask=inside, other=0.0),
            tl.load(ptrs + b.M, mask=inside, other=0.0),
        )
        ptrs = part_acc + (first + c) * b.M * b.DV + offs_n[:, None] * b.DV + offs_d[None, :]
        o = tl.load(ptrs, mask=inside[:, None] & (offs_d < b.DV)[None, :], other=0.0)
        weight = tl.exp2(ref - safe + log)
        total += weight
        acc += o * weight[:, None]
    acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store_tile(head(b.o, bh, H), b.o, offs_n, b.M, acc, b.DV, BLOCK_DV)
    lse = lse_of(total, top)
    store_row(b.lse, bh, offs_n, b.M, lse)


@triton.jit
def load_stream(t, g, bh, H, offs, inside, keep, centre, STORED: tl.constexpr, EVEN: tl.constexpr,
                D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """qk, v, do, delta and split_lse of the rows `offs` of a stream; STORED says that delta_kernel
    left the factors of split_lse, for kernels that visit a row more than once."""
    full: tl.constexpr = EVEN and not t.keep.HAS
    qk = load_tile(head(t.qk, bh, H), t.qk, offs, inside, EVEN, D, BLOCK_D)
    v = load_tile(head(t.v, bh, H), t.v, offs, keep, full, t.DVK, BLOCK_DV)
    do = load_tile(head(g.do, bh, H), g.do, offs, inside, EVEN, t.DV, BLOCK_DV)
    ref = tl.where(offs < t.M, load_row(g.ref, bh, offs, t.M), centre)
    if STORED:
        c = 0.5 * (ref + centre)
        up, down = load_row(g.up, bh, offs, t.M), load_row(g.down, bh, offs, t.M)
        split = c, c - centre, up, down
    else:
        split = split_lse(ref, load_row(g.fix, bh, offs, t.M), centre)
    return qk, v, do, load_row(g.delta, bh, offs, t.M), split


@triton.jit
def ds_tile(
    a, b, ga, gb, tile_a, tile_b, bias, bh, H, centre, offs_m, m0, offs_n, n0, in_m, keep_m, in_n,
    keep_n, score, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ds before the clamp, where the clamp passes, and both dropped-out p, [BLOCK_M, BLOCK_N].

    ds = p_row * (do_a @ v_b.T - delta_a) + p_col * (v_a @ do_b.T - delta_b)
    """
    qk_a, v_a, do_a, delta_a, split_a = tile_a
    qk_b, v_b, do_b, delta_b, split_b = tile_b
    s, passes = s_tile(qk_a, qk_b, score, bias, bh, H, offs_m, offs_n, a.M, b.M)
    if not EVEN:
        s = tl.where(in_m[:, None] & in_n[None, :], s, float("-inf"))
    unit = unit_of(score)
    if near(split_a, split_b):
        p_row, p_col = p_near(s, unit, split_a, split_b)
    else:  # read here only: elsewhere they would cost registers and traffic
        row, col = load_row(ga.ref, bh, offs_m, a.M), load_row(gb.ref, bh, offs_n, b.M)
        fix_row, fix_col = load_row(ga.fix, bh, offs_m, a.M), load_row(gb.fix, bh, offs_n, b.M)
        p_row = tl.exp2(beyond(s, unit, row[:, None]) + fix_row[:, None])
        p_col = tl.exp2(beyond(s, unit, col[None, :]) + fix_col[None, :])
    if b.keep.HAS:
        p_row = tl.where(keep_n[None, :], p_row, 0.0)
    if a.keep.HAS:
        p_col = tl.where(keep_m[:, None], p_col, 0.0)
    dp_row = dot_tile(do_a, tl.trans(v_b))
    dp_col = dot_tile(v_a, tl.trans(do_b))
    pf_row = p_row
    pf_col = p_col
    if drop.ON:
        ones = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
        f_row = dropped(ones, drop, seed, a.INDEX, a.FLIP, bh, m0, n0)
        f_col = dropped(ones, drop, seed, b.INDEX, a.FLIP, bh, m0, n0)
        pf_row = p_row * f_row
        pf_col = p_col * f_col
        dp_row *= f_row
        dp_col *= f_col
    ds = p_row * (dp_row - delta_a[:, None]) + p_col * (dp_col - delta_b[None, :])
    return ds, passes, pf_row, pf_col


@triton.jit
def owner_bwd_kernel(
    x, y, gx, gy, bias_x, bias_y, H, programs_x, score, seed, drop, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dqk and dv of both streams, each tile of tokens walking the whole other stream.

    Grid: tiles of BLOCK_M tokens, fastest, times B * H; programs below programs_x own x's tokens.
    """
    pid = tl.program_id(0)
    if pid < programs_x:
        _owner_bwd(x, y, gx, gy, bias_x, pid, H, score, seed, drop,
                   EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    else:
        _owner_bwd(y, x, gy, gx, bias_y, pid - programs_x, H, score, seed, drop,
                   EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip


@triton.jit
def _owner_bwd(
    a, b, ga, gb, bias, pid, H, score, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    bh = pid // tl.cdiv(a.M, BLOCK_M)
    m0 = pid % tl.cdiv(a.M, BLOCK_M) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    in_m = offs_m < a.M
    keep_m = kept(a.keep, bh // H, offs_m, a.M)
    centre = centre_of(b, bh) if a.FLIP else centre_of(a, bh)
    tile_a = load_stream(
        a, ga, bh, H, offs_m, in_m, keep_m, centre, True, EVEN, a.D, BLOCK_D, BLOCK_DV
    )
    dqk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for n0 in range(0, b.M, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        in_n = offs_n < b.M
        keep_n = kept(b.keep, bh // H, offs_n, b.M)
        tile_b = load_stream(
            b, gb, bh, H, offs_n, in_n, keep_n, centre, True, EVEN, a.D, BLOCK_D, BLOCK_DV
        )
        ds, passes, _, pf_col = ds_tile(
            a, b, ga, gb, tile_a, tile_b, bias, bh, H, centre, offs_m, m0, offs_n, n0, in_m,
            keep_m, in_n, keep_n, score, seed, drop, EVEN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if score.CLAMPED:
            ds = tl.where(passes, ds, 0.0)
        dqk += dot_tile(ds, tile_b[0])
        dv += dot_tile(pf_col, tile_b[2])
    store_tile(head(ga.dqk, bh, H), ga.dqk, offs_m, a.M, dqk * score.scale, a.D, BLOCK_D)
    store_tile(head(ga.dv, bh, H), ga.dv, offs_m, a.M, dv, a.DVK, BLOCK_DV)


@triton.jit
def resident_bwd_kernel(
    a, b, ga, gb, bias, part, H, chunks, chunk, score, seed, drop, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dqk and dv of both streams in seven products a tile; all of stream b is one tile.

    Grid: chunks of `chunk` rows of a, fastest, times B * H. With SPLIT a program leaves its share
    of b's gradients in part [B * H, chunks, N, D + DVK].
    """
    pid = tl.program_id(0)
    bh = pid // chunks
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < b.M
    keep_n = kept(b.keep, bh // H, offs_n, b.M)
    centre = centre_of(b, bh) if a.FLIP else centre_of(a, bh)
    tile_b = load_stream(
        b, gb, bh, H, offs_n, in_n, keep_n, centre, False, EVEN, a.D, BLOCK_D, BLOCK_DV
    )
    dqk_b = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_b = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start = pid % chunks * chunk
    for m0 in range(start, tl.minimum(start + chunk, a.M), BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        in_m = offs_m < a.M
        keep_m = kept(a.keep, bh // H, offs_m, a.M)
        tile_a = load_stream(
            a, ga, bh, H, offs_m, in_m, keep_m, centre, False, EVEN, a.D, BLOCK_D, BLOCK_DV
        )
        ds, passes, pf_row, pf_col = ds_tile(
            a, b, ga, gb, tile_a, tile_b, bias, bh, H, centre, offs_m, m0, offs_n, 0, in_m,
            keep_m, in_n, keep_n, score, seed, drop, EVEN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if score.CLAMPED:
            ds = tl.where(passes, ds, 0.0)
        ds = ds.to(tile_a[0].dtype)
        dv_b += dot_tile(tl.trans(pf_row.to(tile_a[2].dtype)), tile_a[2])
        dqk_b += dot_tile(tl.trans(ds), tile_a[0])
        dv_a = dot_tile(pf_col, tile_b[2])
        store_tile(head(ga.dv, bh, H), ga.dv, offs_m, a.M, dv_a, a.DVK, BLOCK_DV)
        dqk_a = dot_tile(ds, tile_b[0]) * score.scale
        store_tile(head(ga.dqk, bh, H), ga.dqk, offs_m, a.M, dqk_a, a.D, BLOCK_D)
    dqk_b *= score.scale
    if SPLIT:
        width: tl.constexpr = a.D + b.DVK
        offs_d = tl.arange(0, BLOCK_D)
        offs_v = tl.arange(0, BLOCK_DV)
        base = part + pid.to(tl.int64) * b.M * width + offs_n[:, None] * width
        tl.store(base + offs_d[None, :], dqk_b, mask=in_n[:, None] & (offs_d < a.D)[None, :])
        inside = in_n[:, None] & (offs_v < b.DVK)[None, :]
        tl.store(base + a.D + offs_v[None, :], dv_b, mask=inside)
    else:
        store_tile(head(gb.dqk, bh, H), gb.dqk, offs_n, b.M, dqk_b, a.D, BLOCK_D)
        store_tile(head(gb.dv, bh, H), gb.dv, offs_n, b.M, dv_b, b.DVK, BLOCK_DV)


@triton.jit
def sum_kernel(
    b, gb, part, H, chunks, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """dqk and dv of stream b: the chunks' shares added in order. Grid: tiles of tokens, B * H."""
    pid = tl.program_id(0)
    bh = pid // tl.cdiv(b.M, BLOCK_N)
    offs_n = pid % tl.cdiv(b.M, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_DV)
    in_d = (offs_n < b.M)[:, None] & (offs_d < b.D)[None, :]
    in_v = (offs_n < b.M)[:, None] & (offs_v < b.DVK)[None, :]
    width: tl.constexpr = b.D + b.DVK
    dqk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for c in range(0, chunks):
        base = part + (tl.cast(bh, tl.int64) * chunks + c) * b.M * width + offs_n[:, None] * width
        dqk += tl.load(base + offs_d[None, :], mask=in_d, other=0.0)
        dv += tl.load(base + b.D + offs_v[None, :], mask=in_v, other=0.0)
    store_tile(head(gb.dqk, bh, H), gb.dqk, offs_n, b.M, dqk, b.D, BLOCK_D)
    store_tile(head(gb.dv, bh, H), gb.dv, offs_n, b.M, dv, b.DVK, BLOCK_DV)


@triton.jit
def dbias_kernel(
    a, b, ga, gb, bias, db, B, H, sizes, score, seed, drop, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """db = ds summed over the dimensions in which db [b, h, m, n] = sizes is 1; see _attend.py."""
    tile_m, tile_n, slot_b, slot_h = db_slot(sizes, tl.program_id(0), BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(slot_b, B, sizes[0]):
        for h in range(slot_h, H, sizes[1]):
            bh = i * H + h
            centre = centre_of(a, bh)
            for m0 in range(tile_m * BLOCK_M, db_end(sizes[2], tile_m, a.M, BLOCK_M), BLOCK_M):
                offs_m = m0 + tl.arange(0, BLOCK_M)
                in_m = offs_m < a.M
                keep_m = kept(a.keep, i, offs_m, a.M)
                tile_a = load_stream(
                    a, ga, bh, H, offs_m, in_m, keep_m, centre, False, False, a.D, BLOCK_D, BLOCK_DV
                )
                for n0 in range(tile_n * BLOCK_N, db_end(sizes[3], tile_n, b.M, BLOCK_N), BLOCK_N):
                    offs_n = n0 + tl.arange(0, BLOCK_N)
                    in_n = offs_n < b.M
                    keep_n = kept(b.keep, i, offs_n, b.M)
                    tile_b = load_stream(
                        b,
                        gb,
                        bh,
                        H,
                        offs_n,
                        in_n,
                        keep_n,
                        centre,
                        False,
                        False,
                        a.D,
                        BLOCK_D,
                        BLOCK_DV,
                    )
                    ds, _, _, _ = ds_tile(
                        a, b, ga, gb, tile_a, tile_b, bias, bh, H, centre, offs_m, m0, offs_n, n0,
                        in_m, keep_m, in_n, keep_n, score, seed, drop, False, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    acc += ds
    db_store(db, sizes, slot_b, slot_h, tile_m, tile_n, acc, BLOCK_M, BLOCK_N)


def _streams(qk_x, qk_y, v_x, v_y, mask_x, mask_y, o_x, o_y, lse_x, lse_y):
    """Streams x and y."""
    D, width_x, width_y = (tl.constexpr(t.shape[3]) for t in (qk_x, v_x, v_y))
    x = Stream(
        rows(qk_x), rows(v_x), keep_of(mask_x, qk_x), rows(o_x), lse_x, qk_x.shape[2],
        D, width_y, width_x, tl.constexpr(0), tl.constexpr(False),
    )  # fmt: skip
    y = Stream(
        rows(qk_y), rows(v_y), keep_of(mask_y, qk_y), rows(o_y), lse_y, qk_y.shape[2],
        D, width_x, width_y, tl.constexpr(1), tl.constexpr(True),
    )  # fmt: skip
    return x, y


def _directions(x: Stream, y: Stream, bias_x: Bias, bias_y: Bias, score):
    """The streams as two directions of attention that know nothing of each other."""
    dir_x = _attend.Direction(
        x.qk, y.qk, y.v, y.keep, bias_x, score, x.o, x.lse, x.M, y.M, x.D, x.DV, x.INDEX, x.FLIP
    )
    dir_y = _attend.Direction(
        y.qk, x.qk, x.v, x.keep, bias_y, score, y.o, y.lse, y.M, x.M, y.D, y.DV, y.INDEX, y.FLIP
    )
    return dir_x, dir_y


def _resident(kernel: str, x: Stream, y: Stream, widths: dict[str, int]):
    """(tile with BLOCK_N for the short stream, whether y is short), or None if neither fits."""
    choice = _attend.config(OP, kernel, x.qk.ptr, widths)
    short = min(x.M, y.M)
    if short == 0 or short > choice["BLOCK_N"]:
        return None
    # A warp owns 16 rows of a product: more warps than that would compute the same twice.
    warps = max(1, min(choice["num_warps"], padded(short) // 16))
    rows_m = min(choice["BLOCK_M"], max(32, choice["BLOCK_M"] * warps // choice["num_warps"]))
    fitted = dict(BLOCK_M=rows_m, BLOCK_N=padded(short), num_warps=warps)
    return choice | fitted, y.M <= x.M


def _chunks(a: Stream, heads: int, block: int) -> tuple[int, int]:
    """How many programs share a head's rows, and rows each: at most one a processor in all, and no
    fewer than ROWS each, for every further one writes and reads its share of b's results."""
    programs = lookup.processors(a.qk.ptr.device.index)
    wanted = max(1, min(programs // max(heads, 1), a.M // ROWS))
    chunk = tiles(tiles(a.M, block), wanted) * block
    return tiles(a.M, chunk), chunk


def fwd(qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, clamp, scale, dropout_p, seed):
    """o_x, o_y, lse_x, lse_y."""
    B, H, M, _ = qk_x.shape
    N = qk_y.shape[2]
    o_x = qk_x.new_empty((B, H, M, v_y.shape[3]))
    o_y = qk_y.new_empty((B, H, N, v_x.shape[3]))
    lse_x, lse_y = (t.new_empty(t.shape[:3], dtype=torch.float64) for t in (qk_x, qk_y))
    x, y = _streams(qk_x, qk_y, v_x, v_y, mask_x, mask_y, o_x, o_y, lse_x, lse_y)
    bias_x, bias_y = (bias_of(bias, qk_x, (B, H, M, N), swap) for swap in (False, True))
    score, (drop, seed) = score_of(scale, clamp, bias), drop_of(dropout_p, seed)
    widths = _widths(x, y)
    fit = _resident("resident_fwd", x, y, widths) if B * H else None
    if fit is None:
        directions = _directions(x, y, bias_x, bias_y, score)
        _attend.launch_fwd(OP, *directions, drop, seed)
        return o_x, o_y, lse_x, lse_y
    choice, y_short = fit
    a, b, bias_a = (x, y, bias_x) if y_short else (y, x, bias_y)
    chunks, chunk = _chunks(a, B * H, choice["BLOCK_M"])
    split = chunks > 1
    part = qk_x.new_empty((B * H, chunks, b.M, b.DV.value) if split else 0, dtype=torch.float32)
    part_lse = qk_x.new_empty((B * H, chunks, 2, b.M) if split else 0, dtype=torch.float32)
    even = a.M % choice["BLOCK_M"] == 0 and b.M == choice["BLOCK_N"]
    resident_fwd_kernel[(B * H * chunks,)](
        a, b, bias_a, part, part_lse, H, chunks, chunk, score, seed, drop,
        SPLIT=split, EVEN=even, **choice, **widths,
    )  # fmt: skip
    if split:
        few = _narrow(widths["BLOCK_DV"])
        merge_kernel[(B * H * tiles(b.M, few["BLOCK_N"]),)](
            b, part, part_lse, H, chunks, BLOCK_DV=widths["BLOCK_DV"], **few
        )
    return o_x, o_y, lse_x, lse_y


def bwd(
    do_x, do_y, dlse_x, dlse_y, qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias,
    o_x, o_y, lse_x, lse_y, clamp, scale, dropout_p, seed, needs,
):  # fmt: skip
    """Gradients of (qk_x, qk_y, v_x, v_y, bias) where `needs`."""
    B, H, M, _ = qk_x.shape
    N = qk_y.shape[2]
    lse_x, lse_y = lse_x.contiguous(), lse_y.contiguous()
    x, y = _streams(qk_x, qk_y, v_x, v_y, mask_x, mask_y, o_x, o_y, lse_x, lse_y)
    bias_x, bias_y = (bias_of(bias, qk_x, (B, H, M, N), swap) for swap in (False, True))
    score, (drop, seed) = score_of(scale, clamp, bias), drop_of(dropout_p, seed)
    dqk_x, dqk_y, dv_x, dv_y = _attend.contiguous_grads(qk_x, qk_y, v_x, v_y)
    dir_x, dir_y = _directions(x, y, bias_x, bias_y, score)
    full_x = _attend.grads(do_x, dlse_x, dqk_x, dqk_y, dv_y)
    full_y = _attend.grads(do_y, dlse_y, dqk_y, dqk_x, dv_x)
    widths = _widths(x, y)
    fit = _resident("resident_bwd", x, y, widths) if B * H else None
    _attend.launch_delta(OP, dir_x, dir_y, full_x, full_y, shared=fit is None)
    gx = StreamGrads(
        full_x.do, full_x.delta, full_x.ref, full_x.fix, full_x.up, full_x.down,
        rows(dqk_x), rows(dv_x),
    )  # fmt: skip
    gy = StreamGrads(
        full_y.do, full_y.delta, full_y.ref, full_y.fix, full_y.up, full_y.down,
        rows(dqk_y), rows(dv_y),
    )  # fmt: skip
    need_x, need_y = needs[0] or needs[2], needs[1] or needs[3]
    if fit is not None and (need_x or need_y):
        choice, y_short = fit
        _resident_bwd(
            *((x, y, gx, gy, bias_x) if y_short else (y, x, gy, gx, bias_y)),
            score, drop, seed, choice, widths,
        )  # fmt: skip
    elif need_x or need_y:
        choice = _attend.filling(OP, "owner_bwd", qk_x, widths, B * H, M, N)
        programs_x = B * H * tiles(M, choice["BLOCK_M"]) if need_x else 0
        programs_y = B * H * tiles(N, choice["BLOCK_M"]) if need_y else 0
        if programs_x + programs_y:
            owner_bwd_kernel[(programs_x + programs_y,)](
                x, y, gx, gy, bias_x, bias_y, H, programs_x, score, seed, drop,
                EVEN=_attend.even(choice, M, N), **choice, **widths,
            )  # fmt: skip
    db = None
    if needs[4]:
        (db,) = _attend.contiguous_grads(bias)
        sizes = (1,) * (4 - db.dim()) + tuple(db.shape)
        choice = _attend.config(OP, "dbias", qk_x, widths)
        programs = sizes[0] * sizes[1]
        programs *= tiles(sizes[2], choice["BLOCK_M"]) * tiles(sizes[3], choice["BLOCK_N"])
        if programs:
            dbias_kernel[(programs,)](
                x, y, gx, gy, bias_x, db, B, H, sizes, score, seed, drop, **choice, **widths
            )
    grads = (dqk_x, dqk_y, dv_x, dv_y, db)
    return [g for g, need in zip(grads, needs, strict=True) if need]


def _resident_bwd(a, b, ga, gb, bias, score, drop, seed, choice, widths) -> None:
    B, H, _ = a.lse.shape
    chunks, chunk = _chunks(a, B * H, choice["BLOCK_M"])
    split = chunks > 1
    shape = (B * H, chunks, b.M, b.D.value + b.DVK.value) if split else 0
    part = a.lse.new_empty(shape, dtype=torch.float32)
    even = a.M % choice["BLOCK_M"] == 0 and b.M == choice["BLOCK_N"]
    resident_bwd_kernel[(B * H * chunks,)](
        a, b, ga, gb, bias, part, H, chunks, chunk, score, seed, drop,
        SPLIT=split, EVEN=even, **choice, **widths,
    )  # fmt: skip
    if split:
        few = _narrow(min(widths.values()))
        sum_kernel[(B * H * tiles(b.M, few["BLOCK_N"]),)](b, gb, part, H, chunks, **few, **widths)


def _narrow(width: int) -> dict[str, int]:
    """Tile of the sums over chunks: four fp32 a thread, 16 bytes, so that loads fill sectors."""
    return dict(BLOCK_N=max(1, 4 * 32 // width), num_warps=1)


def _widths(x: Stream, y: Stream) -> dict[str, int]:
    """Padded D, and the wider of the two padded Dv."""
    return dict(BLOCK_D=padded(x.D.value), BLOCK_DV=padded(max(x.DV.value, y.DV.value)))
