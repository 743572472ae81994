"""co_attention in plain torch: two score matrices, one softmax each; backward derived by hand."""

from torch import Tensor

from .softmax import dropout_factor, full_precision, softmax, upcast


def reject(problem) -> list[str]:
    """The reference runs everything."""
    return []


@full_precision
def fwd(
    q_x,
    k_x,
    v_x,
    q_y,
    k_y,
    v_y,
    mask_x,
    mask_y,
    bias_xy,
    bias_yx,
    scale_x,
    scale_y,
    dropout_p,
    seed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o_x, o_y, lse_x, lse_y; scale_x is that of the direction whose queries are x."""
    o_x, lse_x = attend(q_x, k_y, v_y, mask_y, bias_xy, scale_x, dropout_p, seed, 0)
    o_y, lse_y = attend(q_y, k_x, v_x, mask_x, bias_yx, scale_y, dropout_p, seed, 1)
    return o_x, o_y, lse_x.double(), lse_y.double()


def attend(q, k, v, keep, bias, scale, dropout_p, seed, direction) -> tuple[Tensor, Tensor]:
    """One direction: M queries over N keys."""
    dtype = q.dtype
    q, k, v = upcast(q, k, v)
    s = scale * q @ k.mT  # [B, H, M, N]
    if bias is not None:
        s = s + bias.to(s.dtype)
    p, lse = softmax(s, keep)
    factor = dropout_factor(seed, direction, s.shape, dropout_p, s)
    o = kept(p if factor is None else p * factor, v, keep)  # [B, H, M, Dv]
    return o.to(dtype), lse


def softmax_bwd(p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
    """ds [B, H, M, N] from the gradients of p and, if there is one, of its lse [B, H, M].

    rowsum(p * dp) is rowsum(do * o), but cancels exactly against dp where one key takes all.
    """
    delta = (p * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(dp.dtype)
    return p * (dp - delta[..., None])


def kept(p: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """p @ v where rows of v that are not kept count as zero, also if they hold NaN."""
    return p @ (v if keep is None else v.masked_fill(~keep[:, None, :, None], 0.0))


@full_precision
def bwd(
    do_x, do_y, dlse_x, dlse_y, q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
    o_x, o_y, lse_x, lse_y, scale_x, scale_y, dropout_p, seed, needs,
) -> list[Tensor]:  # fmt: skip
    """Gradients of (q_x, k_x, v_x, q_y, k_y, v_y, bias_xy, bias_yx) where `needs`."""
    dq_x, dk_y, dv_y, db_x = attend_bwd(
        do_x, dlse_x, q_x, k_y, v_y, mask_y, bias_xy, scale_x, dropout_p, seed, 0
    )
    dq_y, dk_x, dv_x, db_y = attend_bwd(
        do_y, dlse_y, q_y, k_x, v_x, mask_x, bias_yx, scale_y, dropout_p, seed, 1
    )
    grads = (dq_x, dk_x, dv_x, dq_y, dk_y, dv_y, db_x, db_y)
    return [g for g, need in zip(grads, needs, strict=True) if need]


def attend_bwd(
    do, dlse, q, k, v, keep, bias, scale, dropout_p, seed, direction
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dbias of one direction."""
    dtype = q.dtype
    do, q, k, v = upcast(do, q, k, v)
    if keep is not None:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (k, v))
    s = scale * q @ k.mT  # [B, H, M, N]
    p, _ = softmax(s if bias is None else s + bias.to(s.dtype), keep)
    factor = dropout_factor(seed, direction, s.shape, dropout_p, s)
    dp = do @ v.mT  # o = (p * factor) @ v
    dv = (p if factor is None else p * factor).mT @ do
    if factor is not None:
        dp = dp * factor
    ds = softmax_bwd(p, dp, dlse)
    dq, dk = scale * ds @ k, scale * ds.mT @ q
    db = None if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), db
