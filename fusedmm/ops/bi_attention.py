"""bi_attention: one shared score matrix, both softmaxes. Public function, custom op, autograd."""

import torch
from torch import Tensor

from .. import backends, problem
from ._call import op, plan
from ._common import autocast, draw_seed, given_or_zeros, public_lse


def bi_attention(
    qk_x: Tensor,
    qk_y: Tensor,
    v_x: Tensor,
    v_y: Tensor,
    *,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    bias: Tensor | None = None,
    clamp: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Attention in both directions from one score matrix, which is computed once.

        s = scale * qk_x @ qk_y.mT                              # [B, H, M, N]
        s = s.clamp(-clamp, clamp) + bias                       # never stored
        o_x = softmax(s, dim=-1) @ v_y                          # [B, H, M, Dv], keys kept by mask_y
        o_y = softmax(s, dim=-2).mT @ v_x                       # [B, H, N, Dv], keys kept by mask_x

    Args:
        qk_x, qk_y: [B, H, M, D], [B, H, N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        v_x, v_y: [B, H, M, Dv], [B, H, N, Dv].
        mask_x, mask_y: [B, M], [B, N] bool, True = keep this token as a key.
        bias: broadcastable to [B, H, M, N]; added after the clamp. -inf masks; so do finite numbers
            such as finfo.min, of which sums below -2**27 count as -2**27.
        clamp: limit of |scale * qk_x @ qk_y.mT|; the gradient is 0 outside.
        scale: multiplier of the scores, default D ** -0.5.
        dropout_p: probability of dropping an attention weight, each direction on its own.
        return_lse: also return the natural log of the sum of exp of each row and column.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the first that accepts.
    Returns: (o_x, o_y), and with return_lse (o_x, o_y, lse_x [B, H, M], lse_y [B, H, N]), lse fp32.
        A token with no kept key gives 0, lse -inf and gradient 0.
    Memory: O(M + N) per head beyond inputs and outputs; s is never stored.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: GLIP, arXiv:2112.03857; LightGlue, arXiv:2306.13643; BiXT, arXiv:2402.12138.
    """
    qk_x, qk_y, v_x, v_y = autocast(qk_x, qk_y, v_x, v_y)
    asked, name = plan(
        "bi_attention", backend, problem.bi_attention,
        qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, clamp, scale, dropout_p,
    )  # fmt: skip
    o_x, o_y, lse_x, lse_y = _fwd(
        qk_x,
        qk_y,
        v_x,
        v_y,
        mask_x,
        mask_y,
        bias,
        None if clamp is None else float(clamp),
        asked.x.D**-0.5 if scale is None else float(scale),
        float(dropout_p),
        draw_seed(dropout_p),
        name,
    )
    return (o_x, o_y, *public_lse(o_x, lse_x, lse_y)) if return_lse else (o_x, o_y)


@op("fusedmm::bi_attention_fwd")
def _fwd(
    qk_x: Tensor,
    qk_y: Tensor,
    v_x: Tensor,
    v_y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias: Tensor | None,
    clamp: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load(backend, "bi_attention").fwd(
        qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, clamp, scale, dropout_p, seed
    )


@_fwd.register_fake
def _(qk_x, qk_y, v_x, v_y, *rest):
    return (
        qk_x.new_empty((*qk_x.shape[:3], v_y.shape[3])),
        qk_y.new_empty((*qk_y.shape[:3], v_x.shape[3])),
        qk_x.new_empty(qk_x.shape[:3], dtype=torch.float64),
        qk_y.new_empty(qk_y.shape[:3], dtype=torch.float64),
    )


@op("fusedmm::bi_attention_bwd")
def _bwd(
    do_x: Tensor,
    do_y: Tensor,
    dlse_x: Tensor | None,
    dlse_y: Tensor | None,
    qk_x: Tensor,
    qk_y: Tensor,
    v_x: Tensor,
    v_y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias: Tensor | None,
    o_x: Tensor,
    o_y: Tensor,
    lse_x: Tensor,
    lse_y: Tensor,
    clamp: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return backends.load(backend, "bi_attention").bwd(
        do_x, do_y, dlse_x, dlse_y, qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias,
        o_x, o_y, lse_x, lse_y, clamp, scale, dropout_p, seed, needs,
    )  # fmt: skip


@_bwd.register_fake
def _(do_x, do_y, dlse_x, dlse_y, qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, *rest):
    inputs = (qk_x, qk_y, v_x, v_y, bias)
    return [t.new_empty(t.shape) for t, need in zip(inputs, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.clamp, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # of lse, which few ask for
    ctx.save_for_backward(*tensors, *output, seed)


def _backward(ctx, do_x, do_y, dlse_x, dlse_y):
    *tensors, seed = ctx.saved_tensors
    do_x, do_y = given_or_zeros((do_x, do_y), tensors[-4:-2])
    need = ctx.needs_input_grad
    needs = [*need[:4], need[6]]
    grads = iter(
        _bwd(do_x, do_y, dlse_x, dlse_y, *tensors, ctx.clamp, ctx.scale, ctx.dropout_p, seed,
             needs, ctx.backend)
    )  # fmt: skip
    out = [next(grads) if n else None for n in needs]
    return (*out[:4], None, None, out[4], None, None, None, None, None)


_fwd.register_autograd(_backward, setup_context=_setup)
_fwd.register_batch()
_bwd.register_batch()
