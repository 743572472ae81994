"""co_attention on Triton: both directions' tiles share every launch; see _attend.py."""

import torch

from . import _attend
from ._args import bias_of, drop_of, keep_of, reject_attention, score_of

OP = "co_attention"


def reject(problem) -> list[str]:
    """Limits of these kernels."""
    return reject_attention(problem)


def _directions(
    q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, o_x, o_y, lse_x, lse_y,
    scale_x, scale_y,
):  # fmt: skip
    B, H, M, _ = q_x.shape
    N = q_y.shape[2]
    x = _attend.direction(
        q_x, k_y, v_y, keep_of(mask_y, q_x), bias_of(bias_xy, q_x, (B, H, M, N)),
        score_of(scale_x, None, bias_xy), o_x, lse_x, 0,
    )  # fmt: skip
    y = _attend.direction(
        q_y, k_x, v_x, keep_of(mask_x, q_y), bias_of(bias_yx, q_y, (B, H, N, M)),
        score_of(scale_y, None, bias_yx), o_y, lse_y, 1,
    )  # fmt: skip
    return x, y


def fwd(
    q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, scale_x, scale_y,
    dropout_p, seed,
):  # fmt: skip
    """o_x, o_y, lse_x, lse_y; one launch."""
    o_x = q_x.new_empty((*q_x.shape[:3], v_y.shape[3]))
    o_y = q_y.new_empty((*q_y.shape[:3], v_x.shape[3]))
    lse_x, lse_y = (t.new_empty(t.shape[:3], dtype=torch.float64) for t in (q_x, q_y))
    x, y = _directions(
        q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
        o_x, o_y, lse_x, lse_y, scale_x, scale_y,
    )  # fmt: skip
    _attend.launch_fwd(OP, x, y, *drop_of(dropout_p, seed))
    return o_x, o_y, lse_x, lse_y


def bwd(
    do_x, do_y, dlse_x, dlse_y, q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
    o_x, o_y, lse_x, lse_y, scale_x, scale_y, dropout_p, seed, needs,
):  # fmt: skip
    """Gradients of (q_x, k_x, v_x, q_y, k_y, v_y, bias_xy, bias_yx) where `needs`."""
    x, y = _directions(
        q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
        o_x, o_y, lse_x.contiguous(), lse_y.contiguous(), scale_x, scale_y,
    )  # fmt: skip
    dq_x, dk_x, dv_x, dq_y, dk_y, dv_y = _attend.contiguous_grads(q_x, k_x, v_x, q_y, k_y, v_y)
    gx = _attend.grads(do_x, dlse_x, dq_x, dk_y, dv_y)
    gy = _attend.grads(do_y, dlse_y, dq_y, dk_x, dv_x)
    drop = drop_of(dropout_p, seed)
    _attend.launch_delta(OP, x, y, gx, gy)
    need_qx, need_kx, need_vx, need_qy, need_ky, need_vy, need_bx, need_by = needs
    dq, dkv = (need_qx, need_qy), (need_ky or need_vy, need_kx or need_vx)
    _attend.launch_bwd(OP, x, y, gx, gy, *drop, dq, dkv)
    db_x = db_y = None
    if need_bx:
        (db_x,) = _attend.contiguous_grads(bias_xy)
        _attend.launch_dbias(OP, x, gx, db_x, *drop)
    if need_by:
        (db_y,) = _attend.contiguous_grads(bias_yx)
        _attend.launch_dbias(OP, y, gy, db_y, *drop)
    grads = (dq_x, dk_x, dv_x, dq_y, dk_y, dv_y, db_x, db_y)
    return [g for g, need in zip(grads, needs, strict=True) if need]
