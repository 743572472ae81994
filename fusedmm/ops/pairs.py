"""Arithmetic on the O(M + N) statistics of a pair loss: loss per row, backward coefficients, mean.

A statistic holds, per row, [lse of negatives, lse of positives, sum of positive s, number of
positives, sum of all s, number of all] in fp64; blocks of columns merge by `merge`.
"""

from types import ModuleType

import torch
from torch import Tensor

from .. import check

TILE = 96  # rows and columns of the cpu kernels' tiles
SHORT_TILE = 16 + TILE * TILE // 2  # floats of a kept tile of bf16 inputs: csrc/pair_loss.h
CHUNK = 64  # rows that a chunk of the cuda kernels has at least: PairTile's, csrc/cuda/tuning.h
KEEP_BYTES = 64 << 20  # of raw products kept for a backward
KEEP_ROWS = 1024  # M and N from which on they are kept
KEEP_WIDTH = 512  # D from which on the cpu kernels keep them
FUSED_WIDTH = 256  # D up to which the cuda kernels store no product of 16-bit types


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Statistics [6, ...] of the union of two disjoint blocks."""
    return torch.cat([torch.logaddexp(a[:2], b[:2]), a[2:] + b[2:]])


def row_loss(stats: Tensor, label_smoothing: float, module: ModuleType | None = None) -> Tensor:
    """lse - target . s per row; 0 for a row without positives. A backend `module` may have its own.

    One positive and no smoothing: log1p(exp(neg - pos)), exact also when the loss is 1e-7.
    """
    if hasattr(module, "row_loss"):
        return module.row_loss(stats, label_smoothing)
    neg, pos, sum_pos, n_pos, total, n_all = stats
    single = torch.nn.functional.softplus(neg - pos, threshold=88.0)
    loss = torch.logaddexp(neg, pos) - (1.0 - label_smoothing) * sum_pos / n_pos
    if label_smoothing:
        loss = loss - label_smoothing * total / n_all
    else:
        loss = torch.where(n_pos == 1.0, single, loss)
    return torch.where(n_pos > 0.0, loss, 0.0)


def coefficients(
    stats: Tensor, dloss: Tensor, label_smoothing: float, module: ModuleType | None = None
) -> Tensor:
    """[5, ...]: lse, weight, target, uniform, and the gradient at a single positive (else 2).

    ds = weight * (p - uniform) on negatives, weight * (p - target - uniform) on positives; where
    there is one positive, p - target is taken as target's complement, without cancellation.
    """
    if hasattr(module, "coefficients"):
        return module.coefficients(stats, dloss, label_smoothing)
    neg, pos, _, n_pos, _, n_all = stats
    weight = torch.where(n_pos > 0.0, dloss, 0.0)
    # Rows without weight get p = 0, so that no kernel multiplies 0 by an overflowed exp.
    lse = torch.where(weight == 0.0, float("inf"), torch.logaddexp(neg, pos))
    target = (1.0 - label_smoothing) / n_pos.clamp_min(1.0)
    uniform = label_smoothing / n_all.clamp_min(1.0)
    single = torch.where(n_pos == 1.0, label_smoothing - torch.exp(neg - lse), 2.0)
    return torch.stack([lse, weight, target, uniform, single])


def dots_tile(dtype: torch.dtype) -> int:
    """Floats of a tile of products that the cpu kernels keep."""
    return SHORT_TILE if dtype == torch.bfloat16 else TILE * TILE


def kept_dots(name: str, asked, *inputs: Tensor) -> int:
    """How many floats of raw products backend `name` leaves for the backward.

    KEEP_BYTES at most: the cpu kernels tiles, as many of each row of tiles, where reading a product
    costs less than D multiplications, in bf16 as 16-bit integers; the cuda kernels rows, of which
    they use whole chunks, where products pass through memory anyway. Nothing if no input requires a
    gradient.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return 0
    if min(asked.M, asked.N) < KEEP_ROWS:  # last: an export of sizes that vary asks nothing
        return 0
    if name == "cpu" and asked.D >= KEEP_WIDTH:
        whole = asked.G * -(-asked.M // TILE)
        count = whole * -(-asked.N // TILE)
        size = dots_tile(asked.dtype)
    elif name == "cuda" and (asked.dtype == torch.float32 or asked.D > FUSED_WIDTH):
        count, size, whole = asked.G * asked.M, 8 * -(-asked.N // 8), CHUNK
    else:
        return 0
    return size * min(count, KEEP_BYTES // (4 * size * whole) * whole)


def given(dots: Tensor) -> tuple[Tensor, ...]:
    """The kept products as a backend's last argument, if there are any."""
    return (dots,) if dots.numel() else ()


def total(parts: list[tuple[Tensor, Tensor]], reduction: str, every: bool) -> Tensor:
    """Of directions (losses, stats) the mean: of their sums, or of their means over rows that have
    a positive, `every` one, or by count; 0 if none has."""
    sums = [loss.sum() for loss, _ in parts]
    n = len(parts)
    if reduction == "mean" and every:  # as many rows in either direction
        n *= max(parts[0][0].numel(), 1)
    elif reduction == "mean":
        counts = [(stats[3] > 0.0).sum().clamp_min(1) for _, stats in parts]
        sums = [s / count for s, count in zip(sums, counts, strict=True)]
    joint = sums[0] + sums[1] if len(sums) == 2 else sums[0]
    return joint / n if n > 1 else joint


def as_rows(logit_scale: Tensor | float, x: Tensor, G: int, M: int) -> Tensor:
    """logit_scale as [1] or [G, M] in the accumulation dtype of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(logit_scale, Tensor):
        return torch.full((1,), float(logit_scale), dtype=dtype, device=x.device)
    shape = (1,) if logit_scale.numel() == 1 else (G, M)
    scale = logit_scale if logit_scale.dtype == dtype else logit_scale.to(dtype)
    return scale if scale.shape == shape else scale.reshape(shape)


def range_of(positives: Tensor | None) -> tuple[int, int]:
    """Least and greatest index; an empty range on a GPU, where looking would stall the stream and a
    row with an index outside has no match."""
    if positives is None or positives.device.type != "cpu" or positives.numel() == 0:
        return 0, -1
    low, high = positives.aminmax()
    return int(low), int(high)


def check_positives(low: int, high: int, N: int) -> None:
    """ValueError on an index outside [0, N)."""
    if low < 0 or high >= N:
        got = low if low < 0 else high
        raise check.bad("contrastive_loss", "positives", f"indices in [0, {N})", got)


def default_positives(G: int, M: int, device: torch.device) -> Tensor:
    """Row i matches column i, [G, M] without storage of its own per problem."""
    return torch.arange(M, device=device).expand(G, M)
