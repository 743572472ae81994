"""Calling projections: those that read one stream as one product, plain ones on the fast GEMM."""

from torch import Tensor, nn

from ..ops.linear import linear


def plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias and nothing more: no adapter, no hook, no shards."""
    if type(layer) is not nn.Linear or hasattr(layer.weight, "device_mesh"):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return not any(hooks) and not layer._backward_pre_hooks


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of up to three layers makes of x, as one product where all are plain.

        q, k, v = project(x, query, key, value)

    Parameters keep their names; a layer that is more than its weight and bias is called.
    """
    if not all(map(plain, layers)) or len({layer.bias is None for layer in layers}) > 1:
        return tuple(layer(x) for layer in layers)
    y = linear(x, *((layer.weight, layer.bias) for layer in layers))
    return y.split([layer.out_features for layer in layers], -1)
