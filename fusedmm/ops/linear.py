"""linear: the product of a projection, by the faster of torch's two GEMMs on a CPU.

fp32 on a 2-core AMD EPYC with AVX-512, one thread, 2304x1024x1024: F.linear 88 GFLOP/s, oneDNN 192
(torch 2.14.1); below some 30 rows the first is quicker. In other dtypes F.linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import op
from ._common import autocast

_FEW = 1 << 21  # multiplications; below, a call of oneDNN takes longer
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> Tensor:
    """Fully connected layers that read one input, as one product.

        y = torch.cat([x @ weight.T + bias for weight, bias in layers], -1)

    Args:
        x: [..., C]; layers: one to three of weight [E, C] and bias [E], all with a bias or none.
    Returns: [..., sum of E].
    Memory: the concatenated weights live for the call only; backward makes them again.
    """
    flat = autocast(x, *(t for layer in layers for t in layer))
    x, weights, biases = flat[0], flat[1::2], flat[2::2]
    ours = x.device.type == "cpu" and x.dtype == weights[0].dtype != torch.float64
    if not ours or torch._C._functorch.peek_interpreter_stack() is not None:
        return F.linear(x, _joined(*weights), _joined(*biases))
    return _fwd(x, *flat[1:], *[None] * (7 - len(flat)))


def _joined(*tensors: Tensor | None) -> Tensor | None:
    given = [t for t in tensors if t is not None]
    if len(given) < 2:
        return given[0] if given else None
    return torch.cat(given)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of matrices of any strides."""
    few = x.numel() * weight.shape[0] < _FEW
    if few or x.dtype != torch.float32 or _onednn is None:
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, "none", [], "")


@op("fusedmm::linear_fwd")
def _fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
) -> Tensor:
    rows = _product(x.reshape(-1, x.shape[-1]), _joined(w1, w2, w3), _joined(b1, b2, b3))
    return rows.view(*x.shape[:-1], rows.shape[1])


@_fwd.register_fake
def _(x, w1, b1, w2, b2, w3, b3):
    width = sum(w.shape[0] for w in (w1, w2, w3) if w is not None)
    return x.new_empty((*x.shape[:-1], width))


@op("fusedmm::linear_bwd")
def _bwd(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor | None, w3: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """dx, then the weights' and the biases' gradients in one each."""
    rows = dy.reshape(-1, dy.shape[-1])
    grads = []
    if needs[0]:
        grads.append(_product(rows, _joined(w1, w2, w3).t(), None).view(x.shape))
    if needs[1]:
        grads.append(_product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None))
    if needs[2]:
        grads.append(rows.sum(0))
    return grads


@_bwd.register_fake
def _(dy, x, w1, w2, w3, needs):
    shapes = (x.shape, (dy.shape[-1], x.shape[-1]), dy.shape[-1:])
    return [dy.new_empty(s) for s, need in zip(shapes, needs, strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    x, *layers = inputs
    ctx.save_for_backward(x, *layers[0::2])


def _backward(ctx, dy):
    x, *weights = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], any(need[1::2]), any(need[2::2])]
    grads = iter(_bwd(dy, x, *weights, needs))
    dx, dw, db = (next(grads) if n else None for n in needs)
    out, row = [dx], 0
    for i, w in enumerate(weights):
        rows = slice(row, row + (0 if w is None else w.shape[0]))
        out.append(dw[rows] if need[1 + 2 * i] else None)
        out.append(db[rows] if need[2 + 2 * i] else None)
        row = rows.stop
    return tuple(out)


_fwd.register_autograd(_backward, setup_context=_setup)
