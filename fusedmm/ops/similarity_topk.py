"""similarity_topk: the k best columns of every row. Public function, custom op, autograd."""

import torch
from torch import Tensor

from .. import backends, check, problem
from ..dispatch import select
from ._common import autocast


def similarity_topk(
    x: Tensor, y: Tensor, k: int, *, normalize: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of y with the greatest inner product with each row of x; s is never stored.

        s = x @ y.mT                                            # [..., M, N], never stored
        values, indices = s.sort(-1, descending=True, stable=True)
        values, indices = values[..., :k], indices[..., :k]

    Args:
        x, y: [..., M, D], [..., N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        k: how many, 0 to N.
        normalize: cosine similarity, the rows brought to unit length inside the op.
        backend: "cuda", "cpu" or "reference"; None takes the first that accepts.
    Returns: values [..., M, k] fp32, descending, and indices [..., M, k] int64; equal values by
        lowest index, NaN before all. Gradients flow through values.
    Memory: O(M * k), one tile of s.
    Raises: ValueError, bad shape, dtype, device or k. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    """
    op = "similarity_topk"
    x, y = autocast(x, y)
    asked = problem.pair_loss(op, x, y, 1.0, None, None, None, normalize, square=False)
    check.integer(op, "k", k, 0, asked.N, "the rows of y")
    name = select(op, asked, backend)
    lead, G, M, N = x.shape[:-2], asked.G, asked.M, asked.N
    values, indices = _fwd(x.reshape(G, M, asked.D), y.reshape(G, N, asked.D), k, normalize, name)
    return values.reshape(*lead, M, k), indices.reshape(*lead, M, k)


@torch.library.custom_op("fusedmm::similarity_topk_fwd", mutates_args=())
def _fwd(x: Tensor, y: Tensor, k: int, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return backends.load(backend, "similarity_topk").fwd(x, y, k, normalize)


@_fwd.register_fake
def _(x, y, k, normalize, backend):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (*x.shape[:2], k)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("fusedmm::similarity_topk_bwd", mutates_args=())
def _bwd(
    dvalues: Tensor, x: Tensor, y: Tensor, indices: Tensor, normalize: bool, needs: list[bool]
) -> list[Tensor]:
    """s[i, indices[i, j]] = <x_i, y_indices[i, j]>, one j at a time: O(M * D) memory."""
    (xh, inv_x), (yh, inv_y) = _unit(x, dvalues, normalize), _unit(y, dvalues, normalize)
    dx, dy = torch.zeros_like(xh), torch.zeros_like(yh)
    for g in range(x.shape[0]):
        for j in range(indices.shape[2]):
            at, d = indices[g, :, j], dvalues[g, :, j, None]  # [M], [M, 1]
            if needs[0]:
                dx[g].addcmul_(d, yh[g, at])
            if needs[1]:
                dy[g].index_add_(0, at, d * xh[g])
    grads = (_unit_bwd(dx, xh, inv_x).to(x.dtype), _unit_bwd(dy, yh, inv_y).to(y.dtype))
    return [t for t, need in zip(grads, needs, strict=True) if need]


def _unit(t: Tensor, like: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    t = t.to(like.dtype)
    if not normalize:
        return t, None
    inv = 1.0 / t.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return t * inv, inv


def _unit_bwd(dt: Tensor, t: Tensor, inv: Tensor | None) -> Tensor:
    return dt if inv is None else inv * (dt - t * (t * dt).sum(-1, keepdim=True))


@_bwd.register_fake
def _(dvalues, x, y, indices, normalize, needs):
    grads = (x.new_empty(x.shape), y.new_empty(y.shape))
    return [t for t, need in zip(grads, needs, strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    x, y, _, ctx.normalize, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, y, output[1])


def _backward(ctx, dvalues, _dindices):
    x, y, indices = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = iter(_bwd(dvalues, x, y, indices, ctx.normalize, needs))
    dx, dy = (next(grads) if need else None for need in needs)
    return dx, dy, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)
