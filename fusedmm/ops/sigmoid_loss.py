"""sigmoid_loss: pairwise sigmoid (SigLIP) without the logits. Public function, op, autograd."""

import torch
from torch import Tensor

from .. import backends, check, distributed, problem
from . import pairs
from ._call import op, plan
from ._common import autocast

OP = "sigmoid_loss"


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group=None,
    backend: str | None = None,
) -> Tensor:
    """Pairwise sigmoid loss over all M x N pairs; row i of x matches row i of y, or equal ids.

        s = logit_scale * x @ y.mT + logit_bias                 # [..., M, N], never stored
        z = 2 * torch.eye(s.shape[-1]) - 1                      # +1 on matches, -1 elsewhere
        loss = softplus(-z * s).sum(-1).mean()

    Args:
        x, y: [..., M, D], [..., N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        logit_scale: the multiplier itself (exp already applied), float, scalar or [..., M].
        logit_bias: float or scalar.
        ids_x, ids_y: [..., M], [..., N] int64; equal ids are matches. Default row i and column i,
            which needs M == N.
        normalize: L2-normalise the rows of x and y inside the op.
        reduction: "mean" (sum over pairs / rows of x), "sum", or "none".
        group: torch.distributed process group; x and y are this rank's rows of the concatenation
            in rank order. Same loss on every rank; gradients that averaged over ranks are those of
            one process. reduction="none" gives this rank's rows.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the first that accepts.
    Returns: scalar fp32 in nats per row, or the sum of each row [..., M] with reduction="none".
    Memory: O((M + N) * D). The native backends also keep raw products for a backward, 64 MiB of
        them at most, where M, N >= 1024: cpu if D >= 512, cuda in fp32 or if D > 256.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: SigLIP, arXiv:2303.15343.
    """
    with distributed.joint_validation(OP, group):
        check.choice(OP, "reduction", reduction, ("mean", "sum", "none"))
        x, y = autocast(x, y)
        square = ids_x is None and group is None
        asked, name = plan(
            OP, backend, problem.pair_loss,
            OP, x, y, logit_scale, None, ids_x, ids_y, normalize, square,
        )  # fmt: skip
        if isinstance(logit_bias, Tensor):
            check.floating(OP, "logit_bias", logit_bias)
            check.device(OP, ("x", x), ("logit_bias", logit_bias))
            if logit_bias.numel() != 1:
                raise check.bad(OP, "logit_bias", "a scalar", f"shape {list(logit_bias.shape)}")
        else:
            check.number(OP, "logit_bias", logit_bias)
    lead, G, M, N = x.shape[:-2], asked.G, asked.M, asked.N
    x, y = x.reshape(G, M, asked.D), y.reshape(G, N, asked.D)
    scale, bias = pairs.as_rows(logit_scale, x, G, M), pairs.as_rows(logit_bias, x, 1, 1)
    if ids_x is not None:
        ids_x, ids_y = ids_x.reshape(G, M), ids_y.reshape(G, N)
    if group is not None:
        loss = distributed.sigmoid_loss(
            asked, x, y, scale, bias, ids_x, ids_y,
            reduction=reduction, group=group, backend=name,
        )  # fmt: skip
        return loss.reshape(*lead, M) if reduction == "none" else loss
    positives = pairs.default_positives(G, M, x.device) if ids_x is None else None
    loss, _ = _fwd(
        x,
        y,
        scale,
        bias,
        positives,
        ids_x,
        ids_y,
        normalize,
        pairs.kept_dots(name, asked, x, y, scale, bias),
        name,
    )
    if reduction == "none":
        return loss.reshape(*lead, M)
    return loss.sum() if reduction == "sum" else loss.sum() / max(G * M, 1)


@op("fusedmm::sigmoid_loss_fwd")
def _fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    normalize: bool,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = backends.load(backend, "sigmoid_loss")
    dots = module.kept_dots(keep, x) if keep else x.new_empty((0,), dtype=torch.float32)
    loss = module.fwd(
        x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize, *pairs.given(dots)
    )
    return loss, dots


@_fwd.register_fake
def _(x, y, logit_scale, *rest):
    return logit_scale.new_empty(x.shape[:2]), x.new_empty((rest[-2],), dtype=torch.float32)


@op("fusedmm::sigmoid_loss_bwd")
def _bwd(
    dloss: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    dots: Tensor,
    normalize: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return backends.load(backend, "sigmoid_loss").bwd(
        dloss, x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize, needs,
        *pairs.given(dots),
    )  # fmt: skip


@_bwd.register_fake
def _(dloss, x, y, logit_scale, *rest):
    rows = logit_scale.new_empty(dloss.shape)
    grads = (x.new_empty(x.shape), y.new_empty(y.shape), rows, torch.empty_like(rows))
    return [t for t, need in zip(grads, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.normalize, _, ctx.backend = inputs
    dots = output[1]
    ctx.mark_non_differentiable(dots)
    ctx.set_materialize_grads(False)  # zeros as large as the kept products otherwise
    ctx.save_for_backward(*tensors, dots)


def _backward(ctx, dloss, _):
    tensors = ctx.saved_tensors
    x, _, scale = tensors[:3]
    if dloss is None:
        dloss = scale.new_zeros(x.shape[:2])
    needs = list(ctx.needs_input_grad[:4])
    grads = iter(_bwd(dloss, *tensors, ctx.normalize, needs, ctx.backend))
    dx, dy, dscale, dbias = (next(grads) if n else None for n in needs)
    if dscale is not None and scale.dim() == 1:
        dscale = dscale.sum().reshape(1)
    if dbias is not None:
        dbias = dbias.sum().reshape(1)
    return dx, dy, dscale, dbias, *[None] * 6


_fwd.register_autograd(_backward, setup_context=_setup)
_fwd.register_loop()
_bwd.register_loop()
