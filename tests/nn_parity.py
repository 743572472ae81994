"""Parity of a module with the original it replaces: outputs and every gradient, by name, held to
the ops' bound: max|ours - fp64| <= 2 * max|original(dtype) - fp64| + tol(dtype).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedmm.testing import TOLERANCE, max_error

# Gradients that are zero by identity (a key's bias) are rounding noise of the others' size.
FLOOR = 0.05


def flatten(out: object) -> list[Tensor]:
    """The tensors in a nest of tuples and dicts, anything else left out."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = tuple(out.values())
    return [t for part in out for t in flatten(part)] if isinstance(out, (tuple, list)) else []


def results(
    module: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, call: Callable | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of `call(module, **inputs)`, default `module(**inputs)`, in `dtype`."""
    module = copy.deepcopy(module).to(dtype)
    module.zero_grad()
    cast = {}
    for name, t in inputs.items():
        floating = isinstance(t, Tensor) and t.is_floating_point()
        cast[name] = t.detach().to(dtype) if floating else t
        if floating and not name.endswith("mask"):
            cast[name].requires_grad_()
    outputs = flatten(call(module, **cast) if call else module(**cast))
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g).to(o)).sum() for o in outputs)
    loss.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, t in [*cast.items(), *module.named_parameters()]:
        if isinstance(t, Tensor) and t.grad is not None:
            found[f"d {name}"] = t.grad
    return found


def assert_parity(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    call: Callable | None = None,
) -> float:
    """Raises where an output or gradient breaks the bound; returns the largest error found.

    Tensors named `*mask` take no gradient. `call(module, **inputs)` serves both modules.
    """
    # The same numbers in every precision: parameters rounded to dtype first.
    want = results(copy.deepcopy(theirs).to(dtype), inputs, torch.float64, call)
    base, got = results(theirs, inputs, dtype, call), results(ours, inputs, dtype, call)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    size = {kind: 0.0 for kind in "od"}
    for name, exact in want.items():
        size[name[0]] = max(size[name[0]], exact.abs().max().item())
    worst = 0.0
    for name, exact in want.items():
        assert got[name].shape == exact.shape, (name, got[name].shape, exact.shape)
        scale = max(exact.abs().max().item(), FLOOR * size[name[0]])
        limit = 2.0 * max_error(base[name], exact) + TOLERANCE[dtype] * scale
        error = max_error(got[name], exact)
        assert error <= limit, f"{name}: max error {error:.3g}, allowed {limit:.3g}"
        worst = max(worst, error)
    return worst


def load_both_ways(ours: nn.Module, theirs: nn.Module) -> None:
    """Loads state_dicts strictly in both directions; both end with the weights of `theirs`."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
