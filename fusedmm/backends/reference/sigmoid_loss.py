"""sigmoid_loss in plain torch: softplus(-z * s) summed over each row, and its backward."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .contrastive_loss import dots, matches, unit, unit_bwd
from .softmax import full_precision


def reject(problem) -> list[str]:
    """The reference runs everything."""
    return []


@full_precision
def fwd(x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize) -> Tensor:
    """Row sums of softplus(-z * s), [G, M]; logit_scale [G, M] or [1], logit_bias [1]."""
    scale = logit_scale[..., None]
    s = scale * dots(x, y, normalize) + logit_bias
    pos, _ = matches(positives, ids_x, ids_y, False, s)
    return -logsigmoid(torch.where(pos, s, -s)).sum(-1)


@full_precision
def bwd(
    dloss, x, y, logit_scale, logit_bias, positives, ids_x, ids_y, normalize, needs
) -> list[Tensor]:
    """Gradients of (x, y, logit_scale [G, M], logit_bias [G, M]) where `needs`; dloss [G, M]."""
    xh, inv_x = unit(x, normalize)
    yh, inv_y = unit(y, normalize)
    scale = logit_scale[..., None]
    products = xh @ yh.mT
    s = scale * products + logit_bias
    pos, _ = matches(positives, ids_x, ids_y, False, s)
    ds = dloss[..., None] * torch.where(pos, -torch.sigmoid(-s), torch.sigmoid(s))
    dx = unit_bwd(scale * (ds @ yh), xh, inv_x)
    dy = unit_bwd((scale * ds).mT @ xh, yh, inv_y)
    grads = (dx.to(x.dtype), dy.to(y.dtype), (ds * products).sum(-1), ds.sum(-1))
    return [g for g, need in zip(grads, needs, strict=True) if need]
