"""bi_attention in plain torch: one score matrix, softmax over either axis; backward by hand."""

import torch
from torch import Tensor

from .co_attention import kept, softmax_bwd
from .softmax import dropout_factor, full_precision, softmax, upcast


def reject(problem) -> list[str]:
    """The reference runs everything."""
    return []


@full_precision
def fwd(
    qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, clamp, scale, dropout_p, seed
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o_x, o_y, lse_x, lse_y."""
    dtype = qk_x.dtype
    qk_x, qk_y, v_x, v_y = upcast(qk_x, qk_y, v_x, v_y)
    s, _ = scores(qk_x, qk_y, bias, clamp, scale)  # [B, H, M, N]
    p_x, lse_x = softmax(s, mask_y)  # over y
    p_y, lse_y = softmax(s.mT, mask_x)  # over x, [B, H, N, M]
    f_x = dropout_factor(seed, 0, s.shape, dropout_p, s)
    f_y = dropout_factor(seed, 1, s.shape, dropout_p, s)
    if f_x is not None:
        p_x, p_y = p_x * f_x, p_y * f_y.mT
    o_x, o_y = kept(p_x, v_y, mask_y), kept(p_y, v_x, mask_x)
    return o_x.to(dtype), o_y.to(dtype), lse_x.double(), lse_y.double()


def scores(qk_x, qk_y, bias, clamp, scale) -> tuple[Tensor, Tensor | None]:
    """s [B, H, M, N] and, with clamp, where its gradient passes."""
    s, passes = scale * qk_x @ qk_y.mT, None
    if clamp is not None:
        passes = (s >= -clamp) & (s <= clamp)
        s = s.clamp(-clamp, clamp)
    return (s if bias is None else s + bias.to(s.dtype)), passes


@full_precision
def bwd(
    do_x, do_y, dlse_x, dlse_y, qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias,
    o_x, o_y, lse_x, lse_y, clamp, scale, dropout_p, seed, needs,
) -> list[Tensor]:  # fmt: skip
    """Gradients of (qk_x, qk_y, v_x, v_y, bias) where `needs`."""
    dtype = qk_x.dtype
    do_x, do_y = upcast(do_x, do_y)
    qk_x, qk_y, v_x, v_y = upcast(qk_x, qk_y, v_x, v_y)
    s, passes = scores(qk_x, qk_y, bias, clamp, scale)
    f_x = dropout_factor(seed, 0, s.shape, dropout_p, s)
    f_y = dropout_factor(seed, 1, s.shape, dropout_p, s)
    ds_x, dv_y = _side(s, do_x, v_y, mask_y, dlse_x, f_x)
    ds_y, dv_x = _side(s.mT, do_y, v_x, mask_x, dlse_y, None if f_y is None else f_y.mT)
    ds = ds_x + ds_y.mT  # before the last two products: this is what sharing s saves
    db = None if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    if passes is not None:
        ds = torch.where(passes, ds, 0.0)
    dqk_x, dqk_y = scale * ds @ qk_y, scale * ds.mT @ qk_x
    grads = (dqk_x.to(dtype), dqk_y.to(dtype), dv_x.to(dtype), dv_y.to(dtype), db)
    return [g for g, need in zip(grads, needs, strict=True) if need]


def _side(s, do, v, keep, dlse, factor) -> tuple[Tensor, Tensor]:
    """ds of one softmax, and dv."""
    p, _ = softmax(s, keep)
    if keep is not None:
        v = v.masked_fill(~keep[:, None, :, None], 0.0)
    dp = do @ v.mT  # o = (p * factor) @ v
    dv = (p if factor is None else p * factor).mT @ do
    if factor is not None:
        dp = dp * factor
    return softmax_bwd(p, dp, dlse), dv
