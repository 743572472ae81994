"""fusion_attention against its equation with scores stored, on every backend that has it."""

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from fusedmm import backends
from fusedmm.ops import fusion_attention as op
from fusedmm.testing import TOLERANCE, max_error

# B, H, M, N, D, Dv; tiles are 96 wide on the CPU.
SHAPES = {
    "aligned": (1, 4, 192, 96, 64, 64),
    "three_tiles": (2, 3, 301, 205, 48, 48),
    "short_x": (1, 2, 37, 210, 33, 20),
    "one_head": (2, 1, 130, 17, 16, 24),
    "one_row": (2, 2, 1, 130, 8, 8),
    "one_column": (1, 3, 230, 1, 20, 9),
    "many_chunks": (1, 2, 2100, 40, 16, 16),
    "wide": (1, 2, 131, 97, 257, 256),
    "repacked_columns": (1, 1, 197, 1500, 256, 200),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("open", "masked", "dead")


@pytest.fixture(autouse=True)
def _present(request: pytest.FixtureRequest) -> None:
    has = "backend" in request.fixturenames
    backend = request.getfixturevalue("backend") if has else None
    if has and (backend, "fusion_attention") not in backends._modules:
        pytest.skip(f"{backend} has no fusion_attention")


def make(shape: tuple[int, ...], mask: str, dtype: torch.dtype = torch.float32) -> dict:
    B, H, M, N, D, Dv = shape
    case = {
        "x": torch.randn(B, M, D), "k": torch.randn(B, H, N, D) * D**-0.5,
        "v": torch.randn(B, H, N, Dv), "bias": torch.randn(B, H, N),
    }  # fmt: skip
    case = {name: t.to(dtype) for name, t in case.items()}
    if mask != "open":
        case["mask_x"], case["mask_y"] = torch.rand(B, M) > 0.3, torch.rand(B, N) > 0.3
        if mask == "dead":
            case["mask_x"][0] = False
            case["mask_y"][-1] = False
    return case


def eager(x, k, v, bias=None, mask_x=None, mask_y=None) -> tuple[Tensor, Tensor]:
    s = x[:, None] @ k.mT
    if bias is not None:
        s = s + bias[:, :, None]

    def softmax(t: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return t.softmax(-1)
        drop = ~keep[:, None, None, :]
        return t.masked_fill(drop, torch.finfo(t.dtype).min).softmax(-1).masked_fill(drop, 0.0)

    o = (softmax(s, mask_y) @ v).sum(1)
    return o, softmax(s.mT, mask_x) @ x[:, None]


def run(function, case: dict, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed combination of them, by name."""
    leaves = {
        name: (t.detach().to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t)
        for name, t in case.items()
    }
    outputs = function(**leaves, **options)
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=g).to(t)).sum() for t in outputs)
    loss.backward()
    found = dict(zip("oz", (t.detach() for t in outputs), strict=True))
    return found | {f"d{n}": t.grad for n, t in leaves.items() if t.is_floating_point()}


def assert_near(got: dict, case: dict, dtype: torch.dtype) -> None:
    want, base = run(eager, case, torch.float64), run(eager, case)
    largest = {kind: max(t.abs().max().item() for n, t in want.items() if (n[0] == "d") == kind)
               for kind in (False, True)}  # fmt: skip
    for name, exact in want.items():
        # A gradient that is zero by identity is rounding noise of the others' size.
        scale = max(exact.abs().max().item(), 0.05 * largest[name[0] == "d"])
        limit = 2.0 * max_error(base[name], exact) + TOLERANCE[dtype] * scale
        assert max_error(got[name], exact) <= limit, (name, max_error(got[name], exact), limit)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_oracle(backend: str, shape, mask: str) -> None:
    case = make(shape, mask)
    assert_near(run(op.fusion_attention, case, backend=backend), case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_half_precision(backend: str, dtype: torch.dtype, mask: str) -> None:
    case = make(SHAPES["three_tiles"], mask, dtype)
    assert_near(run(op.fusion_attention, case, backend=backend), case, dtype)


def test_without_bias_strided_and_large(backend: str) -> None:
    case = make(SHAPES["three_tiles"], "masked")
    del case["bias"]
    wide = torch.full((2, 48, 301), float("nan")).mT
    wide.copy_(300.0 * case["x"])
    case["x"] = wide
    got = run(op.fusion_attention, case, backend=backend)
    assert_near(got, case, torch.float32)
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("need", ["x", "k", "v", "bias"])
def test_only_one_gradient(backend: str, need: str) -> None:
    case = make(SHAPES["three_tiles"], "masked")
    want = run(op.fusion_attention, case, backend=backend)[f"d{need}"]
    case[need] = case[need].requires_grad_()
    o, z = op.fusion_attention(**case, backend=backend)
    g = torch.Generator().manual_seed(1)
    (o * torch.randn(o.shape, generator=g)).sum().add(
        (z * torch.randn(z.shape, generator=g)).sum()
    ).backward()
    torch.testing.assert_close(case[need].grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["o", "z"])
def test_unused_output(backend: str, used: int) -> None:
    """What the loss does not depend on counts as one with a gradient of zero."""
    leaves = {k: t.requires_grad_() for k, t in make(SHAPES["three_tiles"], "open").items()}
    outs = op.fusion_attention(**leaves, backend=backend)
    got = torch.autograd.grad(outs[used].square().sum(), list(leaves.values()), retain_graph=True)
    ends = [out.square().sum() * (i == used) for i, out in enumerate(outs)]
    want = torch.autograd.grad(sum(ends), list(leaves.values()))
    assert want[0].abs().max() > 0  # of x, which both take
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_dropout_is_the_references(backend: str) -> None:
    """One seed, one mask: every backend drops the same weights, forward and backward."""
    case = make((2, 3, 131, 101, 24, 40), "masked")
    torch.manual_seed(5)
    want = run(op.fusion_attention, case, dropout_p=0.4, backend="reference")
    torch.manual_seed(5)
    got = run(op.fusion_attention, case, dropout_p=0.4, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
    open_ = run(op.fusion_attention, case, backend=backend)
    assert not torch.allclose(got["o"], open_["o"], atol=1e-2)


def test_gradcheck() -> None:
    case = {k: t.double() if t.is_floating_point() else t
            for k, t in make((2, 2, 5, 4, 3, 2), "dead").items()}  # fmt: skip
    names = ("x", "k", "v", "bias")
    masks = {k: case[k] for k in ("mask_x", "mask_y")}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        return op.fusion_attention(**named, **masks, backend="reference")

    assert torch.autograd.gradcheck(function, tuple(case[n].requires_grad_() for n in names))


def test_opcheck(backend: str) -> None:
    c = make((1, 2, 9, 5, 4, 3), "masked")
    leaves = [c[n].requires_grad_() for n in "xkv"]
    bias = c["bias"].requires_grad_()
    args = (*leaves, c["mask_x"], c["mask_y"], bias, 0.0, None, backend)
    torch.library.opcheck(op._fwd._custom, args)
    with torch.no_grad():
        o, z, lse_x, lse_y = op._fwd(*args)
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    zeros = (torch.zeros_like(lse_x).float(), torch.zeros_like(lse_y).float())
    torch.library.opcheck(op._bwd._custom, (
        o, z, *zeros, *plain[:6], z, lse_x, lse_y, 0.0, None, [True] * 4, backend
    ))  # fmt: skip


def test_compiles(backend: str) -> None:
    case = make((1, 2, 33, 12, 8, 8), "masked")
    compiled = torch.compile(op.fusion_attention, fullgraph=True, backend="aot_eager")
    with torch._inductor.config.patch(force_disable_caches=True):
        got = run(compiled, case, backend=backend)
    want = run(op.fusion_attention, case, backend=backend)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_keeps_nothing_of_the_scores(backend: str) -> None:
    """For backward: x, k, v, z and lse; not o per head, not s."""
    B, H, M, N, D = 1, 4, 500, 40, 32
    x, k, v = torch.randn(B, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = [t.requires_grad_() for t in (x, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = op.fusion_attention(*leaves, backend=backend)
    assert sum(kept.values()) == 4 * (M * D + 3 * H * N * D) + 8 * H * (M + N)
    del outputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected 3 dimensions \[B, M, D\]"),
        ({"k": torch.zeros(1, 2, 5, 7)}, r"k: expected shape \[1, 2, 5, 4\] to match x"),
        ({"v": torch.zeros(1, 3, 5, 7)}, r"v: expected shape \[1, 2, 5, 7\] to match k"),
        ({"bias": torch.zeros(1, 2, 6)}, r"bias: expected shape \[1, 2, 5\] to match k"),
        ({"mask_x": torch.ones(1, 8, dtype=torch.bool)}, r"mask_x: expected shape \[1, 9\]"),
        ({"dropout_p": 1.5}, r"dropout_p: expected a number in \[0, 1\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_rejects_bad_input(backend: str, change: dict, message: str) -> None:
    case = {**make((1, 2, 9, 5, 4, 3), "open"), **change}
    with pytest.raises(ValueError, match="fusion_attention: " + message):
        op.fusion_attention(**case, backend=backend)
