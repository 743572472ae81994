"""retrieval_ranks over tiles: the positive's score out of its own tile, then one count per tile.

Tiles that hold positives are computed twice, the others once. Memory O(M) and one tile.
"""

import torch
from torch import Tensor

from .tiles import Tiles, reject  # noqa: F401


def fwd(x: Tensor, y: Tensor, positives: Tensor, normalize: bool) -> Tensor:
    """ranks [G, M] int64; positives [G, M]; see the reference."""
    G, M, D = x.shape
    N = y.shape[1]
    ranks = torch.full((G, M), N, device=x.device)
    tiles = Tiles(M, N, D, normalize, x)
    for g in range(G):
        for rows in tiles.row_blocks():
            tiles.load_rows(x[g], rows)
            ranks[g, rows] = _count(tiles, y[g], positives[g, rows])
    return ranks


def _count(tiles: Tiles, y: Tensor, positives: Tensor) -> Tensor:
    """Ranks of the loaded rows; N where the positive is no column."""
    N = y.shape[0]
    known = (positives >= 0) & (positives < N)
    s_pos = torch.zeros(positives.shape, dtype=torch.float32, device=y.device)
    for cols in tiles.col_blocks():
        here = (positives >= cols.start) & (positives < cols.stop)
        if here.any():
            s = tiles.at(y, cols)
            at = (positives - cols.start).clamp(0, s.shape[1] - 1)
            s_pos = torch.where(here, s.gather(1, at[:, None]).squeeze(1), s_pos)
    below = torch.zeros_like(positives)
    for cols in tiles.col_blocks():
        below += (tiles.at(y, cols) < s_pos[:, None]).sum(1)  # false for NaN: counts against
    return torch.where(known, N - 1 - below, N)
