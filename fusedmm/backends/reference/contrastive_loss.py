"""contrastive_loss in plain torch: per-row and per-column statistics of s, and their backward.

Statistics, not losses, so that blocks of s (tiles, ranks) can be merged: see fusedmm/ops/pairs.py.
Positives are kept apart from negatives, so that log1p(neg / pos) stays exact for well-fitted pairs.
"""

import torch
from torch import Tensor

from .softmax import full_precision, upcast

NEG_INF = float("-inf")


def reject(problem) -> list[str]:
    """The reference runs everything."""
    return []


def unit(t: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of unit length in fp32 (or fp64), and 1 / norm; untouched without `normalize`."""
    (t,) = upcast(t)
    if not normalize:
        return t, None
    inv = 1.0 / t.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return t * inv, inv


def dots(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """<x_m, y_n> [G, M, N]; scaled afterwards, so that forward and backward get the same bits."""
    return unit(x, normalize)[0] @ unit(y, normalize)[0].mT


def unit_bwd(dt: Tensor, t: Tensor, inv: Tensor | None) -> Tensor:
    """Gradient through `unit`: dt projected off t, over the norm."""
    return dt if inv is None else inv * (dt - t * (t * dt).sum(-1, keepdim=True))


def matches(
    positives: Tensor | None, ids_x: Tensor | None, ids_y: Tensor | None, ignore: bool, s: Tensor
) -> tuple[Tensor, Tensor]:
    """pos, out [G, M, N] bool: entries that are targets, entries outside the denominator."""
    N = s.shape[-1]
    pos = torch.zeros_like(s, dtype=torch.bool)
    out = torch.zeros_like(pos)
    if positives is not None:
        pos = positives[..., None] == torch.arange(N, device=s.device)
    if ids_x is not None:
        same = ids_x[..., :, None] == ids_y[..., None, :]
        out = same & ~pos if ignore else out
        pos = pos if ignore else pos | same
    return pos, out


@full_precision
def fwd(
    x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, want_x, want_y
) -> tuple[Tensor, Tensor]:
    """stats_x [6, G, M], stats_y [6, G, N] fp64: lse of negatives, lse / sum / count of positives,
    sum / count of all. logit_scale is [G, M] or [1]; zeros where not wanted."""
    s = logit_scale[..., None] * dots(x, y, normalize)
    pos, out = matches(positives, ids_x, ids_y, ignore, s)
    return row_stats(s, pos, out), row_stats(s.mT, pos.mT, out.mT)


def row_stats(s: Tensor, pos: Tensor, out: Tensor) -> Tensor:
    """Statistics [6, G, M] of the rows of s."""
    neg = _logsumexp(s.masked_fill(pos | out, NEG_INF))
    lse_pos = _logsumexp(s.masked_fill(~pos, NEG_INF))
    sum_pos = s.masked_fill(~pos, 0.0).sum(-1, dtype=torch.float64)
    total = s.masked_fill(out, 0.0).sum(-1, dtype=torch.float64)
    n_pos, n_all = (t.sum(-1, dtype=torch.float64) for t in (pos, ~out))
    return torch.stack([neg, lse_pos, sum_pos, n_pos, total, n_all])


def _logsumexp(s: Tensor) -> Tensor:
    """fp64, though the exponentials are those of s's dtype."""
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], NEG_INF, dtype=torch.float64)
    top = s.amax(-1)
    top = torch.where(top == NEG_INF, 0.0, top)
    return top.double() + torch.exp(s - top[..., None]).sum(-1, dtype=torch.float64).log()


@full_precision
def bwd(
    coef_x, coef_y, x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, needs
) -> list[Tensor]:
    """Gradients of (x, y, logit_scale [G, M]) where `needs`.

    coef [5, G, rows] fp64: lse, weight w, target t, uniform u, and g for single positives (else 2):
    ds = w * (p - u) on negatives and w * ((p - t or g) - u) on positives, per direction.
    """
    xh, inv_x = unit(x, normalize)
    yh, inv_y = unit(y, normalize)
    scale = logit_scale[..., None]  # [G, M, 1] or [1, 1]
    products = xh @ yh.mT
    s = scale * products
    pos, out = matches(positives, ids_x, ids_y, ignore, s)
    ds = row_ds(s, pos, out, coef_x) + row_ds(s.mT, pos.mT, out.mT, coef_y).mT
    dx = unit_bwd(scale * (ds @ yh), xh, inv_x)
    dy = unit_bwd((scale * ds).mT @ xh, yh, inv_y)
    grads = (dx.to(x.dtype), dy.to(y.dtype), (ds * products).sum(-1))
    return [g for g, need in zip(grads, needs, strict=True) if need]


def row_ds(s: Tensor, pos: Tensor, out: Tensor, coef: Tensor) -> Tensor:
    """Gradient of s from the losses of its rows."""
    lse, w, t, u, g = (c[..., None] for c in coef)
    p = torch.exp(s - torch.where(lse == NEG_INF, 0.0, lse))
    at_pos = torch.where(g <= 1.0, g, p - t)
    ds = w * (torch.where(pos, at_pos, p) - u)
    return torch.where(out | (w == 0.0), 0.0, ds).to(s.dtype)
