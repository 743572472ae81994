"""contrastive_loss of x against itself at half the work: only the upper triangle of s is visited.

    level w = BLOCK, 2 BLOCK, 4 BLOCK, ...:  rows [2jw, 2jw + w) against rows [2jw + w, 2jw + 2w)

Each level is one batched call of a backend's kernel, whose row statistics go to the first half and
whose column statistics go to the second; the blocks on the diagonal are dense. Matches are
symmetric, so the losses of columns are those of rows. Two passes over s, forward and backward.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from .. import check
from ..backends.reference import contrastive_loss as reference
from ..backends.reference.softmax import full_precision
from . import pairs

BLOCK = 64
# Entries of s in the dense blocks that are held at a time, 4 MiB in fp32.
_DENSE = 2**20


def mutual(positives: Tensor) -> Tensor:
    """[G, M] bool: rows that are not their own match, and whose match, if here, points back."""
    G, M = positives.shape
    own = pairs.default_positives(G, M, positives.device)
    here = (positives >= 0) & (positives < M)
    back = positives.gather(1, positives.clamp(0, max(M - 1, 0)))
    return torch.where(here, (back == own) & (positives != own), True)


def check_mutual(positives: Tensor | None) -> None:
    """ValueError on a match that does not point back; on a GPU such a row has none."""
    if positives is None or positives.device.type != "cpu":
        return
    odd = (~mutual(positives)).nonzero()
    if len(odd):
        g, m = odd[0].tolist()
        got = f"positives[{m}] = {int(positives[g, m])}"
        expected = "positives[positives[i]] == i != positives[i], for exclude_self"
        raise check.bad("contrastive_loss", "positives", expected, got)


def fwd(
    module: ModuleType, x: Tensor, scale: Tensor, positives: Tensor | None, ids: Tensor | None,
    ignore: bool, normalize: bool,
) -> Tensor:  # fmt: skip
    """Statistics [6, G, M] of the rows of x against all others, see backends/reference."""
    G, M, _ = x.shape
    positives = _symmetric(positives)
    stats = x.new_zeros((6, G, M), dtype=torch.float64)
    for at in _diagonal(G, M):
        s, pos, out = _dense(at, x, scale, positives, ids, ignore, normalize)[3:]
        at.put(stats, reference.row_stats(s, pos, out))
    for first, second in _levels(M):
        block_x, block_y = module.fwd(
            *_both(first, second, x), scale, _local(first, second, positives),
            *_both(first, second, ids), ignore, normalize, True, True,
        )  # fmt: skip
        for at, block in ((first, block_x), (second, block_y)):
            at.put(stats, block, pairs.merge)
    return stats


def bwd(
    module: ModuleType, coef: Tensor, x: Tensor, scale: Tensor, positives: Tensor | None,
    ids: Tensor | None, ignore: bool, normalize: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of (x, scale [G, M]) where `needs`, of the coefficients [5, G, M]."""
    G, M, _ = x.shape
    positives = _symmetric(positives)
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.zeros_like(x, dtype=total)
    dscale = x.new_zeros((G, M), dtype=total)
    for at in _diagonal(G, M):
        d, ds = _dense_bwd(at, coef, x, scale, positives, ids, ignore, normalize)
        at.put(dx[None], d[None], torch.add)
        at.put(dscale[None], ds[None], torch.add)
    for first, second in _levels(M):
        d_first, d_second, ds = module.bwd(
            first.take(coef, 2), second.take(coef, 2), *_both(first, second, x), scale,
            _local(first, second, positives), *_both(first, second, ids), ignore, normalize,
            [True, True, True],
        )  # fmt: skip
        for at, block in ((first, d_first), (second, d_second)):
            at.put(dx[None], block[None].to(total), torch.add)
        first.put(dscale[None], ds[None], torch.add)
    return [t for t, need in zip((dx.to(x.dtype), dscale), needs, strict=True) if need]


