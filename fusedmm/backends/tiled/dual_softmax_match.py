"""dual_softmax_match over tiles: lse of rows and columns, then the best of each, then mutual ones.

Two GEMM passes over s. Memory O(M + N) and one tile.
"""

import torch
from torch import Tensor

from .tiles import Tiles, reject  # noqa: F401

NEG_INF = float("-inf")


def fwd(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """match [M] (-1 for none), confidence [M]; see the reference."""
    M, N, D = x.shape[0], y.shape[0], x.shape[1]
    tiles = Tiles(M, N, D, False, x)
    lse_x, best_x = (
        torch.full((M,), NEG_INF, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    lse_y, best_y = (
        torch.full((N,), NEG_INF, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    arg_x = torch.zeros(M, dtype=torch.int64, device=x.device)
    arg_y = torch.zeros(N, dtype=torch.int64, device=x.device)
    for rows in tiles.row_blocks():
        tiles.load_rows(x, rows, scale)
        for cols in tiles.col_blocks():
            s = tiles.at(y, cols)
            lse_x[rows] = torch.logaddexp(lse_x[rows], s.logsumexp(1))
            lse_y[cols] = torch.logaddexp(lse_y[cols], s.logsumexp(0))
    for rows in tiles.row_blocks():
        tiles.load_rows(x, rows, scale)
        for cols in tiles.col_blocks():
            s = tiles.at(y, cols)
            log_p = (s - lse_x[rows, None]).add_(s.sub_(lse_y[cols]))
            _keep_best(best_x[rows], arg_x[rows], *log_p.max(1), cols.start)
            _keep_best(best_y[cols], arg_y[cols], *log_p.max(0), rows.start)
    if N == 0:
        return torch.full_like(arg_x, -1), torch.zeros_like(best_x)
    mutual = (arg_y[arg_x] == torch.arange(M, device=x.device)) & (best_x > NEG_INF)
    return torch.where(mutual, arg_x, -1), torch.exp(best_x)


def _keep_best(best: Tensor, arg: Tensor, value: Tensor, index: Tensor, start: int) -> None:
    """Updates best and arg where value is greater; an equal one came with a lower index."""
    better = value > best
    torch.where(better, index + start, arg, out=arg)
    torch.where(better, value, best, out=best)
