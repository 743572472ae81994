"""Checks that the test files of the four ops share; each takes a case and a backend.

A backend that refuses a case by name skips the test with the refusal as its reason.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from fusedmm import testing
from fusedmm.testing import Case, fused, output_names, values_and_grads


def accepted(case: Case, backend: str) -> Case:
    """The case, or a skip that gives the backend's reason to refuse it."""
    with torch.no_grad():
        try:
            fused(case, backend)
        except NotImplementedError as refusal:
            pytest.skip(str(refusal).replace("\n", " "))
    return case


def skip_inexact_deltas(backend: str, dtype: torch.dtype) -> None:
    """Skips where do * o may differ from do * v though o is v, or o from v."""
    if backend == "triton":
        pytest.skip("rowsum(do * o) and do * v are summed in different orders there")
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the halves that 3xTF32 takes of o may be others than those of v")


def check_oracle(case: Case, backend: str) -> None:
    """Outputs and gradients are as near to fp64 as eager's, within factor 2 and tolerance."""
    testing.assert_no_worse_than_eager(accepted(case, backend), backend)


def run(case: Case, backend: str | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the fused op."""
    return values_and_grads(lambda c: fused(c, backend), case)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit; NaN equals NaN."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        torch.testing.assert_close(
            got[name],
            exact,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def check_gradcheck(case: Case) -> None:
    """The reference's derived backward against finite differences in fp64."""
    names = list(case.tensors)
    leaves = case.at(torch.float64).leaves()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = fused(leaves.replace(**dict(zip(names, tensors, strict=True))), "reference")
        # lse of a row without keys is -inf whatever the inputs: no finite difference there.
        return tuple(t.masked_fill(t == float("-inf"), 0.0) for t in out if t.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(leaves.tensors.values()), atol=1e-7)


def module_of(op: str) -> ModuleType:
    """The module that holds an op's custom ops; its name is also that of the public function."""
    return importlib.import_module(f"fusedmm.ops.{op}")


@contextlib.contextmanager
def recorded(op: str, names: tuple[str, ...] = ("_fwd", "_bwd")) -> Iterator[dict[str, tuple]]:
    """Arguments of the last call of an op's custom ops, by "_fwd" and "_bwd"."""
    module = module_of(op)
    calls: dict[str, tuple] = {}
    originals = {name: getattr(module, name) for name in names}

    def spy(name: str) -> Callable:
        def call(*args: Any) -> Any:
            calls[name] = args
            return originals[name](*args)

        return call

    try:
        for name in names:
            setattr(module, name, spy(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def check_opcheck(case: Case, backend: str) -> None:
    """torch.library.opcheck of forward and backward op: schema, autograd, fake, AOT dispatch."""
    with recorded(case.op) as calls:
        run(accepted(case, backend), backend)
    forward = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in calls["_fwd"]
    ]
    assert any(isinstance(a, Tensor) and a.requires_grad for a in forward)
    ops = torch.ops.fusedmm
    torch.library.opcheck(getattr(ops, f"{case.op}_fwd").default, tuple(forward))
    backward = tuple(a.detach() if isinstance(a, Tensor) else a for a in calls["_bwd"])
    torch.library.opcheck(getattr(ops, f"{case.op}_bwd").default, backward)


def check_compiles(case: Case, backend: str, compiler: str, dynamic: bool | None) -> None:
    """torch.compile(fullgraph=True) gives the bits of eager execution, gradients included."""
    want = run(accepted(case, backend), backend)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=compiler, dynamic=dynamic)
    # Inductor's cache on disk knows nothing of our fakes: after a change there it returns old code.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = values_and_grads(lambda c: compiled(c, backend), case)
    if compiler == "inductor":  # fuses the arithmetic around the op, in another order
        for name, exact in want.items():
            torch.testing.assert_close(got[name], exact, rtol=1e-5, atol=1e-6)
    else:
        assert_same(got, want)


def strided(t: Tensor, layout: str) -> Tensor:
    """The values of `t` under other strides."""
    if layout == "transposed":  # tokens before heads, as projections leave them
        return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.dim() > 2 else column(t)
    if layout == "column_major":
        return column(t)
    if layout == "every_third":
        wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"), dtype=t.dtype).to(t)
        wide[..., ::3] = t
        return wide[..., ::3]
    if layout == "padded_rows":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype).to(t)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]
    if layout == "unaligned":  # one element into its storage, so no vector load is aligned
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype).to(t)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    assert layout == "expanded"
    return t[:1].expand(t.shape)


