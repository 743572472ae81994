"""Tiles of s = scale * x @ y.T, each at most ROWS x COLS, from buffers that are allocated once.

Every tile is one GEMM of the same padded shape on the same buffers, so that equal rows of y give
equal bits of s wherever they stand: ties are found as ties. Accumulates in fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# One fp32 tile of s is 4 MiB, and wide enough that its GEMM runs at the library's full rate.
ROWS, COLS = 512, 2048
PAD = 64

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reject(problem) -> list[str]:
    """Why tiles cannot run `problem`."""
    if problem.dtype not in _DTYPES:
        return [f"{problem.dtype} not in float32, float16, bfloat16"]
    return []


class Tiles:
    """Walks s [M, N] tile by tile; `at` returns a view that the next call overwrites."""

    def __init__(self, M: int, N: int, D: int, normalize: bool, like: Tensor) -> None:
        self.M, self.N, self.normalize = M, N, normalize
        rows, cols = _padded(M, ROWS), _padded(N, COLS)
        fp32 = dict(dtype=torch.float32, device=like.device)
        self._x = torch.zeros(rows, D, **fp32)
        self._y = torch.zeros(cols, D, **fp32)
        self._s = torch.zeros(rows, cols, **fp32)
        self._rows = 0

    def row_blocks(self) -> Iterator[slice]:
        """Slices of range(M)."""
        return _blocks(self.M, ROWS)

    def col_blocks(self) -> Iterator[slice]:
        """Slices of range(N), ascending."""
        return _blocks(self.N, COLS)

    def load_rows(self, x: Tensor, block: slice, scale: Tensor | float = 1.0) -> None:
        """Takes x[block] [rows, D] for the tiles to come."""
        self._rows = _fill(self._x, x[block], self.normalize)
        self._x[: self._rows].mul_(scale)

    def at(self, y: Tensor, block: slice) -> Tensor:
        """s of the loaded rows against y[block], [rows, cols] fp32."""
        cols = _fill(self._y, y[block], self.normalize)
        torch.mm(self._x, self._y.T, out=self._s)
        return self._s[: self._rows, :cols]


def _padded(n: int, most: int) -> int:
    return min(most, -(-max(n, 1) // PAD) * PAD)


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def _fill(buffer: Tensor, rows: Tensor, normalize: bool) -> int:
    """Copies rows [n, D] to the head of buffer, fp32, of unit length if asked; returns n."""
    head = buffer[: rows.shape[0]]
    head.copy_(rows)
    if normalize:
        head.mul_(1.0 / head.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return rows.shape[0]
