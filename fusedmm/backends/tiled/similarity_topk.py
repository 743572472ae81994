"""similarity_topk over tiles: a running top k of each row, as keys that order score then index.

A tile can only change rows whose maximum in the tile exceeds their k-th best so far; only those
are searched. Memory O(M k) and one tile.
"""

import torch
from torch import Tensor

from .tiles import Tiles, reject  # noqa: F401

_LOW = 0xFFFFFFFF


def fwd(x: Tensor, y: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """values, indices [G, M, k], best first, equal scores by lowest index; see the reference."""
    G, M, D = x.shape
    keys = torch.full((G, M, k), torch.iinfo(torch.int64).min, device=x.device)
    if k > 0:
        tiles = Tiles(M, y.shape[1], D, normalize, x)
        for g in range(G):
            for rows in tiles.row_blocks():
                _search(tiles, x[g], y[g], rows, keys[g, rows])
    bits = (keys >> 32).to(torch.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, _LOW - (keys & _LOW)


def _search(tiles: Tiles, x: Tensor, y: Tensor, rows: slice, keys: Tensor) -> None:
    """Fills keys [rows, k] from all tiles of these rows."""
    k = keys.shape[1]
    worst = keys.new_full((keys.shape[0],), float("-inf"), dtype=torch.float32)
    tiles.load_rows(x, rows)
    for cols in tiles.col_blocks():
        s = tiles.at(y, cols)  # [rows, cols]
        if cols.start < k:
            found, at = s, slice(None)
        else:  # NaN compares false, so that a row with NaN is searched
            at = (~(s.amax(1) <= worst)).nonzero().squeeze(1)
            found = s[at]
        if found.shape[0] == 0:
            continue
        new = _tile_topk(found, cols.start, min(k, found.shape[1]))
        best = torch.cat([keys[at], new], 1).topk(k, dim=1).values
        keys[at] = best
        bits = (best[:, -1] >> 32).to(torch.int32)
        worst[at] = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _tile_topk(s: Tensor, start: int, k: int) -> Tensor:
    """The k greatest keys of each row, unordered; whole rows become keys only where torch.topk had
    to choose between equal scores, or met NaN."""
    values, index = s.topk(k, dim=1, sorted=False)
    least = values.amin(1, keepdim=True)
    chosen = (s == least).sum(1) > (values == least).sum(1)
    keys = _keys(values, index + start)
    at = (chosen | values.isnan().any(1)).nonzero().squeeze(1)
    if at.shape[0] > 0:
        every = torch.arange(start, start + s.shape[1], device=s.device)
        keys[at] = _keys(s[at], every).topk(k, dim=1, sorted=False).values
    return keys


def _keys(s: Tensor, index: Tensor) -> Tensor:
    """int64 that orders as (score descending, index ascending) does; NaN above all, -0 as 0."""
    s = torch.where(s != s, float("nan"), s + 0.0)
    bits = s.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (order << 32) | (_LOW - index)
