"""fusion_attention in plain torch: bi_attention with x repeated for every head, heads summed."""

from torch import Tensor

from . import bi_attention
from .softmax import full_precision, upcast


def reject(problem) -> list[str]:
    """The reference runs everything."""
    return []


def _shared(x, k, v, mask_x, mask_y, bias) -> tuple:
    """Arguments of bi_attention from qk_x to scale."""
    heads = x[:, None].expand(-1, k.shape[1], -1, -1)  # [B, H, M, D]
    row = None if bias is None else bias[:, :, None]  # [B, H, 1, N]
    return heads, k, heads, v, mask_x, mask_y, row


@full_precision
def fwd(x, k, v, mask_x, mask_y, bias, dropout_p, seed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, z, lse_x, lse_y."""
    dtype = x.dtype
    shared = _shared(*upcast(x, k, v), mask_x, mask_y, bias)
    o, z, lse_x, lse_y = bi_attention.fwd(*shared, None, 1.0, dropout_p, seed)
    return o.sum(1).to(dtype), z.to(dtype), lse_x, lse_y


@full_precision
def bwd(
    do, dz, dlse_x, dlse_y, x, k, v, mask_x, mask_y, bias, z, lse_x, lse_y, dropout_p, seed, needs
) -> list[Tensor]:
    """Gradients of (x, k, v, bias) where `needs`."""
    dtype = x.dtype
    do, dz, z, x, k, v = upcast(do, dz, z, x, k, v)
    shared = _shared(x, k, v, mask_x, mask_y, bias)
    o = bi_attention.fwd(*shared, None, 1.0, dropout_p, seed)[0]  # per head
    do = do[:, None].expand_as(o)
    dqk_x, dk, dv_x, dv, *db = bi_attention.bwd(
        do, dz, dlse_x, dlse_y, *shared, o, z, lse_x, lse_y, None, 1.0, dropout_p, seed,
        [True] * 4 + [bias is not None],
    )  # fmt: skip
    dx = (dqk_x + dv_x).sum(1)
    grads = (dx.to(dtype), dk.to(dtype), dv.to(dtype), db[0][:, :, 0] if db else None)
    return [g for g, need in zip(grads, needs, strict=True) if need]
