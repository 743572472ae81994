"""attention: one direction of co_attention, the other side being empty."""

from torch import Tensor

from .. import problem
from ._call import plan
from ._common import autocast, draw_seed
from .co_attention import _fwd


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of one stream to another.

        o = softmax(scale * q @ k.mT + bias) @ v                # [B, H, M, Dv], keys kept by mask

    Args:
        q, k, v: [B, H, M, D], [B, H, N, D], [B, H, N, Dv] fp32/fp16/bf16 (fp64 on reference).
        mask: [B, N] bool, True = keep this token as a key.
        bias: broadcastable to [B, H, M, N]; added to the scaled scores.
        scale: multiplier of the scores, default D ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1].
        backend: "cuda", "triton", "cpu" or "reference"; None takes the first that accepts.
    Returns: o. A query with no kept key gives 0 and gradient 0.
    Memory: O(M + N) per head beyond inputs and outputs; scores are never stored.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    """
    q, k, v = autocast(q, k, v)
    asked, name = plan(
        "co_attention", backend, problem.attention, q, k, v, mask, bias, scale, dropout_p
    )
    none_q, none_v = q[:, :, :0].detach(), v[:, :, :0].detach()  # the side without tokens
    o, _, _, _ = _fwd(
        q, none_q, none_v, none_q, k, v, None, mask, bias, None,
        asked.x.D**-0.5 if scale is None else float(scale), 1.0,
        float(dropout_p), draw_seed(dropout_p), name,
    )  # fmt: skip
    return o
