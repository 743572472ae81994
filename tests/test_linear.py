"""The projections' product: values, gradients, strides, and where it is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedmm.nn.project import plain, project
from fusedmm.ops import linear as op


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 130, 160, 96), (0, 4, 8, 8), (1, 1, 2048, 8)])
def test_matches_f_linear(shape, biased: bool) -> None:
    B, M, C, E = shape
    x = torch.randn(B, C, M).mT.requires_grad_()  # rows strided, as a transposed input has them
    w, b = torch.randn(E, C, requires_grad=True), torch.randn(E, requires_grad=True)
    leaves = (x, w, b) if biased else (x, w)
    y, want = op.linear(x, (w, b if biased else None)), F.linear(x, w, b if biased else None)
    dy = torch.randn(B, E, M).mT
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)
    for a, e in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, e, atol=2e-4, rtol=1e-5)
    (only,) = torch.autograd.grad(op.linear(x.detach(), (w, None)), w, dy)
    torch.testing.assert_close(only, dy.flatten(0, 1).T @ x.flatten(0, 1), atol=2e-4, rtol=1e-5)


def test_opcheck_autocast_and_other_dtypes() -> None:
    x, layer = torch.randn(2, 3, 4, requires_grad=True), nn.Linear(4, 5)
    other = nn.Linear(4, 2)
    args = (x, layer.weight, layer.bias, other.weight, other.bias, None, None)
    torch.library.opcheck(op._fwd._custom, args)
    dy = torch.randn(2, 3, 7)
    torch.library.opcheck(
        op._bwd._custom,
        (dy, x.detach(), layer.weight.detach(), other.weight.detach(), None, [True] * 3),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.linear(x, (layer.weight, layer.bias)), layer(x))
    double = layer.double()
    y = op.linear(x.double(), (double.weight, double.bias))
    assert torch.equal(y, double(x.double()))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_project_is_one_product_of_plain_layers(biased: bool) -> None:
    x = torch.randn(2, 9, 6, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(6, n, bias=biased) for n in (3, 3, 5))
    layers[1].weight.requires_grad_(False)
    found = []
    for parts in (project(x, *layers), [layer(x) for layer in layers]):
        leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(sum(p.square().sum() for p in parts), leaves)
        found.append([*parts, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    calls = []
    layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert plain(layers[0]) and not plain(layers[1])
    assert torch.equal(project(x, *layers)[2], layers[2](x)) and calls
    assert not plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


def test_keeps_the_input_and_the_parameters_only() -> None:
    x, layers = torch.randn(4, 6, requires_grad=True), [nn.Linear(6, 3) for _ in range(3)]
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()), lambda t: t):
        project(x, *layers)
    assert kept == {x.data_ptr(), *(layer.weight.data_ptr() for layer in layers)}
