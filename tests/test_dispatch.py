"""Which backend runs a call: by name, by region, by environment, or the first that accepts; and
what a refusal says. The real table of backends, and stand-ins where a machine has too few.
"""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import harness
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmm
from fusedmm import backends, dispatch, problem
from fusedmm.backends.native import extension
from fusedmm.ops import _call
from fusedmm.testing import LOSSES, POSITIONAL, AttentionShape, PairShape, fused, make_case

OPS = tuple(POSITIONAL)


def small(op: str, dtype: torch.dtype = torch.float32, **features):
    """A case of any op."""
    shape = PairShape(5, 5, 8) if op in LOSSES else AttentionShape(1, 2, 5, 4, 8, 6)
    return make_case(op, shape, dtype, **features)


def used(op: str, call) -> str:
    """The backend name that reaches the custom op when `call()` runs."""
    with harness.recorded(op) as calls:
        call()
    return calls["_fwd"][-1]


@pytest.fixture
def table(monkeypatch):
    """Stand-in for the table of backends: name -> reasons."""
    reasons: dict[str, list[str]] = {name: [] for name in dispatch.PRIORITY}
    monkeypatch.setattr(backends, "reject", lambda name, op, asked: reasons[name])
    return reasons


def asked(device: str = "cpu") -> problem.AttentionProblem:
    """A problem to select for."""
    side = problem.Side(5, 4, 96, 8)
    return problem.AttentionProblem("bi_attention", 1, 2, side, side, torch.bfloat16, device)


@pytest.mark.parametrize(
    ("arch", "runs"),
    [
        ("8.0", [(8, 0), (8, 6)]),
        ("8.6", [(8, 6)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)]),
        ("9.0a", [(9, 0)]),
        ("9.0a+PTX", [(9, 0)]),
        ("10.0f", [(10, 0), (10, 3)]),
        ("10.0a", [(10, 0)]),
    ],
)
def test_which_devices_run_an_architecture(arch, runs):
    devices = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [d for d in devices if extension._runs(arch, d)] == runs


def test_priority():
    assert dispatch.PRIORITY == ("cuda", "triton", "cpu", "reference")


@pytest.mark.parametrize("first", range(4))
def test_takes_the_first_that_accepts(table, first):
    for name in dispatch.PRIORITY[:first]:
        table[name] = ["no"]
    assert dispatch.select("bi_attention", asked(), None) == dispatch.PRIORITY[first]


def test_refusal_lists_each_backend_with_its_reasons(table):
    table.update(cuda=["D=96 not in {32, 64, 128}"], triton=["not installed"])
    table.update(cpu=["inputs are on cuda", "too old"], reference=["tired"])
    with pytest.raises(NotImplementedError) as caught:
        dispatch.select("bi_attention", asked("cuda"), None)
    assert str(caught.value) == (
        "bi_attention: no backend can run bfloat16 B=1 H=2 M=5 N=4 D=96 Dv=8 on cuda\n"
        "  cuda: D=96 not in {32, 64, 128}\n"
        "  triton: not installed\n"
        "  cpu: inputs are on cuda; too old\n"
        "  reference: tired"
    )


@pytest.mark.parametrize("name", dispatch.PRIORITY)
def test_a_named_backend_never_falls_back(table, name):
    table[name] = ["not today"]
    with pytest.raises(NotImplementedError) as caught:
        dispatch.select("bi_attention", asked(), name)
    first, second = str(caught.value).split("\n")
    assert first.startswith("bi_attention: no backend can run bfloat16")
    assert second == f"  {name}: not today"
    with fusedmm.use_backend(name), pytest.raises(NotImplementedError, match="not today"):
        dispatch.select("bi_attention", asked(), None)


