"""One softmax direction of attention, forward and backward; both directions share each launch.

co_attention uses all of it, bi_attention the forward where both streams are long. The backward
recomputes s twice, once for dq and once for dk, dv: deterministic without a reduction.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning import lookup
from ._args import Bias, Drop, Keep, Rows, Score, padded, rows, tiles
from ._tile import (
    LN2,
    base2,
    dot_tile,
    dropped,
    exp_from,
    finite_or,
    head,
    kept,
    load_row,
    load_tile,
    lse_of,
    p_from_lse,
    s_tile,
    split_lse,
    store_row,
    store_tile,
    unit_of,
)


class Direction(NamedTuple):
    """M queries that look at N keys: o = softmax(s) @ v."""

    q: Rows
    k: Rows
    v: Rows
    keep: Keep
    bias: Bias
    score: Score
    o: Rows
    lse: Any
    M: Any
    N: Any
    D: Any
    DV: Any
    INDEX: Any  # of the direction in dropout's counter
    FLIP: Any  # whether that counter's m is the key


class Grads(NamedTuple):
    """Gradients of a Direction; delta = rowsum(do * o) - dlse, lse in base 2 = ref - fix."""

    do: Rows
    dlse: Any
    delta: Any
    ref: Any
    fix: Any
    up: Any
    down: Any
    dq: Rows
    dk: Rows
    dv: Rows
    # Triton 3.6 forgets constants in a tuple of tuples that has none of its own.
    KNOWN: Any = tl.constexpr(True)


def direction(q, k, v, keep, bias, score, o, lse, index: int, flip: bool = False) -> Direction:
    sizes = q.shape[2], k.shape[2], tl.constexpr(q.shape[3]), tl.constexpr(v.shape[3])
    facts = tl.constexpr(index), tl.constexpr(flip)
    return Direction(rows(q), rows(k), rows(v), keep, bias, score, rows(o), lse, *sizes, *facts)


@triton.jit
def attend_fwd_kernel(
    x, y, H, programs_x, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o = softmax(s, keys) @ v and lse, of directions x and y.

    Grid: tiles of BLOCK_M queries, fastest, times B * H; programs below programs_x own x's.
    """
    pid = tl.program_id(0)
    if pid < programs_x:
        _fwd(x, pid, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)
    else:
        _fwd(y, pid - programs_x, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)


