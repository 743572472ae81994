"""The C++ launch path of the CUDA kernels: streams, limits, refusals, memory that runs out; and
what the compiler made of the kernels.
"""

import os
import subprocess
import sys

import harness
import pytest
import torch

import fusedmm
from fusedmm.backends.native import extension
from fusedmm.ops import _call

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or extension.MISSING_CUDA:
    pytest.skip("no CUDA device, or no CUDA kernels in this build", allow_module_level=True)

from benchmarks import gpu_resources  # noqa: E402

_C = extension._C_cuda
KIB = 1024


def inputs(M: int = 40, N: int = 30, D: int = 16, dtype=torch.float16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, D, generator=g).to("cuda", dtype) for n in (M, N, M, N)]


def call(*tensors: torch.Tensor):
    return torch.ops._fusedmm_C.bi_attention_fwd(*tensors, None, None, None, None, 1.0, 0.0, None)


def test_kernels_run_on_the_current_stream():
    tensors = inputs()
    want = fusedmm.bi_attention(*tensors, backend="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = fusedmm.bi_attention(*tensors, backend="cuda")
    if "VGPU_ACTIVE" in os.environ:
        import vgpu

        assert vgpu.launches()[-1]["stream"] == side.cuda_stream
    side.synchronize()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_geometry_fits_the_devices():
    """General kernels fit every device from sm_80 on; resident ones, which others replace, at least
    sm_80's 163 KiB, as the taller tiles, and the tallest sm_90's 227 KiB."""
    kernels = _C.kernels()
    assert {k["kernel"] for k in kernels} == {
        "attend_fwd_kernel", "owner_bwd_kernel", "dbias_kernel", "resident_fwd_kernel",
        "resident_bwd_kernel", "fused_fwd_kernel", "fused_bwd_kernel",
    }  # fmt: skip
    for k in kernels:
        by_height = k["kernel"] in ("attend_fwd_kernel", "owner_bwd_kernel")
        height = int(k["arguments"][-2]) if by_height else 0
        replaced = height == 1 or "resident" in k["kernel"]
        assert k["smem"] <= (227 if height == 2 else 163 if replaced else 99) * KIB, k
        assert k["threads"] % 32 == 0 and 0 < k["threads"] <= 256
        assert k["rows"] % 16 == 0 and k["cols"] % 16 == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(qk_y=t["qk_y"][..., :8]), "internal: bi_attention: expected shape"),
        (lambda t: t.update(v_x=t["v_x"][:, :1]), "internal: v_x: expected shape"),
        (lambda t: t.update(v_y=t["v_y"].float()), "internal: bi_attention: dtype or device"),
        (lambda t: t.update({k: v.double() for k, v in t.items()}), "internal: dtype Double"),
        (lambda t: t.update({k: v.repeat(1, 1, 1, 17) for k, v in t.items()}), "widths above 256"),
        (lambda t: t.update({k: v[0] for k, v in t.items()}), "expected 4 dimensions"),
    ],
)
def test_wrong_calls_of_the_raw_op_are_refused(change, message):
    named = dict(zip(("qk_x", "qk_y", "v_x", "v_y"), inputs(), strict=True))
    change(named)
    with pytest.raises(RuntimeError, match=message):
        call(*named.values())
    call(*inputs())  # and the context lives


@pytest.mark.skipif(os.environ.get("VGPU_ARCH") != "80", reason="once, on the virtual GPU")
def test_devices_of_99_kib_take_smaller_tiles():
    """sm_86, where a launch that asks for more fails; results are right there."""
    tests = "multiprocessor or cuda and nothing_at_all"
    pytest_ = ["pytest", "-q", "tests/test_gpu.py", "-k", tests, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "vgpu", "run", "--arch", "86", "--", sys.executable, "-m"]
    r = subprocess.run([*command, *pytest_], capture_output=True, text=True)
    assert r.returncode == 0 and "sm_86" in r.stdout, r.stdout + r.stderr


def test_out_of_memory_leaves_torch_usable():
    """In the middle of forward, and of backward; afterwards the same call succeeds."""
    small = inputs()
    want = call(*small)
    # Results of x are small and come first; each of y takes 20 MiB.
    leaves = [t.requires_grad_() for t in inputs(M=1, N=20000, D=256)]
    with harness.device_memory(10), pytest.raises(torch.OutOfMemoryError):
        fusedmm.bi_attention(*leaves, backend="cuda")
    out = fusedmm.bi_attention(*leaves, backend="cuda")
    upstream = [torch.ones_like(o) for o in out]
    with harness.device_memory(30), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for g, w in zip(call(*small), want, strict=True):
        assert torch.equal(g, w)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, upstream))


def test_devices_that_the_build_cannot_serve_are_named(monkeypatch):
    monkeypatch.setattr(extension, "_unfit", lambda: "compiled for 7.0, which sm_80 cannot run")
    monkeypatch.setattr(_call, "_plans", {})
    with pytest.raises(NotImplementedError, match="cuda: compiled for 7.0, which sm_80 cannot"):
        fusedmm.bi_attention(*inputs(), backend="cuda")


@pytest.mark.skipif(gpu_resources.tool("cuobjdump") is None, reason="no cuobjdump")
def test_machine_code():
    """Tensor cores, ldmatrix and asynchronous copies are there."""
    rows = gpu_resources.read()
    assert len({r.name for r in rows}) == len(_C.kernels())
    for r in rows:
        for op in gpu_resources.wanted(r):
            assert r.opcodes[op] > 0, (r.name, op)


@pytest.mark.skipif(gpu_resources.tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.skipif("9.0a" not in gpu_resources.built(), reason="9.0a is not in the build")
def test_machine_code_of_hopper():
    """wgmma where four warps share what they multiply by, and waits for chains of products only.

    Where the compiler serialises them, each product has an arrival and a wait of its own.
    """
    kernels = "(attend_fwd|owner_bwd|resident_bwd)_kernelI.*(bfloat16|half)"
    kernels += "|fused_(fwd|bwd)_kernelI.*Li(128|256)E"
    rows = [r for r in gpu_resources.read(kernels, "9.0a") if r.threads >= 128]
    alone = [r for r in rows if r.kernel == "owner_bwd_kernel" and r.name.endswith("Li256ELi0EE")]
    assert len(alone) == 6 and len(rows) > 50
    for r in rows:
        if r not in alone:
            assert r.opcodes["WARPGROUP"] <= r.opcodes["HGMMA"] > 0, r.name


@pytest.mark.skipif(gpu_resources.tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("arch", ["8.0", "9.0a"])
def test_nothing_spills(arch):
    if arch not in gpu_resources.built():
        pytest.skip(f"{arch} is not in the build")
    assert not [r.name for r in gpu_resources.read(arch=arch) if gpu_resources.spills(r)]
