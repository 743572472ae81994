"""similarity_topk in plain torch: a stable sort of every row of s."""

from torch import Tensor

from .contrastive_loss import reject, unit  # noqa: F401


def fwd(x: Tensor, y: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """values, indices [G, M, k] of x [G, M, D], y [G, N, D]; NaN counts as the greatest."""
    s = unit(x, normalize)[0] @ unit(y, normalize)[0].mT  # [G, M, N]
    values, indices = s.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()