def test_reference_on_a_gpu_warns(table):
    """O(M * N) memory is no silent choice; a named reference was asked for."""
    table.update(cuda=["a"], triton=["b"], cpu=["inputs are on cuda"])
    with pytest.warns(RuntimeWarning, match="stores the whole score matrix"):
        assert dispatch.select("bi_attention", asked("cuda"), None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select("bi_attention", asked("cuda"), "reference")
        dispatch.select("bi_attention", asked("cpu"), None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_refuse_cpu_tensors(op, name):
    with pytest.raises(NotImplementedError, match=f"^{op}: no backend can run(.|\n)*  {name}: "):
        fused(small(op), name)


@pytest.mark.parametrize("op", OPS)
def test_cpu_backend_takes_three_dtypes_and_refuses_fp64(op):
    native = pytest.importorskip("fusedmm._C", reason="extension not built")
    assert native.cpu_isa() in native.cpu_isas()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert used(op, lambda d=dtype: fused(small(op, d), "cpu")) == "cpu"
        assert used(op, lambda d=dtype: fused(small(op, d))) == "cpu"
    with pytest.raises(NotImplementedError, match=r"  cpu: torch.float64 not in float32, float16"):
        fused(small(op, torch.float64), "cpu")
    assert used(op, lambda: fused(small(op, torch.float64))) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_use_backend(op):
    case = small(op)
    usual = used(op, lambda: fused(case))
    with fusedmm.use_backend("reference"):
        assert used(op, lambda: fused(case)) == "reference"
    assert used(op, lambda: fused(case)) == usual
    with fusedmm.use_backend("cuda"):
        with pytest.raises(NotImplementedError, match="  cuda: inputs are on cpu"):
            fused(case)
        assert used(op, lambda: fused(case, "reference")) == "reference", "an argument is stronger"
        with fusedmm.use_backend("reference"):
            assert used(op, lambda: fused(case)) == "reference", "the inner region is stronger"
        with pytest.raises(NotImplementedError):
            fused(case)


def test_use_backend_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), fusedmm.use_backend("cuda"):
        raise ZeroDivisionError
    fused(small("co_attention"))

    @fusedmm.use_backend("reference")
    def decorated() -> str:
        return used("co_attention", lambda: fused(small("co_attention")))

    assert decorated() == decorated() == "reference"


def test_use_backend_rejects_unknown_names():
    for name in ("gpu", None, 3):
        with pytest.raises(ValueError) as caught, fusedmm.use_backend(name):
            pass
        assert str(caught.value) == (
            "use_backend: backend: expected one of 'cuda', 'triton', 'cpu', 'reference', "
            f"got {name!r}"
        )


def test_a_region_stays_in_its_thread():
    seen = []

    def other() -> None:
        try:
            seen.append(fused(small("co_attention"))[0].shape)
        except NotImplementedError as error:
            seen.append(error)

    with fusedmm.use_backend("cuda"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [torch.Size([1, 2, 5, 6])]


def test_backward_runs_on_the_backend_of_the_forward():
    """Even when the region of the forward has ended, and in autograd's own thread."""
    case = small("bi_attention").leaves()
    with harness.recorded("bi_attention") as calls:
        with fusedmm.use_backend("reference"):
            out = fused(case)
        sum(o.sum() for o in out).backward()
    assert calls["_bwd"][-1] == "reference"


def test_environment(monkeypatch):
    monkeypatch.setenv("FUSEDMM_BACKEND", "reference")
    assert used("co_attention", lambda: fused(small("co_attention"))) == "reference"
    monkeypatch.setenv("FUSEDMM_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="  cuda: inputs are on cpu"):
        fused(small("co_attention"))
    with fusedmm.use_backend("reference"):
        fused(small("co_attention"))
    fused(small("co_attention"), "reference")
    monkeypatch.setenv("FUSEDMM_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"backend: expected one of 'cuda', .* got 'fast'"):
        fused(small("co_attention"))
    monkeypatch.setenv("FUSEDMM_BACKEND", "")
    fused(small("co_attention"))


def test_environment_of_a_process():
    code = (
        "import torch, fusedmm; t = torch.zeros(1, 1, 2, 2)\n"
        "try: fusedmm.bi_attention(t, t, t, t)\n"
        "except NotImplementedError as error: print(str(error).splitlines()[1].strip())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDMM_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("triton: "), done


def test_compiled_code_follows_the_region():
    """Also in a thread that was in no region before it compiled."""

    def follow():
        torch._dynamo.reset()
        case = small("co_attention")
        compiled = torch.compile(lambda c: fused(c), fullgraph=True, backend="eager")
        for _ in range(2):
            compiled(case)
            with (
                fusedmm.use_backend("cuda"),
                pytest.raises(Exception, match="cuda: inputs are on cpu"),
            ):
                compiled(case)
        with fusedmm.use_backend("reference"):
            got = compiled(case)
        for g, w in zip(got, fused(case, "reference"), strict=True):
            torch.testing.assert_close(g, w, atol=0, rtol=0)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(follow).result()


def test_a_region_inside_compiled_code():
    torch._dynamo.reset()
    case = small("co_attention")

    def function(c):
        with fusedmm.use_backend("reference"):
            return fused(c)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(case)
    for g, w in zip(got, fused(case, "reference"), strict=True):
        torch.testing.assert_close(g, w, atol=0, rtol=0)


def test_every_op_has_every_backend_in_the_table():
    for name in dispatch.PRIORITY:
        for op in OPS:
            cpu = asked("cpu" if name in ("cpu", "reference") else "cuda")
            reasons = backends.reject(name, op, cpu)
            assert isinstance(reasons, list) and all(isinstance(r, str) and r for r in reasons)
    assert backends.reject("reference", "co_attention", asked("cuda")) == []


def test_modes_and_transforms_see_the_custom_op():
    """Plain eager calls skip the dispatcher; whoever watches calls must not be skipped."""

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    with Seen():
        o_x, o_y = fusedmm.bi_attention(x, x, x, x)
        (o_x + o_y).sum().backward()
    assert "fusedmm.bi_attention_fwd.default" in Seen.names
    assert "fusedmm.bi_attention_bwd.default" in Seen.names
    traced = make_fx(lambda t: fusedmm.bi_attention(t, t, t, t)[0])(x.detach())
    assert "fusedmm.bi_attention_fwd" in traced.code
    with FakeTensorMode():
        fake = torch.empty(1, 1, 3, 4)
        assert fusedmm.bi_attention(fake, fake, fake, fake)[0].shape == x.shape


def test_a_plan_is_remembered_by_what_it_looked_at():
    x = torch.randn(1, 1, 3, 4)
    asked = _call.plan("bi_attention", None, problem.bi_attention, x, x, x, x, *[None] * 5, 0.0)
    again = _call.plan("bi_attention", None, problem.bi_attention, *[x + 1] * 4, *[None] * 5, 0.0)
    assert again[0] is asked[0] and asked[1] == "cpu"
    with fusedmm.use_backend("reference"):
        args = [*[x] * 4, *[None] * 5]
        assert _call.plan("bi_attention", None, problem.bi_attention, *args, 0.0)[1] == "reference"
    with pytest.raises(TypeError, match="bi_attention: dropout_p: expected a number, got bool"):
        fusedmm.bi_attention(x, x, x, x, dropout_p=False)


@pytest.mark.parametrize("name", ["bi_attention", "co_attention"])
def test_vmap_joins_the_batch(name: str) -> None:
    """vmap, also of a gradient, some arguments shared, one by one the same."""
    names = POSITIONAL[name]
    many = [torch.randn(3, 2, 2, 7 if n.endswith("x") else 5, 4) for n in names]
    keep = torch.rand(2, 5) > 0.3
    keep[:, 0] = True

    def loss(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        outputs = getattr(fusedmm, name)(first, *rest, mask_y=keep)
        return sum(o.square().sum() for o in outputs)

    dims = (0, *[0] * (len(names) - 2), None)
    args = (*many[:-1], many[-1][0])
    values = torch.vmap(loss, in_dims=dims)(*args)
    grads = torch.vmap(torch.func.grad(loss), in_dims=dims)(*args)
    for i in range(3):
        leaf = many[0][i].clone().requires_grad_()
        want = loss(leaf, *(m[i] for m in many[1:-1]), many[-1][0])
        torch.testing.assert_close(values[i], want)
        torch.testing.assert_close(grads[i], torch.autograd.grad(want, leaf)[0])
    op = getattr(fusedmm, name)
    with pytest.raises((NotImplementedError, RuntimeError), match="vmap|randomness"):
        torch.vmap(lambda *a: op(*a, dropout_p=0.5), in_dims=dims)(*args)
    single = [t[:, :1] for t in many]  # a batch of one, as the seed has
    with pytest.raises(NotImplementedError, match="vmap with dropout"):
        torch.vmap(lambda *a: op(*a, dropout_p=0.5), randomness="same")(*single)
    assert torch.vmap(op)(*(t[:0] for t in many))[0].shape == (0, 2, 2, 7, 4)


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_loss"])
def test_torch_func_on_losses(name: str) -> None:
    """grad, jacrev and vmap, alone and together, are what autograd gives one by one."""
    many, y = torch.randn(3, 6, 8), torch.randn(6, 8)
    rest = (2.0, -1.0)[: len(POSITIONAL[name]) - 2]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return getattr(fusedmm, name)(x, y, *rest)

    want = [torch.autograd.grad(loss(x), x)[0] for x in many.clone().requires_grad_()]
    assert torch.equal(torch.func.grad(loss)(many[1]), want[1])
    assert torch.equal(torch.func.jacrev(loss)(many[1]), want[1])
    assert torch.equal(torch.vmap(loss)(many), torch.stack([loss(x) for x in many]))
    assert torch.equal(torch.vmap(torch.func.grad(loss))(many), torch.stack(want))
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.func.jacrev(torch.func.jacrev(loss))(many[0])
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (many[0],), (many[0],))


@pytest.mark.parametrize("name", sorted(POSITIONAL))
def test_forward_mode_is_refused(name: str) -> None:
    """Not a tangent of None or zero."""
    loss = "loss" in name
    args = [torch.randn(6, 8) if loss else torch.randn(1, 1, 3, 4) for _ in POSITIONAL[name]]
    if loss:
        args[2:] = [2.0, -1.0][: len(args) - 2]
    with torch.autograd.forward_ad.dual_level():
        getattr(fusedmm, name)(*args)
        args[1] = torch.autograd.forward_ad.make_dual(args[1], torch.ones_like(args[1]))
        with pytest.raises(NotImplementedError, match=f"{name}.*forward-mode derivatives"):
            getattr(fusedmm, name)(*args)


def test_dropout_under_another_default_device() -> None:
    x = torch.randn(1, 1, 3, 4)
    torch.manual_seed(1)
    want = fusedmm.bi_attention(x, x, x, x, dropout_p=0.5)
    torch.manual_seed(1)
    with torch.device("meta"):
        got = fusedmm.bi_attention(x, x, x, x, dropout_p=0.5)
    assert torch.equal(got[0], want[0])