class Blocks:
    """Every `step`-th block of `width` rows from `start`, `count` of them, of each problem."""

    def __init__(self, start: int, step: int, width: int, count: int) -> None:
        self.start, self.step, self.width, self.count = start, step, width, count

    def _view(self, t: Tensor, dim: int) -> Tensor:
        """t with dim replaced by [count, width]."""
        shape = (*t.shape[:dim], self.count, self.width, *t.shape[dim + 1 :])
        strides = t.stride()
        strides = (*strides[:dim], self.step * strides[dim], *strides[dim:])
        return t.as_strided(shape, strides, t.storage_offset() + self.start * t.stride(dim))

    def take(self, t: Tensor, dim: int = 1) -> Tensor:
        """Rows of t along dim, as problems of their own, [.., G * count, width, ..]."""
        return self._view(t, dim).flatten(dim - 1, dim)

    def put(self, t: Tensor, block: Tensor, merge: Callable | None = None) -> None:
        """Writes block [k, G * count, width, ..] into t [k, G, M, ..], merged with the old."""
        view = self._view(t, 2)
        block = block.reshape(view.shape)
        view.copy_(block if merge is None else merge(view, block))

    def firsts(self, device: torch.device) -> Tensor:
        """Row number of each block's first row, [count]."""
        return self.start + self.step * torch.arange(self.count, device=device)


def _levels(M: int) -> Iterator[tuple[Blocks, Blocks]]:
    """Pairs of blocks that cover the upper triangle but the diagonal blocks, each once."""
    w = BLOCK
    while w < M:
        count, rest = divmod(M, 2 * w)
        if count:
            yield Blocks(0, 2 * w, w, count), Blocks(w, 2 * w, w, count)
        if rest > w:
            at = count * 2 * w
            yield Blocks(at, 2 * w, w, 1), Blocks(at + w, 2 * w, rest - w, 1)
        w *= 2


def _diagonal(G: int, M: int) -> Iterator[Blocks]:
    """Blocks of BLOCK rows and the ragged one, as many as may be dense at a time."""
    count, rest = divmod(M, BLOCK)
    together = max(_DENSE // (BLOCK * BLOCK * max(G, 1)), 1)
    for first in range(0, count, together):
        yield Blocks(first * BLOCK, BLOCK, BLOCK, min(together, count - first))
    if rest:
        yield Blocks(count * BLOCK, BLOCK, rest, 1)


def _symmetric(positives: Tensor | None) -> Tensor | None:
    """-1, no match, where the match does not point back."""
    return None if positives is None else torch.where(mutual(positives), positives, -1)


def _local(first: Blocks, second: Blocks, positives: Tensor | None) -> Tensor | None:
    """Positives of the rows of `first` as columns of `second`; others fall outside."""
    if positives is None:
        return None
    G = positives.shape[0]
    own = first.take(positives).reshape(G, first.count, first.width)
    own = own - second.firsts(positives.device)[:, None]
    return own.reshape(G * first.count, first.width)


def _both(first: Blocks, second: Blocks, t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows of t [G, M, ..] in both blocks."""
    return (None, None) if t is None else (first.take(t), second.take(t))


@full_precision
def _dense(at: Blocks, x, scale, positives, ids, ignore: bool, normalize: bool):
    """Of the blocks on the diagonal: unit rows, 1 / norm, products, s, targets, entries outside."""
    unit, inv = reference.unit(at.take(x), normalize)
    products = unit @ unit.mT
    s = scale[..., None] * products
    ids = None if ids is None else at.take(ids)
    pos, out = reference.matches(_local(at, at, positives), ids, ids, ignore, s)
    own = torch.eye(at.width, dtype=torch.bool, device=x.device)
    return unit, inv, products, s, pos & ~own, out | own


@full_precision
def _dense_bwd(at: Blocks, coef, x, scale, positives, ids, ignore: bool, normalize: bool):
    unit, inv, products, *rest = _dense(at, x, scale, positives, ids, ignore, normalize)
    ds = reference.row_ds(*rest, at.take(coef, 2))
    d = reference.unit_bwd(scale[..., None] * ((ds + ds.mT) @ unit), unit, inv)
    return d, (ds * products).sum(-1)
