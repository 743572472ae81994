"""Masks as models spell them, turned into what the ops take: a bool keep or an additive bias."""

import torch
from torch import Tensor

from .. import check


def keep_or_bias(op: str, mask: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Splits a key mask into (keep [B, N] bool, bias [B, 1, 1, N]); one of them at most is given.

    Args:
        op: whose error it is if the mask is neither.
        mask: bool, True = keep, [B, N] or [B, 1, 1, N]; or floating and added to the scores (0 and
            -10000 in BERT's code), [B, 1, 1, N] or broadcastable to the scores.
        like: a tensor of the queries' dtype, which the bias takes too.
    """
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return (mask if mask.dim() == 2 else mask[:, 0, 0]), None
    if not mask.is_floating_point():
        got = f"dtype {check.name(mask.dtype)}"
        raise check.bad(op, "mask", "bool, True = keep, or floating and added", got)
    return None, (mask if mask.dim() == 4 else mask[:, None, None, :]).to(like.dtype)


def keep(op: str, mask: Tensor | None) -> Tensor | None:
    """The mask, if it is bool."""
    if mask is not None and mask.dtype != torch.bool:
        raise check.bad(op, "mask", "bool, True = keep", f"dtype {check.name(mask.dtype)}")
    return mask


def probabilities(
    q: Tensor, k: Tensor, keep: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The attention map that the ops never store, fp32 or wider.

        p = softmax(q @ k.mT / sqrt(D) + bias)                  # [B, H, M, N]

    Args:
        q, k: [B, H, M, D], [B, H, N, D]; keep: [B, N] bool, True = keep; bias: broadcastable.
    Returns: [B, H, M, N], rows without a kept key 0.
    """
    s = (q @ k.mT * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        s = s + bias
    return masked_softmax(s, keep)


def masked_softmax(s: Tensor, keep: Tensor | None) -> Tensor:
    """softmax(s, dim=-1) over the keys kept by keep [B, N]; a row without any gives 0."""
    if keep is None:
        return s.softmax(-1)
    drop = ~keep.reshape(keep.shape[0], *[1] * (s.dim() - 2), keep.shape[-1])
    # A finite fill keeps a dead row, and its gradient, free of NaN.
    return s.masked_fill(drop, torch.finfo(s.dtype).min).softmax(-1).masked_fill(drop, 0.0)
