"""What an attention looked at, without its M x N map: top links, mass received, entropy per token.

From queries, keys and the natural-log lse that the attention returned, in tiles of query rows and
key columns; memory O(M * k + N). For analysis: no gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import check

# Rows and columns of one tile of p, 2 MiB in fp32; heads are taken one at a time.
_ROWS, _COLS = 512, 1024


def attention_links(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    n: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The n keys each query attends to most, and their weights.

        p = torch.exp(scale * q @ k.mT - lse[..., None])        # [B, H, M, N], never stored
        weights, keys = p.sort(-1, descending=True, stable=True)
        weights, keys = weights[..., :n], keys[..., :n]

    Args:
        q: [B, H, M, D] floating; k: [B, H, N, D].
        lse: [B, H, M], as returned by co_attention or bi_attention with return_lse=True. For the
            other direction of bi_attention swap the streams: (qk_y, qk_x, lse_y).
        n: how many, 1 to N.
        mask: [B, N] bool, True = keep, as given to the attention.
        scale: as given to the attention; default D ** -0.5.
    Returns: weights [B, H, M, n] fp32, descending, and keys [B, H, M, n] int64; equal weights by
        lowest key. Attentions with bias, clamp or dropout are not covered.
    Memory: O(M * n), one tile.
    Raises: ValueError, bad shape, dtype, device or n.
    """
    op = "attention_links"
    scale = _validate(op, q, k, lse, mask, scale)
    B, H, M, _ = q.shape
    check.integer(op, "n", n, 1, k.shape[2], "the rows of k")
    weights = torch.zeros(B, H, M, n, dtype=torch.float32, device=q.device)
    keys = torch.zeros(B, H, M, n, dtype=torch.int64, device=q.device)
    for b, h, rows in _blocks(q):
        best = weights.new_zeros((rows.stop - rows.start, 0))
        at = best.long()
        for cols, p in _tiles(q[b, h], k[b, h], lse[b, h], mask, b, rows, scale):
            index = torch.arange(cols.start, cols.stop, device=q.device).expand_as(p)
            # Best so far come first: the stable sort keeps the lower key of equal weights.
            best, order = torch.cat([best, p], 1).sort(dim=1, descending=True, stable=True)
            best, order = best[:, :n], order[:, :n]
            at = torch.cat([at, index], 1).gather(1, order)
        weights[b, h, rows], keys[b, h, rows] = best, at
    return weights, keys


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The attention mass each key receives from all queries: p.sum(-2), [B, H, N] fp32.

    Args and limits: as in attention_links. The masses of a head sum to the number of queries.
    Memory: O(N), one tile.
    """
    scale = _validate("attention_received", q, k, lse, mask, scale)
    mass = torch.zeros(*k.shape[:3], dtype=torch.float32, device=q.device)
    for b, h, rows in _blocks(q):
        for cols, p in _tiles(q[b, h], k[b, h], lse[b, h], mask, b, rows, scale):
            mass[b, h, cols] += p.sum(0)
    return mass


def attention_entropy(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The entropy in nats of each query's attention: -(p * p.log()).sum(-1), [B, H, M] fp32.

    Args and limits: as in attention_links. log(N) is uniform attention, 0 a single key.
    Memory: O(M), one tile.
    """
    scale = _validate("attention_entropy", q, k, lse, mask, scale)
    entropy = torch.zeros(*q.shape[:3], dtype=torch.float32, device=q.device)
    for b, h, rows in _blocks(q):
        for _, p in _tiles(q[b, h], k[b, h], lse[b, h], mask, b, rows, scale):
            entropy[b, h, rows] -= torch.special.xlogy(p, p).sum(1)
    return entropy


def _validate(op: str, q, k, lse, mask, scale) -> float:
    for arg, t, dims in (("q", q, "B, H, M, D"), ("k", k, "B, H, N, D"), ("lse", lse, "B, H, M")):
        check.floating(op, arg, t)
        check.ndim(op, arg, t, dims)
    B, H, M, D = q.shape
    check.shape(op, "k", k, (B, H, k.shape[2], D), "q")
    check.shape(op, "lse", lse, (B, H, M), "q")
    check.same(op, ("q", q), ("k", k))
    check.device(op, ("q", q), ("lse", lse))
    check.mask(op, "mask", mask, (B, k.shape[2]), ("k", k))
    if scale is None:
        return D**-0.5
    check.number(op, "scale", scale)
    return scale


def _blocks(q: Tensor) -> Iterator[tuple[int, int, slice]]:
    B, H, M, _ = q.shape
    for b in range(B):
        for h in range(H):
            for m in range(0, M, _ROWS):
                yield b, h, slice(m, min(m + _ROWS, M))


@torch.no_grad()
def _tile(q: Tensor, k: Tensor, lse: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """p [rows, cols] fp32; 0 for keys not kept and for queries that attend to nothing."""
    s = (q.float() * scale) @ k.float().T
    p = torch.exp(s - torch.where(lse == float("-inf"), float("inf"), lse.float())[:, None])
    return p if keep is None else p.masked_fill(~keep, 0.0)


def _tiles(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, b: int, rows: slice, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    for n in range(0, k.shape[0], _COLS):
        cols = slice(n, min(n + _COLS, k.shape[0]))
        keep = None if mask is None else mask[b, cols]
        yield cols, _tile(q[rows], k[cols], lse[rows], keep, scale)
