"""sigmoid_loss on Triton: row sums of softplus(-z * s), one tile of s a program; see _pairs.py."""

import torch
import triton
import triton.language as tl

from . import _pairs
from ._args import reject_dtype, tiles
from ._pairs import dots_tile, load_vector, matches_tile, place

OP = "sigmoid_loss"


def reject(problem) -> list[str]:
    """Limits of these kernels."""
    return reject_dtype(problem)


@triton.jit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + 2 * atanh(e / (2 + e)), e = exp(-|v|): small values keep all
    their bits. The series in z = e / (2 + e) <= 1/3 ends where z^15 / 15 < 6e-9."""
    e = tl.exp(-tl.abs(v))
    z = e / (2.0 + e)
    q = z * z
    series = 1.0 / 11.0 + q * (1.0 / 13.0)
    series = 1.0 / 7.0 + q * (1.0 / 9.0 + q * series)
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * series))
    return tl.where(v > 0.0, v, 0.0) + 2.0 * z * series


@triton.jit
def fwd_kernel(
    x, y, scale, bias_ptr, matches, part, G, M, N, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(-z * s) of one tile, in part [tiles_n, G, M]. Grid: tiles of s, G."""
    g, tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_tile(x, y, g, offs_m, offs_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
    s = dots * load_vector(scale, g, offs_m, M)[:, None] + tl.load(bias_ptr)
    pos, out = matches_tile(matches, g, offs_m, offs_n, M, N)
    loss = tl.where(out, 0.0, softplus(tl.where(pos, -s, s)))
    base = part + (tile_n.to(tl.int64) * G + g) * M
    tl.store(base + offs_m, tl.sum(loss, 1), mask=offs_m < M)


@triton.jit
def ds_kernel(
    x, y, scale, bias_ptr, matches, dloss, w, part, inverse_peak, G, M, N, D,
    STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """W = scale * ds * inverse_peak of one tile, ds = dloss * (sigmoid(s) - match), and the rows'
    sums of ds * dots and of ds in part [tiles_n, 2, G, M]. Grid: tiles of s times G."""
    g, tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_tile(x, y, g, offs_m, offs_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
    row_scale = load_vector(scale, g, offs_m, M)[:, None]
    s = dots * row_scale + tl.load(bias_ptr)
    pos, out = matches_tile(matches, g, offs_m, offs_n, M, N)
    sigma = 1.0 / (1.0 + tl.exp(tl.where(pos, s, -s)))
    ds = load_vector(dloss, g, offs_m, M)[:, None] * tl.where(pos, -sigma, sigma)
    ds = tl.where(out, 0.0, ds)
    if STORE:
        ptrs = w + (g.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        value = ds * row_scale * tl.load(inverse_peak)
        tl.store(ptrs, value.to(w.dtype.element_ty), mask=inside)
    row = tile_n.to(tl.int64) * 2 * G + g
    tl.store(part + row * M + offs_m, tl.sum(ds * dots, 1), mask=offs_m < M)
    tl.store(part + (row + G) * M + offs_m, tl.sum(ds, 1), mask=offs_m < M)


def fwd(x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize):
    """Row sums of softplus(-z * s), [G, M] fp32."""
    x, y = _pairs.unit(x, normalize)[0], _pairs.unit(y, normalize)[0]
    (G, M, D), N = x.shape, y.shape[1]
    loss = x.new_zeros((G, M), dtype=torch.float32)
    if G * M * N == 0:
        return loss
    choice = _pairs.config(OP, "stats", x)
    block_m, block_n = choice["BLOCK_M"], choice["BLOCK_N"]
    cuts = _pairs.chunks(
        x, y, logit_scale, positives, ids_x, ids_y, False, 4 * tiles(N, block_n), block_m
    )
    for c in cuts:
        g, m = c.g1 - c.g0, c.m1 - c.m0
        part = loss.new_empty((tiles(N, block_n), g, m))
        fwd_kernel[(g * tiles(m, block_m) * tiles(N, block_n),)](
            _pairs.matrix(c.x), _pairs.matrix(c.y), _pairs.vector(c.scale, x), logit_bias,
            c.matches, part, g, m, N, D, **choice,
        )  # fmt: skip
        c.rows(loss).copy_(part.sum(0))
    return loss


def bwd(dloss, x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize, needs):
    """Gradients of (x, y, logit_scale [G, M], logit_bias [G, M]) where `needs`; dloss [G, M]."""
    run = _pairs.Backward(OP, x, y, normalize, needs)
    peak = _pairs.peak_of(x, [dloss], logit_scale)
    inverse = 1.0 / peak

    def write(grid, c, w, part, store, choice):
        g, m = c.g1 - c.g0, c.m1 - c.m0
        ds_kernel[grid](
            _pairs.matrix(c.x), _pairs.matrix(c.y), _pairs.vector(c.scale, x), logit_bias,
            c.matches, _pairs.vector(c.rows(dloss), x), w, part, inverse,
            g, m, y.shape[1], x.shape[2], STORE=store, **choice,
        )  # fmt: skip

    dx, dy, sums = run.run(logit_scale, positives, ids_x, ids_y, False, peak, 2, write)
    grads = (dx, dy, sums[0].clone(), sums[1].clone())
    return [t for t, need in zip(grads, needs, strict=True) if need]