def column(t: Tensor) -> Tensor:
    """Last two dimensions stored the other way round."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


LAYOUTS = ("transposed", "column_major", "every_third", "padded_rows", "unaligned", "expanded")


def check_strided(case: Case, backend: str, layout: str) -> None:
    """Layout changes nothing but the order of loads; whatever surrounds a view stays unread."""
    views = {k: strided(t, layout) if t.dim() > 1 else t for k, t in case.tensors.items()}
    for key, view in views.items():
        assert not view.isnan().any(), key
    check_oracle(case.replace(**views), backend)


def check_deterministic(case: Case, backend: str) -> None:
    """The same inputs give the same bits, run to run."""
    first = run(accepted(case, backend), backend)
    for _ in range(3):
        assert_same(run(case, backend), first)


@contextlib.contextmanager
def device_memory(mib: int) -> Iterator[None]:
    """No more than `mib` MiB beyond what is taken for torch's CUDA allocator inside the block."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + mib * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """torch's intra-op thread count inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_threads(case: Case, backend: str) -> None:
    """1, 2 and 4 threads agree: within the bound of the oracle, and on `cpu`, whose division of
    labour depends on sizes alone, bit for bit."""
    want = testing.truth(accepted(case, backend))
    base = values_and_grads(testing.eager, case)
    first: dict[str, Tensor] = {}
    for n in (1, 2, 4):
        with threads(n):
            got = run(case, backend)
        for name, exact in want.items():
            limit = testing.bound(name, base[name], exact, case)
            assert testing.max_error(got[name], exact) <= limit, (name, n)
        first = first or got
        if backend == "cpu":
            assert_same(got, first)


def saved_bytes(case: Case, backend: str) -> int:
    """Bytes that autograd keeps for the backward beyond the inputs themselves."""
    case = case.leaves()
    inputs = {t.untyped_storage().data_ptr() for t in case.tensors.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused(case, backend)
    assert any(t.requires_grad for t in out)
    return sum(kept.values())


def check_inputs_untouched(case: Case, backend: str) -> None:
    """Nothing is modified in place, forward or backward."""
    tensors = {**case.tensors, **{k: v for k, v in case.options.items() if isinstance(v, Tensor)}}
    before = {k: t.clone() for k, t in tensors.items()}
    run(accepted(case, backend), backend)
    assert_same(tensors, before)


def check_needs(case: Case, backend: str) -> None:
    """Each input alone gets the gradient it gets among all, and the backward computes only that."""
    want = run(accepted(case, backend), backend)
    for alone in case.tensors:
        leaves = {k: t.detach().requires_grad_(k == alone) for k, t in case.tensors.items()}
        with recorded(case.op) as calls:
            out = fused(case.replace(**leaves), backend)
            g = torch.Generator().manual_seed(1)
            weights = [torch.randn(o.shape, generator=g).to(case.dtype).to(o) for o in out]
            ends = [(o, w) for o, w in zip(out, weights, strict=True) if o.requires_grad]
            if len(out) == 1 and out[0].dim() == 0:
                ends = [(out[0], torch.ones_like(out[0]))]
            (grad,) = torch.autograd.grad([o for o, _ in ends], leaves[alone], [w for _, w in ends])
        assert sum(calls["_bwd"][-2]) == 1, "needs asks for more than one gradient"
        torch.testing.assert_close(grad, want[f"d{alone}"], rtol=1e-5, atol=1e-6, equal_nan=True)
    with recorded(case.op) as calls:
        out = fused(case, backend)
    assert not any(o.requires_grad for o in out)
    with torch.no_grad():
        assert not any(o.requires_grad for o in fused(case.leaves(), backend))


def check_double_backward(case: Case, backend: str) -> None:
    """A second derivative raises and says what it cannot do."""
    case = accepted(case, backend).leaves()
    out = next(o for o in fused(case, backend) if o.requires_grad)
    leaf = next(iter(case.tensors.values()))
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=f"fusedmm.*{case.op}|{case.op}"):
        torch.autograd.grad(grad.square().sum(), leaf)


def check_autocast(case: Case, backend: str, dtype: torch.dtype) -> None:
    """In an autocast region the op casts its data and computes as it does outside, bit for bit."""
    data = [k for k in testing.POSITIONAL[case.op] if not k.startswith("logit")]
    half = case.replace(**{k: case.tensors[k].to(dtype) for k in data})
    want = run(accepted(half, backend), backend)
    device = case.tensors[data[0]].device.type

    def call(c: Case) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype=dtype):
            return fused(c, backend)

    got = values_and_grads(call, case)
    for name in output_names(case):
        assert got[name].dtype == want[name].dtype
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)
    for name in case.tensors:
        assert got[f"d{name}"].dtype == case.tensors[name].dtype
    with torch.autocast(device, dtype=dtype):  # a backward inside the region is no other
        inside = values_and_grads(lambda c: fused(c, backend), half)
    assert_same(inside, want)


class _Module(torch.nn.Module):
    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.case, self.backend = case, backend

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """The op on `tensors` and the case's other options."""
        return fused(self.case.replace(**tensors), self.backend)


def check_export(case: Case, backend: str) -> None:
    """torch.export keeps the op as one node, and the program gives the same bits."""
    want = fused(accepted(case, backend), backend)
    program = torch.export.export(_Module(case, backend), (), kwargs=case.tensors)
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"fusedmm.{case.op}_fwd.default" in targets
    for got, exact in zip(program.module()(**case.tensors), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


def check_meta(case: Case) -> None:
    """Meta tensors get the shapes and dtypes that real ones get."""
    want = run(case, "reference")
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.options.items()}
    meta = case.replace(**{k: t.to("meta") for k, t in case.tensors.items()}, **options).leaves()
    out = fused(meta, "reference")
    for name, got in zip(output_names(case), out, strict=True):
        assert (got.shape, got.dtype) == (want[name].shape, want[name].dtype), name
    sum(o.sum() for o in out).backward()
    for leaf in meta.tensors.values():
        assert leaf.grad.shape == leaf.shape
