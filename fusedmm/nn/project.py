"""Calling projections: those that read one stream as one product, plain ones on the fast GEMM."""

import torch
from torch import Tensor, nn

from ..ops.linear import linear


def plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias and nothing more: no adapter, no hook, no shards."""
    if type(layer) is not nn.Linear or hasattr(layer.weight, "device_mesh"):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return not any(hooks) and not layer._backward_pre_hooks


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x, as one product where all of them are plain and have a bias.

        q, k, v = project(x, query, key, value)                 # linear(x, cat of weights)

    The weights are concatenated in the call, so parameters keep their names; others are called.
    """
    if not all(plain(layer) and layer.bias is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    if len(layers) == 1:
        return (linear(x, layers[0].weight, layers[0].bias),)
    weight, bias = (torch.cat([getattr(m, name) for m in layers]) for name in ("weight", "bias"))
    return linear(x, weight, bias).split([m.out_features for m in layers], -1)
