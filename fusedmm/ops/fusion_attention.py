"""fusion_attention: bi_attention whose long stream is query, key and value of every head at once,
heads summed. What GLIP's fusion becomes when its projections are absorbed into the short stream.
"""

import torch
from torch import Tensor

from .. import backends, problem
from ._call import op, plan
from ._common import autocast, draw_seed, given_or_zeros


def fusion_attention(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention both ways between one stream without heads and another with them.

        s = x[:, None] @ k.mT + bias[:, :, None]                # [B, H, M, N], never stored
        o = (softmax(s, dim=-1) @ v).sum(1)                     # [B, M, Dv], keys kept by mask_y
        z = softmax(s, dim=-2).mT @ x[:, None]                  # [B, H, N, D], keys kept by mask_x

    Args:
        x: [B, M, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        k, v: [B, H, N, D], [B, H, N, Dv].
        mask_x, mask_y: [B, M], [B, N] bool, True = keep this token as a key.
        bias: [B, H, N], added to the scores of each key.
        dropout_p: probability of dropping an attention weight, each direction on its own.
        backend: "cpu" or "reference"; None takes the first that accepts.
    Returns: (o, z). A token with no kept key gives 0 and gradient 0.
    Memory: O(M + N) per head beyond inputs and outputs; neither s nor o per head is stored.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: GLIP, arXiv:2112.03857, with its projections absorbed.
    """
    x, k, v = autocast(x, k, v)
    _, name = plan(
        "fusion_attention", backend, problem.fusion_attention,
        x, k, v, mask_x, mask_y, bias, dropout_p,
    )  # fmt: skip
    o, z, _, _ = _fwd(x, k, v, mask_x, mask_y, bias, float(dropout_p), draw_seed(dropout_p), name)
    return o, z


@op("fusedmm::fusion_attention_fwd")
def _fwd(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load(backend, "fusion_attention").fwd(
        x, k, v, mask_x, mask_y, bias, dropout_p, seed
    )


@_fwd.register_fake
def _(x, k, v, *rest):
    return (
        x.new_empty((*x.shape[:2], v.shape[3])),
        k.new_empty(k.shape),
        x.new_empty((x.shape[0], k.shape[1], x.shape[1]), dtype=torch.float64),
        x.new_empty(k.shape[:3], dtype=torch.float64),
    )


@op("fusedmm::fusion_attention_bwd")
def _bwd(
    do: Tensor,
    dz: Tensor,
    dlse_x: Tensor | None,
    dlse_y: Tensor | None,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    lse_x: Tensor,
    lse_y: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return backends.load(backend, "fusion_attention").bwd(
        do, dz, dlse_x, dlse_y, x, k, v, mask_x, mask_y, bias, z, lse_x, lse_y, dropout_p, seed,
        needs,
    )  # fmt: skip


@_bwd.register_fake
def _(do, dz, dlse_x, dlse_y, x, k, v, mask_x, mask_y, bias, *rest):
    inputs = (x, k, v, bias)
    return [t.new_empty(t.shape) for t, need in zip(inputs, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # of lse, which few ask for
    ctx.save_for_backward(*tensors, *output[1:], seed)  # not o: heads are summed in it


def _backward(ctx, do, dz, dlse_x, dlse_y):
    *tensors, seed = ctx.saved_tensors
    x, v, z = tensors[0], tensors[2], tensors[-3]
    (dz,) = given_or_zeros((dz,), (z,))
    do = x.new_zeros((*x.shape[:2], v.shape[3])) if do is None else do
    need = ctx.needs_input_grad
    needs = [*need[:3], need[5]]
    grads = iter(
        _bwd(do, dz, dlse_x, dlse_y, *tensors, ctx.dropout_p, seed, needs, ctx.backend)
    )  # fmt: skip
    out = [next(grads) if n else None for n in needs]
    return (*out[:3], None, None, out[3], None, None, None)


_fwd.register_autograd(_backward, setup_context=_setup)
_fwd.register_batch()
_bwd.register_batch()
