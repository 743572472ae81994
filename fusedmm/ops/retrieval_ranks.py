"""retrieval_ranks: the rank of each row's match among all columns. Public function, custom op."""

import torch
from torch import Tensor

from .. import backends, problem
from ..dispatch import select
from . import pairs
from ._common import autocast


def retrieval_ranks(
    x: Tensor,
    y: Tensor,
    positives: Tensor | None = None,
    *,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How many other rows of y are at least as similar to row i of x as its match; s not stored.

        s = x @ y.mT                                            # [..., M, N], never stored
        s_pos = s.diagonal(dim1=-2, dim2=-1)[..., None]
        ranks = s.shape[-1] - 1 - (s < s_pos).sum(-1)           # 0 = best, ties count against

    Args:
        x, y: [..., M, D], [..., N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        positives: [..., M] int64, the match of row i is y[positives[i]]; default i, which needs
            M == N.
        normalize: cosine similarity, the rows brought to unit length inside the op.
        backend: "cuda", "cpu" or "reference"; None takes the first that accepts.
    Returns: [..., M] int64; N where positives[i] is no row of y. NaN counts against the match.
    Memory: O(M), one tile of s.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    """
    op = "retrieval_ranks"
    x, y = autocast(x, y)
    square = positives is None
    asked = problem.pair_loss(op, x, y, 1.0, positives, None, None, normalize, square)
    name = select(op, asked, backend)
    lead, G, M, N = x.shape[:-2], asked.G, asked.M, asked.N
    if positives is None:
        positives = pairs.default_positives(G, M, x.device)
    ranks = _fwd(
        x.reshape(G, M, asked.D), y.reshape(G, N, asked.D), positives.reshape(G, M), normalize, name
    )
    return ranks.reshape(*lead, M)


@torch.library.custom_op("fusedmm::retrieval_ranks_fwd", mutates_args=())
def _fwd(x: Tensor, y: Tensor, positives: Tensor, normalize: bool, backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return backends.load(backend, "retrieval_ranks").fwd(x, y, positives, normalize)


@_fwd.register_fake
def _(x, y, positives, normalize, backend):
    return x.new_empty(x.shape[:2], dtype=torch.int64)
