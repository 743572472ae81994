"""co_attention: two score matrices in one call. Public function, custom op, fake, autograd."""

import torch
from torch import Tensor

from .. import backends, problem
from ._call import op, plan
from ._common import autocast, draw_seed, given_or_zeros, public_lse


def co_attention(
    q_x: Tensor,
    k_x: Tensor,
    v_x: Tensor,
    q_y: Tensor,
    k_y: Tensor,
    v_y: Tensor,
    *,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    bias_xy: Tensor | None = None,
    bias_yx: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Both directions of cross-attention between two streams, each with its own scores.

        o_x = softmax(scale * q_x @ k_y.mT + bias_xy) @ v_y     # [B, H, M, Dv], keys kept by mask_y
        o_y = softmax(scale * q_y @ k_x.mT + bias_yx) @ v_x     # [B, H, N, Dv], keys kept by mask_x

    Args:
        q_x, k_x: [B, H, M, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        v_x: [B, H, M, Dv].
        q_y, k_y, v_y: [B, H, N, D], [B, H, N, D], [B, H, N, Dv].
        mask_x, mask_y: [B, M], [B, N] bool, True = keep this token as a key.
        bias_xy, bias_yx: broadcastable to [B, H, M, N], [B, H, N, M]; added to the scaled scores.
            -inf masks; so do finite numbers such as finfo.min, of which sums below -2**27 count as
            -2**27.
        scale: multiplier of the scores, default D ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1].
        return_lse: also return the natural log of each row's sum of exp.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the first that accepts.
    Returns: (o_x, o_y), and with return_lse (o_x, o_y, lse_x [B, H, M], lse_y [B, H, N]), lse fp32.
        A query with no kept key gives 0, lse -inf and gradient 0.
    Memory: O(M + N) per head beyond inputs and outputs; scores are never stored.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: ViLBERT, arXiv:1908.02265; LXMERT, arXiv:1908.07490; FlashAttention-2, arXiv:2307.08691.
    """
    q_x, k_x, v_x, q_y, k_y, v_y = autocast(q_x, k_x, v_x, q_y, k_y, v_y)
    asked, name = plan(
        "co_attention", backend, problem.co_attention,
        q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, scale, dropout_p,
    )  # fmt: skip
    o_x, o_y, lse_x, lse_y = _fwd(
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
        asked.x.D**-0.5 if scale is None else float(scale),
        asked.y.D**-0.5 if scale is None else float(scale),
        float(dropout_p),
        draw_seed(dropout_p),
        name,
    )
    return (o_x, o_y, *public_lse(o_x, lse_x, lse_y)) if return_lse else (o_x, o_y)


@op("fusedmm::co_attention_fwd")
def _fwd(
    q_x: Tensor,
    k_x: Tensor,
    v_x: Tensor,
    q_y: Tensor,
    k_y: Tensor,
    v_y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias_xy: Tensor | None,
    bias_yx: Tensor | None,
    scale_x: float,
    scale_y: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load(backend, "co_attention").fwd(
        q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
        scale_x, scale_y, dropout_p, seed,
    )  # fmt: skip


@_fwd.register_fake
def _(q_x, k_x, v_x, q_y, k_y, v_y, *rest):
    return (
        q_x.new_empty((*q_x.shape[:3], v_y.shape[3])),
        q_y.new_empty((*q_y.shape[:3], v_x.shape[3])),
        q_x.new_empty(q_x.shape[:3], dtype=torch.float64),
        q_y.new_empty(q_y.shape[:3], dtype=torch.float64),
    )


@op("fusedmm::co_attention_bwd")
def _bwd(
    do_x: Tensor,
    do_y: Tensor,
    dlse_x: Tensor | None,
    dlse_y: Tensor | None,
    q_x: Tensor,
    k_x: Tensor,
    v_x: Tensor,
    q_y: Tensor,
    k_y: Tensor,
    v_y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias_xy: Tensor | None,
    bias_yx: Tensor | None,
    o_x: Tensor,
    o_y: Tensor,
    lse_x: Tensor,
    lse_y: Tensor,
    scale_x: float,
    scale_y: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return backends.load(backend, "co_attention").bwd(
        do_x, do_y, dlse_x, dlse_y, q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx,
        o_x, o_y, lse_x, lse_y, scale_x, scale_y, dropout_p, seed, needs,
    )  # fmt: skip


@_bwd.register_fake
def _(do_x, do_y, dlse_x, dlse_y, q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, b_xy, b_yx, *rest):
    inputs = (q_x, k_x, v_x, q_y, k_y, v_y, b_xy, b_yx)
    return [t.new_empty(t.shape) for t, need in zip(inputs, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale_x, ctx.scale_y, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # of lse, which few ask for
    ctx.save_for_backward(*tensors, *output, seed)


def _backward(ctx, do_x, do_y, dlse_x, dlse_y):
    *tensors, seed = ctx.saved_tensors
    do_x, do_y = given_or_zeros((do_x, do_y), tensors[-4:-2])
    need = ctx.needs_input_grad
    needs = [*need[:6], need[8], need[9]]
    grads = iter(
        _bwd(do_x, do_y, dlse_x, dlse_y, *tensors, ctx.scale_x, ctx.scale_y, ctx.dropout_p, seed,
             needs, ctx.backend)
    )  # fmt: skip
    out = [next(grads) if n else None for n in needs]
    return (*out[:6], None, None, *out[6:], None, None, None, None, None)


_fwd.register_autograd(_backward, setup_context=_setup)
_fwd.register_batch()
_bwd.register_batch()
