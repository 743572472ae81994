"""What both pair losses share: tiles of dot products and matches, the two products of the backward,
unit rows, and the split of the work into chunks whose workspace is bounded.

A loss's backward writes W = logit_scale * ds of a chunk once; dx = W @ y and dy = W.T @ x follow:
three products over s. Chunks add to dy in order, so the result does not depend on scheduling.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning import lookup
from ._args import padded, tiles
from ._tile import dot_tile

WORKSPACE = 64 * 2**20  # bytes of a chunk's partial sums or of its W


class Matrix(NamedTuple):
    """A [G, rows, width] tensor with any strides (elements)."""

    ptr: Any
    g: Any
    m: Any
    d: Any


class Vector(NamedTuple):
    """A [G, rows] tensor, broadcast dimensions with stride 0; HAS is false without one."""

    ptr: Any
    g: Any
    m: Any
    HAS: Any


class Matches(NamedTuple):
    """Which entries are positives, and with IGNORE which ones are left out."""

    positives: Vector
    ids_x: Vector
    ids_y: Vector
    IGNORE: Any


def matrix(t: Tensor) -> Matrix:
    return Matrix(t, *t.stride())


def vector(t: Tensor | None, like: Tensor) -> Vector:
    if t is None:
        return Vector(like, 0, 0, tl.constexpr(False))
    return Vector(t, *t.stride(), tl.constexpr(True))


@triton.jit
def place(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """g, tile_m, tile_n of a program; tiles of m run fastest, so that a strip of y stays cached."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    return pid // (tiles_m * tiles_n), pid % tiles_m, pid // tiles_m % tiles_n


@triton.jit
def load_vector(t, g, offs, L):
    """Entries offs of row g, 0 outside."""
    ptrs = t.ptr + g.to(tl.int64) * t.g + offs.to(tl.int64) * t.m
    return tl.load(ptrs, mask=offs < L, other=0)


