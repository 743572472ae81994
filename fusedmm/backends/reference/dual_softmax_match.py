"""dual_softmax_match in plain torch: mutual best of the product of both softmaxes, in logs."""

import torch
from torch import Tensor

from .contrastive_loss import NEG_INF, reject  # noqa: F401
from .softmax import upcast


def fwd(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """match [M] int64 (-1 for none), confidence [M] of the best column; x [M, D], y [N, D]."""
    x, y = upcast(x, y)
    s = scale * x @ y.T  # [M, N]
    if s.numel() == 0:
        return torch.full((x.shape[0],), -1, device=x.device), s.new_zeros(x.shape[0])
    log_p = (s - s.logsumexp(1, keepdim=True)) + (s - s.logsumexp(0))
    best, arg_x = log_p.max(1)  # the first of equal ones
    mutual = (log_p.max(0).indices[arg_x] == torch.arange(len(x), device=x.device)) & (
        best > NEG_INF
    )
    return torch.where(mutual, arg_x, -1), torch.exp(best)
