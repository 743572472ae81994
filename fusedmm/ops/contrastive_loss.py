"""contrastive_loss: symmetric InfoNCE without the logits. Public function, custom op, autograd."""

import torch
from torch import Tensor

from .. import backends, check, distributed, problem
from . import pairs, self_similarity
from ._call import op, plan
from ._common import autocast

OP = "contrastive_loss"


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    duplicates: str = "positive",
    direction: str = "both",
    label_smoothing: float = 0.0,
    normalize: bool = False,
    exclude_self: bool = False,
    reduction: str = "mean",
    group=None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Symmetric InfoNCE (CLIP) of M rows against N columns, batched over leading dimensions.

        s = logit_scale * x @ y.mT                              # [..., M, N], never stored
        loss_x = s.logsumexp(-1) - s.diagonal(dim1=-2, dim2=-1)
        loss_y = s.logsumexp(-2) - s.diagonal(dim1=-2, dim2=-1)
        loss = (loss_x.mean() + loss_y.mean()) / 2

    Args:
        x, y: [..., M, D], [..., N, D] fp32/fp16/bf16 (fp64 on reference), any strides.
        logit_scale: the multiplier itself (exp already applied), float, scalar or [..., M].
        positives: [..., M] int64, row i matches y[positives[i]]; default i, which needs M == N.
            Columns that no row points at are negatives only.
        ids_x, ids_y: [..., M], [..., N] int64; equal ids are true matches as well.
        duplicates: "positive", the target is uniform over the matches; "ignore", matches other
            than the positive leave the denominator.
        direction: "both" (mean of the two), "x" (rows only), "y" (columns only).
        label_smoothing: share of the target spread evenly over the denominator, in [0, 1].
        normalize: L2-normalise the rows of x and y inside the op.
        exclude_self: y is x, and entry (i, i) neither a match nor a negative (NT-Xent, SupCon), at
            half the work. Matches are positives that point back at each other, or ids; logit_scale
            is a scalar; losses of columns are those of rows.
        reduction: "mean" over the rows that have a match, "sum", or "none".
        group: torch.distributed process group; x and y are this rank's rows, positives and ids
            count over the concatenation in rank order. Same loss on every rank; gradients that
            averaged over ranks are those of one process. reduction="none" gives this rank's rows.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the first that accepts.
    Returns: scalar fp32 in nats, or (loss_x [..., M], loss_y [..., N]) with reduction="none".
    Memory: O((M + N) * D). The native backends also keep raw products for a backward, 64 MiB of
        them at most, where M, N >= 1024: cpu if D >= 512, cuda in fp32 or if D > 256.
    Raises: ValueError, bad shape, dtype or device. TypeError, not a floating tensor.
        NotImplementedError, no backend can run it.
    Source: InfoNCE, arXiv:1807.03748; CLIP, arXiv:2103.00020.
    """
    with distributed.joint_validation(OP, group):
        check.choice(OP, "duplicates", duplicates, ("positive", "ignore"))
        check.choice(OP, "direction", direction, ("both", "x", "y"))
        check.choice(OP, "reduction", reduction, ("mean", "sum", "none"))
        check.fraction(OP, "label_smoothing", label_smoothing)
        check.flag(OP, "exclude_self", exclude_self)
        if exclude_self:
            _check_self(x, y, logit_scale, positives, ids_x, ids_y, duplicates)
        x, y = autocast(x, y)
        by_id = ids_x is not None and duplicates == "positive"
        square = positives is None and not by_id and group is None
        asked, name = plan(
            OP, backend, problem.pair_loss,
            OP, x, y, logit_scale, positives, ids_x, ids_y, normalize, square,
        )  # fmt: skip
    lead, G, M, N = x.shape[:-2], asked.G, asked.M, asked.N
    x, y = x.reshape(G, M, asked.D), y.reshape(G, N, asked.D)
    scale = pairs.as_rows(logit_scale, x, G, M)
    if ids_x is not None:
        ids_x, ids_y = ids_x.reshape(G, M), ids_y.reshape(G, N)
    if group is not None:
        loss = distributed.contrastive_loss(
            asked, x, y, scale, positives, ids_x, ids_y,
            duplicates=duplicates, direction=direction, label_smoothing=float(label_smoothing),
            exclude_self=exclude_self, reduction=reduction, group=group, backend=name,
        )  # fmt: skip
        if reduction == "none":
            return loss[0].reshape(*lead, M), loss[1].reshape(*lead, N)
        return loss
    diagonal = positives is None and M == N and not exclude_self
    if diagonal:
        positives = pairs.default_positives(G, M, x.device)
    elif positives is not None:
        positives = positives.reshape(G, M)
    if exclude_self:
        y = x.detach()  # the gradient of both roles comes as that of x
    keep = 0 if exclude_self else pairs.kept_dots(name, asked, x, y, scale)
    loss_x, loss_y, stats_x, stats_y, _ = _fwd(
        x,
        y,
        scale,
        positives,
        ids_x,
        ids_y,
        duplicates == "ignore",
        float(label_smoothing),
        normalize,
        exclude_self or direction != "y",
        not exclude_self and direction != "x",
        exclude_self,
        keep,
        name,
    )
    if exclude_self:
        loss_y, stats_y = loss_x, stats_x
    if reduction == "none":
        return loss_x.reshape(*lead, M), loss_y.reshape(*lead, N)
    parts = [(loss_x, stats_x)] if direction != "y" else []
    if direction != "x":
        parts.append((loss_y, stats_y))
    return pairs.total(parts, reduction, diagonal)


def _check_self(x, y, logit_scale, positives, ids_x, ids_y, duplicates: str) -> None:
    if y is not x:
        raise check.bad(OP, "y", "the very tensor x, for exclude_self", "another tensor")
    if ids_y is not ids_x:
        raise check.bad(OP, "ids_y", "the very tensor ids_x, for exclude_self", "another tensor")
    if positives is None and (ids_x is None or duplicates == "ignore"):
        raise check.bad(OP, "positives", "a tensor, or ids, for exclude_self", None)
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        got = f"shape {list(logit_scale.shape)}"
        raise check.bad(OP, "logit_scale", "a scalar, for exclude_self", got)


@op("fusedmm::contrastive_loss_fwd")
def _fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    ignore: bool,
    label_smoothing: float,
    normalize: bool,
    want_x: bool,
    want_y: bool,
    exclude_self: bool,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs.check_positives(*pairs.range_of(positives), y.shape[1])
    module = backends.load(backend, "contrastive_loss")
    dots = module.kept_dots(keep, x) if keep else x.new_empty((0,), dtype=torch.float32)
    if exclude_self:
        self_similarity.check_mutual(positives)
        stats_x = self_similarity.fwd(module, x, logit_scale, positives, ids_x, ignore, normalize)
        stats_y = torch.zeros_like(stats_x)
    else:
        stats_x, stats_y = module.fwd(
            x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, want_x, want_y,
            *pairs.given(dots),
        )  # fmt: skip
    loss_x, loss_y = (
        pairs.row_loss(s, label_smoothing, module) if wanted else torch.zeros_like(s[0])
        for s, wanted in ((stats_x, want_x), (stats_y, want_y))
    )
    return loss_x.to(logit_scale.dtype), loss_y.to(logit_scale.dtype), stats_x, stats_y, dots


@_fwd.register_fake
def _(x, y, logit_scale, *rest):
    G, M, N = x.shape[0], x.shape[1], y.shape[1]
    losses = (logit_scale.new_empty((G, M)), logit_scale.new_empty((G, N)))
    stats = (x.new_empty((6, G, n), dtype=torch.float64) for n in (M, N))
    return (*losses, *stats, x.new_empty((rest[-2],), dtype=torch.float32))


@op("fusedmm::contrastive_loss_bwd")
def _bwd(
    dloss_x: Tensor,
    dloss_y: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    positives: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    stats_x: Tensor,
    stats_y: Tensor,
    dots: Tensor,
    ignore: bool,
    label_smoothing: float,
    normalize: bool,
    exclude_self: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    module = backends.load(backend, "contrastive_loss")
    coef_x = pairs.coefficients(stats_x, dloss_x, label_smoothing, module)
    if exclude_self:
        return self_similarity.bwd(
            module, coef_x, x, logit_scale, positives, ids_x, ignore, normalize, needs[::2]
        )
    coef_y = pairs.coefficients(stats_y, dloss_y, label_smoothing, module)
    return module.bwd(
        coef_x, coef_y, x, y, logit_scale, positives, ids_x, ids_y, ignore, normalize, needs,
        *pairs.given(dots),
    )  # fmt: skip


@_bwd.register_fake
def _(dloss_x, dloss_y, x, y, logit_scale, *rest):
    grads = (x.new_empty(x.shape), y.new_empty(y.shape), logit_scale.new_empty(dloss_x.shape))
    return [t for t, need in zip(grads, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.ignore, ctx.label_smoothing, ctx.normalize = inputs[:9]
    ctx.want_x, ctx.want_y, ctx.exclude_self, _, ctx.backend = inputs[9:]
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros as large as the kept products otherwise
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx, dloss_x, dloss_y, *_):
    x, y, scale, positives, ids_x, ids_y, stats_x, stats_y, dots = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if dloss_x is None or not ctx.want_x:
        dloss_x = scale.new_zeros(stats_x.shape[1:])
    if dloss_y is None or not ctx.want_y:
        dloss_y = scale.new_zeros(stats_y.shape[1:])
    grads = iter(
        _bwd(dloss_x, dloss_y, x, y, scale, positives, ids_x, ids_y, stats_x, stats_y, dots,
             ctx.ignore, ctx.label_smoothing, ctx.normalize, ctx.exclude_self, needs, ctx.backend)
    )  # fmt: skip
    dx, dy, dscale = (next(grads) if n else None for n in needs)
    if dscale is not None and scale.dim() == 1:
        dscale = dscale.sum().reshape(1)
    return dx, dy, dscale, *[None] * 11


_fwd.register_autograd(_backward, setup_context=_setup)
_fwd.register_loop()
_bwd.register_loop()