@triton.jit
def _fwd(
    t, pid, H, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    bh = pid // tl.cdiv(t.M, BLOCK_M)
    m0 = pid % tl.cdiv(t.M, BLOCK_M) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    q = load_tile(head(t.q, bh, H), t.q, offs_m, offs_m < t.M, EVEN, t.D, BLOCK_D)
    k_ptr = head(t.k, bh, H)
    v_ptr = head(t.v, bh, H)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    unit = unit_of(t.score)
    for n0 in range(0, t.N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        keep_n = kept(t.keep, bh // H, offs_n, t.N)
        full: tl.constexpr = EVEN and not t.keep.HAS
        k = load_tile(k_ptr, t.k, offs_n, keep_n, full, t.D, BLOCK_D)
        s, _ = s_tile(q, k, t.score, t.bias, bh, H, offs_m, offs_n, t.M, t.N)
        if not full:
            s = tl.where(keep_n[None, :], s, float("-inf"))
        # In base 2 and rounded once, so that `top` cancels exactly however large s is.
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        safe = finite_or(new_top, 0.0)
        p = exp_from(s, unit, safe[:, None])
        alpha = tl.exp2(top - safe)
        total = total * alpha + tl.sum(p, 1)
        if drop.ON:
            p = dropped(p, drop, seed, t.INDEX, t.FLIP, bh, m0, n0)
        v = load_tile(v_ptr, t.v, offs_n, keep_n, full, t.DV, BLOCK_DV)
        acc = acc * alpha[:, None] + dot_tile(p, v)
        top = new_top
    o = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = lse_of(total, top)
    store_tile(head(t.o, bh, H), t.o, offs_m, t.M, o, t.DV, BLOCK_DV)
    store_row(t.lse, bh, offs_m, t.M, lse)


@triton.jit
def delta_kernel(
    x, y, gx, gy, H, programs_x, SHARED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o) - dlse and lse as of base2 of both directions. SHARED also stores the
    factors of split_lse, up and down. Grid: tiles of BLOCK_M rows, B * H."""
    pid = tl.program_id(0)
    if pid < programs_x:
        _delta(x, gx, x, pid, H, SHARED, BLOCK_M, BLOCK_DV)
    else:
        _delta(y, gy, x, pid - programs_x, H, SHARED, BLOCK_M, BLOCK_DV)


@triton.jit
def centre_of(x, bh):
    """A finite number near the head's lse, in base 2: that of the first token of x."""
    first = tl.load(x.lse + tl.cast(bh, tl.int64) * x.M, mask=x.M > 0, other=0.0) / LN2
    return tl.where(tl.abs(first) < 1e30, first, 0.0).to(tl.float32)


@triton.jit
def _delta(t, g, x, pid, H, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    bh = pid // tl.cdiv(t.M, BLOCK_M)
    m0 = pid % tl.cdiv(t.M, BLOCK_M) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    inside = offs_m < t.M
    o = load_tile(head(t.o, bh, H), t.o, offs_m, inside, False, t.DV, BLOCK_DV)
    do = load_tile(head(g.do, bh, H), g.do, offs_m, inside, False, t.DV, BLOCK_DV)
    dlse = load_row(g.dlse, bh, offs_m, t.M)
    store_row(g.delta, bh, offs_m, t.M, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - dlse)
    centre = centre_of(x, bh)
    ref, fix = base2(load_row(t.lse, bh, offs_m, t.M), centre)
    store_row(g.ref, bh, offs_m, t.M, ref)
    store_row(g.fix, bh, offs_m, t.M, fix)
    if SHARED:
        _, _, up, down = split_lse(ref, fix, centre)
        store_row(g.up, bh, offs_m, t.M, up)
        store_row(g.down, bh, offs_m, t.M, down)


@triton.jit
def attend_dq_kernel(
    x, y, gx, gy, H, programs_x, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq = scale * ds @ k, ds = p * (do @ v.T - delta). Grid as in attend_fwd_kernel."""
    pid = tl.program_id(0)
    if pid < programs_x:
        _dq(x, gx, pid, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)
    else:
        _dq(y, gy, pid - programs_x, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)


@triton.jit
def _dq(
    t, g, pid, H, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    bh = pid // tl.cdiv(t.M, BLOCK_M)
    m0 = pid % tl.cdiv(t.M, BLOCK_M) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    inside = offs_m < t.M
    q = load_tile(head(t.q, bh, H), t.q, offs_m, inside, EVEN, t.D, BLOCK_D)
    do = load_tile(head(g.do, bh, H), g.do, offs_m, inside, EVEN, t.DV, BLOCK_DV)
    ref = load_row(g.ref, bh, offs_m, t.M)
    delta = load_row(g.delta, bh, offs_m, t.M)
    fix = load_row(g.fix, bh, offs_m, t.M)
    k_ptr = head(t.k, bh, H)
    v_ptr = head(t.v, bh, H)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(0, t.N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        keep_n = kept(t.keep, bh // H, offs_n, t.N)
        full: tl.constexpr = EVEN and not t.keep.HAS
        k = load_tile(k_ptr, t.k, offs_n, keep_n, full, t.D, BLOCK_D)
        v = load_tile(v_ptr, t.v, offs_n, keep_n, full, t.DV, BLOCK_DV)
        s, _ = s_tile(q, k, t.score, t.bias, bh, H, offs_m, offs_n, t.M, t.N)
        if not full:
            s = tl.where(keep_n[None, :], s, float("-inf"))
        dp = dot_tile(do, tl.trans(v))
        if drop.ON:
            dp = dropped(dp, drop, seed, t.INDEX, t.FLIP, bh, m0, n0)
        ds = p_from_lse(s, unit_of(t.score), ref, fix) * (dp - delta[:, None])
        acc += dot_tile(ds, k)
    store_tile(head(g.dq, bh, H), g.dq, offs_m, t.M, acc * t.score.scale, t.D, BLOCK_D)


@triton.jit
def attend_dkv_kernel(
    x, y, gx, gy, H, programs_x, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk = scale * ds.T @ q, dv = p.T @ do. Grid: tiles of BLOCK_N keys, fastest, times B * H."""
    pid = tl.program_id(0)
    if pid < programs_x:
        _dkv(x, gx, pid, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)
    else:
        _dkv(y, gy, pid - programs_x, H, seed, drop, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)


@triton.jit
def _dkv(
    t, g, pid, H, seed, drop, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    bh = pid // tl.cdiv(t.N, BLOCK_N)
    n0 = pid % tl.cdiv(t.N, BLOCK_N) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    keep_n = kept(t.keep, bh // H, offs_n, t.N)
    full: tl.constexpr = EVEN and not t.keep.HAS
    k = load_tile(head(t.k, bh, H), t.k, offs_n, keep_n, full, t.D, BLOCK_D)
    v = load_tile(head(t.v, bh, H), t.v, offs_n, keep_n, full, t.DV, BLOCK_DV)
    q_ptr = head(t.q, bh, H)
    do_ptr = head(g.do, bh, H)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for m0 in range(0, t.M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        inside = offs_m < t.M
        q = load_tile(q_ptr, t.q, offs_m, inside, EVEN, t.D, BLOCK_D)
        do = load_tile(do_ptr, g.do, offs_m, inside, EVEN, t.DV, BLOCK_DV)
        ref = load_row(g.ref, bh, offs_m, t.M)
        delta = load_row(g.delta, bh, offs_m, t.M)
        fix = load_row(g.fix, bh, offs_m, t.M)
        s, _ = s_tile(q, k, t.score, t.bias, bh, H, offs_m, offs_n, t.M, t.N)
        if not full:
            s = tl.where(inside[:, None] & keep_n[None, :], s, float("-inf"))
        p = p_from_lse(s, unit_of(t.score), ref, fix)
        dp = dot_tile(do, tl.trans(v))
        pf = p
        if drop.ON:
            dp = dropped(dp, drop, seed, t.INDEX, t.FLIP, bh, m0, n0)
            pf = dropped(p, drop, seed, t.INDEX, t.FLIP, bh, m0, n0)
        dv += dot_tile(tl.trans(pf.to(do.dtype)), do)
        ds = p * (dp - delta[:, None])
        dk += dot_tile(tl.trans(ds.to(q.dtype)), q)
    store_tile(head(g.dk, bh, H), g.dk, offs_n, t.N, dk * t.score.scale, t.D, BLOCK_D)
    store_tile(head(g.dv, bh, H), g.dv, offs_n, t.N, dv, t.DV, BLOCK_DV)


@triton.jit
def attend_dbias_kernel(
    t, g, db, B, H, sizes, seed, drop, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """db = ds summed over the dimensions in which db [b, h, m, n] = sizes is 1.

    Grid: tiles of db. A program walks all entries of ds that fall on its tile, in a fixed order.
    """
    tile_m, tile_n, slot_b, slot_h = db_slot(sizes, tl.program_id(0), BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(slot_b, B, sizes[0]):
        for h in range(slot_h, H, sizes[1]):
            bh = b * H + h
            for m0 in range(tile_m * BLOCK_M, db_end(sizes[2], tile_m, t.M, BLOCK_M), BLOCK_M):
                offs_m = m0 + tl.arange(0, BLOCK_M)
                inside = offs_m < t.M
                q = load_tile(head(t.q, bh, H), t.q, offs_m, inside, False, t.D, BLOCK_D)
                do = load_tile(head(g.do, bh, H), g.do, offs_m, inside, False, t.DV, BLOCK_DV)
                ref = load_row(g.ref, bh, offs_m, t.M)
                delta = load_row(g.delta, bh, offs_m, t.M)
                fix = load_row(g.fix, bh, offs_m, t.M)
                for n0 in range(tile_n * BLOCK_N, db_end(sizes[3], tile_n, t.N, BLOCK_N), BLOCK_N):
                    offs_n = n0 + tl.arange(0, BLOCK_N)
                    keep_n = kept(t.keep, b, offs_n, t.N)
                    k = load_tile(head(t.k, bh, H), t.k, offs_n, keep_n, False, t.D, BLOCK_D)
                    v = load_tile(head(t.v, bh, H), t.v, offs_n, keep_n, False, t.DV, BLOCK_DV)
                    s, _ = s_tile(q, k, t.score, t.bias, bh, H, offs_m, offs_n, t.M, t.N)
                    s = tl.where(inside[:, None] & keep_n[None, :], s, float("-inf"))
                    dp = dot_tile(do, tl.trans(v))
                    if drop.ON:
                        dp = dropped(dp, drop, seed, t.INDEX, t.FLIP, bh, m0, n0)
                    acc += p_from_lse(s, unit_of(t.score), ref, fix) * (dp - delta[:, None])
    db_store(db, sizes, slot_b, slot_h, tile_m, tile_n, acc, BLOCK_M, BLOCK_N)


@triton.jit
def db_slot(sizes, pid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """tile_m, tile_n, b, h of program pid over a bias gradient of `sizes`."""
    tiles_n = tl.cdiv(sizes[3], BLOCK_N)
    tiles_m = tl.cdiv(sizes[2], BLOCK_M)
    bh = pid // (tiles_n * tiles_m)
    return pid // tiles_n % tiles_m, pid % tiles_n, bh // sizes[1], bh % sizes[1]


@triton.jit
def db_end(size, tile, L, BLOCK: tl.constexpr):
    """Where the walk ends: after its own tile, or after all L entries if they are summed."""
    own = tl.minimum((tile + 1) * BLOCK, L)
    return tl.where(size == 1, L, own)


@triton.jit
def db_store(
    db, sizes, b, h, tile_m, tile_n, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sums acc over the dimensions of size 1 and writes the tile of the contiguous db."""
    one_m = sizes[2] == 1
    one_n = sizes[3] == 1
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    acc = tl.where(one_m, tl.where((i == 0)[:, None], tl.sum(acc, 0)[None, :], 0.0), acc)
    acc = tl.where(one_n, tl.where((j == 0)[None, :], tl.sum(acc, 1)[:, None], 0.0), acc)
    offs_m = tile_m * BLOCK_M + i
    offs_n = tile_n * BLOCK_N + j
    base = db + (b * sizes[1] + h).to(tl.int64) * sizes[2] * sizes[3]
    ptrs = base + offs_m[:, None].to(tl.int64) * sizes[3] + offs_n[None, :]
    inside = (offs_m < sizes[2])[:, None] & (offs_n < sizes[3])[None, :]
    tl.store(ptrs, acc.to(db.dtype.element_ty), mask=inside)


def blocks(t: Direction | Any, other) -> dict[str, int]:
    """Padded widths that serve both directions of a launch."""
    return dict(
        BLOCK_D=padded(max(t.D.value, other.D.value)),
        BLOCK_DV=padded(max(t.DV.value, other.DV.value)),
    )


def config(op: str, kernel: str, like: Tensor, widths: dict[str, int]) -> dict[str, int]:
    """The table's tile for the wider of the two padded widths."""
    return lookup.tile(op, kernel, like.dtype, max(widths.values()), like.device.index)


def filling(
    op: str, kernel: str, like: Tensor, widths, heads: int, *lengths: int
) -> dict[str, int]:
    """The table's tile, or the smaller one of `kernel`_few where programs that own BLOCK_M rows of
    these lengths would leave processors idle."""
    choice = config(op, kernel, like, widths)
    programs = heads * sum(tiles(n, choice["BLOCK_M"]) for n in lengths)
    if programs < lookup.processors(like.device.index):
        choice = config(op, f"{kernel}_few", like, widths)
    return choice


def even(config: dict[str, int], *lengths: int) -> bool:
    """Whether every length fills whole tiles, whichever block walks it."""
    block = max(config["BLOCK_M"], config["BLOCK_N"])
    return all(n % block == 0 for n in lengths)


def launch_fwd(op: str, x: Direction, y: Direction, drop: Drop, seed: int) -> None:
    B, H, _ = x.lse.shape
    widths = blocks(x, y)
    choice = filling(op, "attend_fwd", x.q.ptr, widths, B * H, x.M, y.M)
    programs_x, programs_y = (B * H * tiles(t.M, choice["BLOCK_M"]) for t in (x, y))
    if programs_x + programs_y:
        attend_fwd_kernel[(programs_x + programs_y,)](
            x, y, H, programs_x, seed, drop, EVEN=even(choice, x.M, y.M), **choice, **widths
        )


def launch_delta(
    op: str, x: Direction, y: Direction, gx: Grads, gy: Grads, shared: bool = False
) -> None:
    """delta, ref and fix of both directions; up and down if they share their exponentials."""
    B, H, _ = x.lse.shape
    widths = blocks(x, y)
    choice = config(op, "delta", x.q.ptr, widths)
    programs_x, programs_y = (B * H * tiles(t.M, choice["BLOCK_M"]) for t in (x, y))
    if programs_x + programs_y:
        delta_kernel[(programs_x + programs_y,)](
            x, y, gx, gy, H, programs_x, SHARED=shared, BLOCK_DV=widths["BLOCK_DV"], **choice
        )


def launch_bwd(
    op: str, x: Direction, y: Direction, gx: Grads, gy: Grads, drop: Drop, seed: int, dq, dkv
) -> None:
    """dq and dkv: pairs of flags, whether direction x and y need dq, and dk or dv."""
    B, H, _ = x.lse.shape
    widths = blocks(x, y)
    launches = (
        ("attend_dq", attend_dq_kernel, "BLOCK_M", (x.M, y.M), dq),
        ("attend_dkv", attend_dkv_kernel, "BLOCK_N", (x.N, y.N), dkv),
    )
    for name, kernel, block, lengths, wanted in launches:
        choice = config(op, name, x.q.ptr, widths)
        programs_x, programs_y = (
            B * H * tiles(n, choice[block]) if want else 0
            for n, want in zip(lengths, wanted, strict=True)
        )
        if programs_x + programs_y:
            kernel[(programs_x + programs_y,)](
                x, y, gx, gy, H, programs_x, seed, drop,
                EVEN=even(choice, x.M, y.M), **choice, **widths,
            )  # fmt: skip


def launch_dbias(op: str, t: Direction, g: Grads, db: Tensor, drop: Drop, seed: int) -> None:
    """db has the bias's own shape, of up to 4 dimensions."""
    B, H, _ = t.lse.shape
    sizes = (1,) * (4 - db.dim()) + tuple(db.shape)
    widths = blocks(t, t)
    choice = config(op, "attend_dbias", t.q.ptr, widths)
    programs = sizes[0] * sizes[1]
    programs *= tiles(sizes[2], choice["BLOCK_M"]) * tiles(sizes[3], choice["BLOCK_N"])
    if programs:
        attend_dbias_kernel[(programs,)](t, g, db, B, H, sizes, seed, drop, **choice, **widths)


def contiguous_grads(*likes: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in likes]


def grads(do: Tensor, dlse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> Grads:
    """Gradients of a direction, with room for what delta_kernel writes."""
    if dlse is None:
        dlse = torch.zeros(do.shape[:3], dtype=torch.float32, device=do.device)
    dlse = dlse.float().contiguous()
    scratch = (torch.empty_like(dlse) for _ in range(5))
    return Grads(rows(do), dlse, *scratch, rows(dq), rows(dk), rows(dv))
