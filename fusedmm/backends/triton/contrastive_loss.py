"""contrastive_loss on Triton: statistics of rows and columns from one S and one exp; see _pairs.py.

A program reduces one tile of s to partial statistics of its rows and its columns; these merge in
order. Negatives and positives stay apart; four products over s in forward and backward together.
"""

import torch
import triton
import triton.language as tl

from . import _pairs
from ._args import reject_dtype, tiles
from ._pairs import dots_tile, load_vector, matches_tile, place
from ._tile import LOG2E, e_both, exp_from, finite_or, p_col_of

OP = "contrastive_loss"
NEG_INF = float("-inf")
LOG2E_FP32 = torch.tensor(LOG2E.value, dtype=torch.float32).item()  # as the kernels round it


def reject(problem) -> list[str]:
    """Limits of these kernels."""
    return reject_dtype(problem)


@triton.jit
def store_stat(part, tile, STAT: tl.constexpr, g, G, offs, L, value):
    """part [tiles, 8, G, L], contiguous."""
    base = part + ((tile.to(tl.int64) * 8 + STAT) * G + g) * L
    tl.store(base + offs, value, mask=offs < L)


@triton.jit
def store_stats(
    part, tile, g, G, offs, L, top_neg, sum_neg, s, pos, out, has_pos, AXIS: tl.constexpr
):  # fmt: skip
    """The statistics along AXIS of one tile. An lse is a reference and the log of a sum, base 2: in
    one fp32 it would be off by 5e-4 at 1e4. Positives are looked at where there are any."""
    top_pos = tl.zeros_like(top_neg)
    log_pos = tl.full(top_neg.shape, float("-inf"), tl.float32)
    sum_pos = tl.zeros_like(top_neg)
    n_pos = tl.zeros_like(top_neg)
    if has_pos:
        s_pos = tl.where(pos, s, float("-inf"))
        top_pos = finite_or(tl.max(s_pos, AXIS) * LOG2E, 0.0)
        p = exp_from(s_pos, LOG2E, tl.expand_dims(top_pos, AXIS))
        log_pos = tl.log2(tl.sum(p, AXIS))
        sum_pos = tl.sum(tl.where(pos, s, 0.0), AXIS)
        n_pos = tl.sum(pos.to(tl.float32), AXIS)
    store_stat(part, tile, 0, g, G, offs, L, top_neg)
    store_stat(part, tile, 1, g, G, offs, L, tl.log2(sum_neg))
    store_stat(part, tile, 2, g, G, offs, L, top_pos)
    store_stat(part, tile, 3, g, G, offs, L, log_pos)
    store_stat(part, tile, 4, g, G, offs, L, sum_pos)
    store_stat(part, tile, 5, g, G, offs, L, n_pos)
    store_stat(part, tile, 6, g, G, offs, L, tl.sum(tl.where(out, 0.0, s), AXIS))
    store_stat(part, tile, 7, g, G, offs, L, tl.sum((~out).to(tl.float32), AXIS))