@triton.jit
def load_block(ptr, stride_m, stride_d, offs_m, offs_d, M, D):
    """[BLOCK_M, BLOCK_D] of a matrix, 0 outside [M, D]."""
    ptrs = ptr + offs_m[:, None].to(tl.int64) * stride_m + offs_d[None, :].to(tl.int64) * stride_d
    return tl.load(ptrs, mask=(offs_m < M)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _products(
    a_ptr, b_ptr, a_m, a_k, b_k, b_n, offs_m, offs_n, M, N, K, start, end, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products start to end of matmul_tile, in one sum."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(start, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        a = load_block(a_ptr, a_m, a_k, offs_m, offs_k, M, K)
        if ROWS:
            b = tl.trans(load_block(b_ptr, b_n, b_k, offs_n, offs_k, N, K))
        else:
            b = load_block(b_ptr, b_k, b_n, offs_k, offs_n, K, N)
        acc += dot_tile(a, b)
    return acc


@triton.jit
def matmul_tile(
    a_ptr, b_ptr, a_m, a_k, b_k, b_n, offs_m, offs_n, M, N, K, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """a [M, K] @ b [K, N] in fp32, [BLOCK_M, BLOCK_N]; 0 outside [M, N]. ROWS: b's columns are rows
    in memory. fp32 factors: sums of 128 products, added, for roundings grow with their number."""
    if b_ptr.dtype.element_ty == tl.float32:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, 128):
            acc += _products(
                a_ptr, b_ptr, a_m, a_k, b_k, b_n, offs_m, offs_n, M, N, K,
                k0, tl.minimum(k0 + 128, K), BLOCK_M, BLOCK_N, BLOCK_K, ROWS,
            )  # fmt: skip
        return acc
    return _products(
        a_ptr, b_ptr, a_m, a_k, b_k, b_n, offs_m, offs_n, M, N, K, 0, K,
        BLOCK_M, BLOCK_N, BLOCK_K, ROWS,
    )  # fmt: skip


@triton.jit
def dots_tile(
    x, y, g, offs_m, offs_n, M, N, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x @ y.T of problem g in fp32, [BLOCK_M, BLOCK_N]; 0 outside [M, N]."""
    x_ptr = x.ptr + g.to(tl.int64) * x.g
    y_ptr = y.ptr + g.to(tl.int64) * y.g
    return matmul_tile(
        x_ptr, y_ptr, x.m, x.d, y.d, y.m, offs_m, offs_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D, True
    )


@triton.jit
def matches_tile(t, g, offs_m, offs_n, M, N):
    """pos, out [BLOCK_M, BLOCK_N]: targets, and entries outside the denominator or the matrix."""
    outside = ((offs_m >= M)[:, None]) | ((offs_n >= N)[None, :])
    pos = outside & False
    out = outside
    if t.positives.HAS:
        target = load_vector(t.positives, g, offs_m, M)
        pos = (target[:, None] == offs_n[None, :]) & (~outside)
    if t.ids_x.HAS:
        same = load_vector(t.ids_x, g, offs_m, M)[:, None]
        same = (same == load_vector(t.ids_y, g, offs_n, N)[None, :]) & (~outside)
        if t.IGNORE:
            out = outside | (same & (~pos))
        else:
            pos = pos | same
    return pos, out


@triton.jit
def product_kernel(
    a, b, out, peak, rows, width, inner, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[g] = peak * a[g] @ b[g], plus out with ACCUMULATE. Grid: tiles of out times G."""
    g, tile_m, tile_n = place(tl.program_id(0), rows, width, BLOCK_M, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = a.ptr + g.to(tl.int64) * a.g
    b_ptr = b.ptr + g.to(tl.int64) * b.g
    acc = matmul_tile(
        a_ptr, b_ptr, a.m, a.d, b.m, b.d, offs_m, offs_n, rows, width, inner,
        BLOCK_M, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    acc *= tl.load(peak)
    ptrs = out.ptr + g.to(tl.int64) * out.g + offs_m[:, None].to(tl.int64) * out.m
    ptrs += offs_n[None, :].to(tl.int64) * out.d
    inside = (offs_m < rows)[:, None] & (offs_n < width)[None, :]
    if ACCUMULATE:
        acc += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, acc.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def unit_kernel(x, inv_ptr, out, M, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = x / max(|x|, 1e-12) by rows, inv = that factor. Grid: tiles of BLOCK_M rows times G."""
    pid = tl.program_id(0)
    g = pid // tl.cdiv(M, BLOCK_M)
    offs_m = pid % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr = x.ptr + g.to(tl.int64) * x.g
    out_ptr = out.ptr + g.to(tl.int64) * out.g
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        t = load_block(x_ptr, x.m, x.d, offs_m, offs_d, M, D).to(tl.float32)
        squares += t * t
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    inv = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
    tl.store(inv_ptr + g.to(tl.int64) * M + offs_m, inv, mask=offs_m < M)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        t = load_block(x_ptr, x.m, x.d, offs_m, offs_d, M, D).to(tl.float32) * inv[:, None]
        ptrs = out_ptr + offs_m[:, None].to(tl.int64) * out.m + offs_d[None, :]
        inside = (offs_m < M)[:, None] & (offs_d < D)[None, :]
        tl.store(ptrs, t.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def unit_bwd_kernel(x, inv_ptr, dunit, dx, M, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx = inv * (dunit - u * <u, dunit>), u = inv * x. Grid: tiles of BLOCK_M rows times G."""
    pid = tl.program_id(0)
    g = pid // tl.cdiv(M, BLOCK_M)
    offs_m = pid % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr = x.ptr + g.to(tl.int64) * x.g
    du_ptr = dunit.ptr + g.to(tl.int64) * dunit.g
    dx_ptr = dx.ptr + g.to(tl.int64) * dx.g
    inv = tl.load(inv_ptr + g.to(tl.int64) * M + offs_m, mask=offs_m < M, other=0.0)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        u = load_block(x_ptr, x.m, x.d, offs_m, offs_d, M, D).to(tl.float32) * inv
        products += u * load_block(du_ptr, dunit.m, dunit.d, offs_m, offs_d, M, D)
    along = tl.sum(products, 1)[:, None]
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        u = load_block(x_ptr, x.m, x.d, offs_m, offs_d, M, D).to(tl.float32) * inv
        du = load_block(du_ptr, dunit.m, dunit.d, offs_m, offs_d, M, D)
        ptrs = dx_ptr + offs_m[:, None].to(tl.int64) * dx.m + offs_d[None, :]
        inside = (offs_m < M)[:, None] & (offs_d < D)[None, :]
        tl.store(ptrs, (inv * (du - u * along)).to(dx.ptr.dtype.element_ty), mask=inside)


def unit(t: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of unit length in the dtype of t, and 1 / norm in fp32; t itself if not `normalize`."""
    if not normalize:
        return t, None
    G, M, D = t.shape
    out = t.new_empty(t.shape)
    inv = t.new_empty((G, M), dtype=torch.float32)
    if G * M:
        unit_kernel[(G * tiles(M, 16),)](
            matrix(t), inv, matrix(out), M, D, BLOCK_M=16, BLOCK_D=min(128, padded(D))
        )
    return out, inv


def unit_bwd(dunit: Tensor, t: Tensor, inv: Tensor | None) -> Tensor:
    """Gradient through `unit`; dunit is fp32 if inv is given."""
    if inv is None:
        return dunit
    G, M, D = t.shape
    dt = t.new_empty(t.shape)
    if G * M:
        unit_bwd_kernel[(G * tiles(M, 16),)](
            matrix(t), inv, matrix(dunit), matrix(dt), M, D,
            BLOCK_M=16, BLOCK_D=min(128, padded(D)),
        )  # fmt: skip
    return dt


class Chunk(NamedTuple):
    """Rows [m0, m1) of problems [g0, g1), and the tensors cut to them."""

    g0: int
    g1: int
    m0: int
    m1: int
    x: Tensor
    y: Tensor
    scale: Tensor
    matches: Matches

    def rows(self, t: Tensor) -> Tensor:
        """The part of t [..., G, M] that belongs to this chunk."""
        return t[..., self.g0 : self.g1, self.m0 : self.m1]

    def columns(self, t: Tensor) -> Tensor:
        """The part of t [..., G, N] that belongs to this chunk."""
        return t[..., self.g0 : self.g1, :]


def chunks(
    x, y, logit_scale, positives, ids_x, ids_y, ignore: bool, bytes_per_row: int, block: int
) -> Iterator[Chunk]:
    """Cuts G problems of M rows so that a chunk's workspace stays near WORKSPACE."""
    G, M, _ = x.shape
    fits = max(1, WORKSPACE // max(bytes_per_row, 1))
    step_g = max(1, fits // max(M, 1))
    step_m = M if fits >= M else max(block, fits // block * block)
    scale = logit_scale.reshape(-1, logit_scale.shape[-1]).expand(G, M)
    for g0 in range(0, G, step_g):
        for m0 in range(0, M, step_m):
            g1, m1 = min(g0 + step_g, G), min(m0 + step_m, M)
            rows = slice(g0, g1), slice(m0, m1)
            cut = Matches(
                vector(None if positives is None else positives[rows], x),
                vector(None if ids_x is None else ids_x[rows], x),
                vector(None if ids_y is None else ids_y[g0:g1], x),
                tl.constexpr(ignore),
            )
            yield Chunk(g0, g1, m0, m1, x[rows], y[g0:g1], scale[rows], cut)


def config(op: str, kernel: str, x: Tensor) -> dict[str, int]:
    """The table's tile, its depth no wider than D."""
    choice = lookup.tile(op, kernel, x.dtype, padded(x.shape[-1]), x.device.index)
    return choice | dict(BLOCK_D=min(choice["BLOCK_D"], padded(x.shape[-1])))


def product(op: str, a: Tensor, b: Tensor, out: Tensor, peak: Tensor, accumulate: bool) -> None:
    """out = peak * a @ b, or added to out; a [G, rows, inner], b [G, inner, width]."""
    (G, rows, inner), width = a.shape, b.shape[2]
    choice = lookup.tile(op, "gemm", b.dtype, padded(width), b.device.index)
    programs = G * tiles(rows, choice["BLOCK_M"]) * tiles(width, choice["BLOCK_N"])
    product_kernel[(programs,)](
        matrix(a), matrix(b), matrix(out), peak, rows, width, inner,
        ACCUMULATE=accumulate, **choice,
    )  # fmt: skip


class Backward:
    """Gradients of x, y and the rows' sums, filled chunk by chunk.

    `write(chunk, w, sums, inverse_peak)` launches the loss's own kernel: W [g, m, N] of the chunk
    times inverse_peak, and per column tile the rows' sums [tiles_n, sums, g, m].
    """

    def __init__(self, op: str, x: Tensor, y: Tensor, normalize: bool, needs: list[bool]):
        self.op, self.raw_x, self.raw_y = op, x, y
        self.need_x, self.need_y = needs[0], needs[1]
        self.x, self.inv_x = unit(x, normalize)
        self.y, self.inv_y = unit(y, normalize)

    def run(self, logit_scale, positives, ids_x, ids_y, ignore, peak, sums: int, write):
        """dx, dy (None where not needed) and the rows' sums [sums, G, M]."""
        x, y, op = self.x, self.y, self.op
        (G, M, _), N = x.shape, y.shape[1]
        totals = x.new_zeros((sums, G, M), dtype=torch.float32)
        dx = self._buffer(x, self.inv_x is not None) if self.need_x else None
        if G * M * N == 0:
            zeros = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, y))
            return *zeros, totals
        choice = config(op, "ds", x)
        block_n = choice["BLOCK_N"]
        cuts = list(
            chunks(x, y, logit_scale, positives, ids_x, ids_y, ignore,
                   N * x.element_size(), choice["BLOCK_M"])
        )  # fmt: skip
        split = cuts[0].m1 < M
        dy = self._buffer(y, split or self.inv_y is not None) if self.need_y else None
        products = self.need_x or self.need_y
        for c in cuts:
            g, m = c.g1 - c.g0, c.m1 - c.m0
            w = x.new_empty((g, m, N) if products else (0, 0, 0))
            part = totals.new_empty((tiles(N, block_n), sums, g, m))
            programs = g * tiles(m, choice["BLOCK_M"]) * tiles(N, block_n)
            write((programs,), c, w, part, products, choice)
            c.rows(totals).copy_(part.sum(0))
            if self.need_x:
                product(op, w, c.y, dx[c.g0 : c.g1, c.m0 : c.m1], peak, False)
            if self.need_y:
                product(op, w.mT, c.x, dy[c.g0 : c.g1], peak, c.m0 > 0)
        if dx is not None:
            dx = unit_bwd(dx, self.raw_x, self.inv_x)
        if dy is not None:
            dy = unit_bwd(dy, self.raw_y, self.inv_y).to(y.dtype)
        return dx, dy, totals

    @staticmethod
    def _buffer(like: Tensor, wide: bool) -> Tensor:
        return like.new_empty(like.shape, dtype=torch.float32 if wide else like.dtype)


def peak_of(x: Tensor, weights: list[Tensor], logit_scale: Tensor) -> Tensor:
    """A number near max |W|, [1]: fp16 would flush W to zero without it; 1 for other types."""
    weights = [w for w in weights if w.numel()]
    if x.dtype != torch.float16 or not weights or not logit_scale.numel():
        return torch.ones(1, dtype=torch.float32, device=x.device)
    most = torch.stack([w.nan_to_num(0.0, 0.0, 0.0).abs().amax() for w in weights])
    peak = most.sum() * logit_scale.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return torch.where(peak > 0.0, peak, 1.0).reshape(1)
