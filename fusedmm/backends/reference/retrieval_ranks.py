"""retrieval_ranks in plain torch: how many other columns are not below the positive."""

import torch
from torch import Tensor

from .contrastive_loss import reject, unit  # noqa: F401


def fwd(x: Tensor, y: Tensor, positives: Tensor, normalize: bool) -> Tensor:
    """ranks [G, M] int64 of column positives[g, i]; N where that is no column."""
    N = y.shape[1]
    if N == 0:
        return torch.zeros_like(positives)
    s = unit(x, normalize)[0] @ unit(y, normalize)[0].mT  # [G, M, N]
    s_pos = s.gather(2, positives.clamp(0, N - 1)[..., None])
    ranks = N - 1 - (s < s_pos).sum(2)  # false for NaN: counts against
    return torch.where((positives >= 0) & (positives < N), ranks, N)