@triton.jit
def stats_kernel(
    x, y, scale, matches, part_x, part_y, G, M, N, D, WANT_X: tl.constexpr, WANT_Y: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of one tile of s = scale * x @ y.T, by rows in part_x [tiles_n, 8, G, M] and by
    columns in part_y [tiles_m, 8, G, N]. Grid: tiles of s times G."""
    g, tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_tile(x, y, g, offs_m, offs_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
    s = dots * load_vector(scale, g, offs_m, M)[:, None]
    pos, out = matches_tile(matches, g, offs_m, offs_n, M, N)
    has_pos = tl.max(tl.max(pos.to(tl.int32), 1), 0) > 0
    neg = tl.where(pos | out, float("-inf"), s)
    e, u, r, top, col_max, near = e_both(neg, neg, neg, LOG2E, offs_m < M, False)
    if WANT_X:
        store_stats(part_x, tile_n, g, G, offs_m, M, u, tl.sum(e, 1), s, pos, out, has_pos, 1)
    if WANT_Y:
        p = p_col_of(e, neg, LOG2E, r, top, col_max, near, col_max)
        col_max, total = finite_or(col_max, 0.0), tl.sum(p, 0)
        store_stats(part_y, tile_m, g, G, offs_n, N, col_max, total, s, pos, out, has_pos, 0)


@triton.jit
def ds_side(p, coef, stride, g, offs, L, pos, out, AXIS: tl.constexpr):
    """One direction's ds = w * ((p at negatives, p - t or the given value at positives) - u)."""
    base = coef + g.to(tl.int64) * L + offs
    inside = offs < L
    w = tl.expand_dims(tl.load(base + stride, mask=inside, other=0.0), AXIS)
    t = tl.expand_dims(tl.load(base + 2 * stride, mask=inside, other=0.0), AXIS)
    u = tl.expand_dims(tl.load(base + 3 * stride, mask=inside, other=0.0), AXIS)
    single = tl.expand_dims(tl.load(base + 4 * stride, mask=inside, other=2.0), AXIS)
    at_pos = tl.where(single <= 1.0, single + tl.zeros_like(p), p - t)
    ds = w * (tl.where(pos, at_pos, p) - u)
    return tl.where(out | (w == 0.0), 0.0, ds)


@triton.jit
def load_lse(coef, stride, g, offs, L, centre):
    """lse of the rows offs as a sum of two numbers; at the centre where it is -inf and outside."""
    base = coef + g.to(tl.int64) * L + offs
    high = tl.load(base, mask=offs < L, other=float("-inf"))
    low = tl.load(base + 5 * stride, mask=offs < L, other=0.0)
    return finite_or(high, centre), low


@triton.jit
def p_pair(s, high_a, low_a, high_b, low_b, centre):
    """exp(s - a) by rows and exp(s - b) by columns, a = high_a + low_a; one exp a score where every
    lse lies within 86 of the centre in base 2. Differences come first, so that nothing is lost at
    large s.

        e = exp(s - centre - a / 2 - b / 2);  p_row = e * exp(b / 2 - a / 2)
    """
    a = ((high_a - centre) + low_a) * LOG2E
    b = ((high_b - centre) + low_b) * LOG2E
    far = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    if far <= 86.0:
        e = tl.exp2(((s - centre) * LOG2E - 0.5 * a[:, None]) - 0.5 * b[None, :])
        p_row = e * tl.exp2(-0.5 * a)[:, None] * tl.exp2(0.5 * b)[None, :]
        p_col = e * tl.exp2(0.5 * a)[:, None] * tl.exp2(-0.5 * b)[None, :]
    else:
        p_row = tl.exp2(((s - high_a[:, None]) - low_a[:, None]) * LOG2E)
        p_col = tl.exp2(((s - high_b[None, :]) - low_b[None, :]) * LOG2E)
    return p_row, p_col


@triton.jit
def ds_kernel(
    x, y, scale, matches, coef_x, coef_y, w, part, inverse_peak, G, M, N, D,
    STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """W = scale * ds * inverse_peak of one tile, and the rows' sums of ds * dots.

    coef_x [6, G, M] and coef_y [6, G, N] are lse, weight, target, uniform, value at a single
    positive (2 if there is not one), and what rounding took from lse. Grid: tiles of s times G.
    """
    g, tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_tile(x, y, g, offs_m, offs_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
    row_scale = load_vector(scale, g, offs_m, M)[:, None]
    s = dots * row_scale
    pos, out = matches_tile(matches, g, offs_m, offs_n, M, N)
    first = tl.load(coef_x + g.to(tl.int64) * M + tile_m * BLOCK_M)
    centre = tl.where(tl.abs(first) < 1e30, first, 0.0)
    high_x, low_x = load_lse(coef_x, G * M, g, offs_m, M, centre)
    high_y, low_y = load_lse(coef_y, G * N, g, offs_n, N, centre)
    s_in = tl.where(out, float("-inf"), s)
    p_x, p_y = p_pair(s_in, high_x, low_x, high_y, low_y, centre)
    ds = ds_side(p_x, coef_x, G * M, g, offs_m, M, pos, out, 1)
    ds += ds_side(p_y, coef_y, G * N, g, offs_n, N, pos, out, 0)
    if STORE:
        ptrs = w + (g.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        value = ds * row_scale * tl.load(inverse_peak)
        tl.store(ptrs, value.to(w.dtype.element_ty), mask=inside)
    sums = tl.sum(ds * dots, 1)
    tl.store(part + (tile_n.to(tl.int64) * G + g) * M + offs_m, sums, mask=offs_m < M)


def _merged(part: torch.Tensor) -> torch.Tensor:
    """Statistics [6, G, L] fp64 of the tiles' shares [tiles, 8, G, L]."""
    lse = (part[:, 0:4:2].double() + part[:, 1:4:2]) / LOG2E_FP32
    return torch.cat([lse.logsumexp(0), part[:, 4:].double().sum(0)])


def _split(coef: torch.Tensor) -> torch.Tensor:
    """Coefficients [5, G, L] in fp32, and behind them what rounding took from lse, [6, G, L]."""
    low = (coef[:1] - coef[:1].float()).nan_to_num(0.0)  # inf - inf
    return torch.cat([coef, low]).float()


def fwd(x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, want_x, want_y):
    """stats_x [6, G, M], stats_y [6, G, N]; zeros where not wanted."""
    x, y = _pairs.unit(x, normalize)[0], _pairs.unit(y, normalize)[0]
    (G, M, D), N = x.shape, y.shape[1]
    stats_x, stats_y = (x.new_zeros((6, G, n), dtype=torch.float64) for n in (M, N))
    if want_x:
        stats_x[:2] = NEG_INF
    if want_y:
        stats_y[:2] = NEG_INF
    if G * M * N == 0:
        return stats_x, stats_y
    choice = _pairs.config(OP, "stats", x)
    block_m, block_n = choice["BLOCK_M"], choice["BLOCK_N"]
    per_row = 32 * (tiles(N, block_n) + tiles(N, block_m))
    cuts = _pairs.chunks(x, y, logit_scale, positives, ids_x, ids_y, ignore, per_row, block_m)
    for c in cuts:
        g, m = c.g1 - c.g0, c.m1 - c.m0
        part_x = stats_x.new_empty(
            (tiles(N, block_n), 8, g, m) if want_x else 0, dtype=torch.float32
        )
        part_y = stats_y.new_empty(
            (tiles(m, block_m), 8, g, N) if want_y else 0, dtype=torch.float32
        )
        stats_kernel[(g * tiles(m, block_m) * tiles(N, block_n),)](
            _pairs.matrix(c.x), _pairs.matrix(c.y), _pairs.vector(c.scale, x), c.matches,
            part_x, part_y, g, m, N, D, WANT_X=want_x, WANT_Y=want_y, **choice,
        )  # fmt: skip
        if want_x:
            c.rows(stats_x).copy_(_merged(part_x))
        if want_y:
            old = c.columns(stats_y)
            new = _merged(part_y)
            old.copy_(torch.cat([torch.logaddexp(old[:2], new[:2]), old[2:] + new[2:]]))
    return stats_x, stats_y


def bwd(coef_x, coef_y, x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, needs):
    """Gradients of (x, y, logit_scale [G, M]) where `needs`."""
    coef_x, coef_y = _split(coef_x), _split(coef_y)
    run = _pairs.Backward(OP, x, y, normalize, needs)
    peak = _pairs.peak_of(x, [coef_x[1], coef_y[1]], logit_scale)
    inverse = 1.0 / peak

    def write(grid, c, w, part, store, choice):
        g, m = c.g1 - c.g0, c.m1 - c.m0
        ds_kernel[grid](
            _pairs.matrix(c.x), _pairs.matrix(c.y), _pairs.vector(c.scale, x), c.matches,
            c.rows(coef_x).contiguous(), c.columns(coef_y).contiguous(), w, part, inverse,
            g, m, y.shape[1], x.shape[2], STORE=store, **choice,
        )  # fmt: skip

    dx, dy, sums = run.run(logit_scale, positives, ids_x, ids_y, ignore, peak, 1, write)
    return [t for t, need in zip((dx, dy, sums[0]), needs, strict=True) if need]
