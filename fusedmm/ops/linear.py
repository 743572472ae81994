"""linear: the product of a projection, by the faster of torch's two GEMMs on a CPU.

fp32 on a 2-core AMD EPYC with AVX-512, one thread, 2304x1024x1024: F.linear 88 GFLOP/s, oneDNN 192
(torch 2.14.1); below some 30 rows the first is quicker. Elsewhere this is F.linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import op
from ._common import autocast

_FEW = 1 << 21  # multiplications; below, a call of oneDNN takes longer
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A fully connected layer.

        y = x @ weight.T + bias                                 # [..., E]

    Args:
        x: [..., C]; weight: [E, C]; bias: [E] or None.
    Returns: [..., E].
    """
    x, weight, bias = autocast(x, weight, bias)
    fast = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not fast or _onednn is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return F.linear(x, weight, bias)
    return _fwd(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of matrices of any strides."""
    if x.numel() * weight.shape[0] < _FEW:
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


@op("fusedmm::linear_fwd")
def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _product(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], weight.shape[0])


@_fwd.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op("fusedmm::linear_bwd")
def _bwd(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    rows = dy.reshape(-1, dy.shape[-1])
    grads = []
    if needs[0]:
        grads.append(_product(rows, weight.t(), None).view(x.shape))
    if needs[1]:
        grads.append(_product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None))
    if needs[2]:
        grads.append(rows.sum(0))
    return grads


@_bwd.register_fake
def _(dy, x, weight, needs):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [dy.new_empty(s) for s, need in zip(shapes, needs, strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    needs = list(ctx.needs_input_grad)
    grads = iter(_bwd(dy, *ctx.saved_tensors, needs))
    return tuple(next(grads) if need else None for need in needs)


_fwd.register_autograd(_backward, setup_context=_setup)
