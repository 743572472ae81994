"""dual_softmax_match: mutual best of a row and a column softmax. Public function, custom op."""

import torch
from torch import Tensor

from .. import backends, check, problem
from ..dispatch import select
from . import pairs
from ._common import autocast


def dual_softmax_match(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    threshold: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs that are each other's best under softmax over rows times softmax over columns (LoFTR).

        s = scale * x @ y.T                                     # [M, N], never stored
        p = s.softmax(0) * s.softmax(1)
        best_x, best_y = p.argmax(1), p.argmax(0)               # the first of equal ones
        i = torch.arange(len(x))
        i = i[(best_y[best_x] == i) & (p.amax(1) > threshold)]
        pairs, confidence = torch.stack([i, best_x[i]], 1), p[i, best_x[i]]

    Args:
        x, y: [M, D], [N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        scale: float or scalar tensor, 1 / temperature.
        threshold: pairs are kept above it, in [0, 1].
        backend: "cuda", "cpu" or "reference"; None takes the first that accepts.
    Returns: pairs [K, 2] int64 by ascending row of x, confidence [K] fp32 without gradient.
    Memory: O(M + N), one tile of s; two GEMM passes.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: LoFTR, arXiv:2104.00680.
    """
    op = "dual_softmax_match"
    check.fraction(op, "threshold", threshold)
    x, y = autocast(x, y)
    for arg, t, dims in (("x", x, "M, D"), ("y", y, "N, D")):
        check.floating(op, arg, t)
        check.ndim(op, arg, t, dims)
    if isinstance(scale, Tensor):
        check.floating(op, "scale", scale)
        check.device(op, ("x", x), ("scale", scale))
        if scale.numel() != 1:
            raise check.bad(op, "scale", "a scalar", f"shape {list(scale.shape)}")
    else:
        check.number(op, "scale", scale)
    asked = problem.pair_loss(op, x, y, 1.0, None, None, None, False, square=False)
    name = select(op, asked, backend)
    match, confidence = _fwd(x.detach(), y.detach(), pairs.as_rows(scale, x, 1, 1).detach(), name)
    rows = ((match >= 0) & (confidence > threshold)).nonzero().squeeze(1)
    return torch.stack([rows, match[rows]], 1), confidence[rows]


@torch.library.custom_op("fusedmm::dual_softmax_match_fwd", mutates_args=())
def _fwd(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return backends.load(backend, "dual_softmax_match").fwd(x, y, scale)


@_fwd.register_fake
def _(x, y, scale, backend):
    M = x.shape[:1]
    return x.new_empty(M, dtype=torch.int64), scale.new_empty(M)
