"""Triton kernels through Triton's own launcher; the module it loads is the PTX."""

import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
import triton
import triton.language as tl
import vgpu
from test_vgpu_triton import attn_ref

dev = "cuda"


@triton.jit
def add_k(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def add_nomask(x, o, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(x + i))


@triton.jit
def hist_k(x, h, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.atomic_add(h + tl.load(x + i, mask=m, other=0), 1, mask=m)


@triton.jit
def sum_k(x, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(o, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


@triton.jit
def mm_k(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(
            a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0
        )
        y = tl.load(
            b + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0
        )
        acc = tl.dot(x, y, acc)
    tl.store(
        c + rm[:, None] * N + rn[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def softmax_k(x, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + tl.program_id(0) * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def mm_host(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.float16))


@triton.jit
def copy_dev(x, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    e = tl.make_tensor_descriptor(o, [M, N], [N, 1], [BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    e.store([m, n], d.load([m, n]) * 2)


def test_add():
    x, y = torch.randn(1000, device=dev), torch.randn(1000, device=dev)
    o = torch.empty_like(x)
    with vgpu.profile() as p:
        add_k[(triton.cdiv(1000, 256),)](x, y, o, 1000, BLOCK=256)
    assert torch.equal(o, x + y)
    assert p.kernels() == ["add_k"] and p.launches[0]["grid"] == [4, 1, 1]


def test_atomic_add():
    x = torch.randint(0, 7, (1000,), device=dev, dtype=torch.int32)
    h = torch.zeros(7, device=dev, dtype=torch.int32)
    hist_k[(triton.cdiv(1000, 256),)](x, h, 1000, BLOCK=256)
    assert torch.equal(h.long(), torch.bincount(x, minlength=7))
    v = torch.randn(3000, device=dev)
    s = torch.zeros(1, device=dev)
    sum_k[(triton.cdiv(3000, 512),)](v, s, 3000, BLOCK=512)
    torch.testing.assert_close(s[0], v.sum(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stages", [1, 3])
def test_matmul(dtype, stages):
    M, N, K = 96, 80, 64
    a, b = torch.randn(M, K, device=dev, dtype=dtype), torch.randn(K, N, device=dev, dtype=dtype)
    c = torch.empty(M, N, device=dev, dtype=dtype)
    with vgpu.profile() as p:
        mm_k[(triton.cdiv(M, 32), triton.cdiv(N, 32))](
            a, b, c, M, N, K, BM=32, BN=32, BK=32, num_stages=stages
        )
    torch.testing.assert_close(
        c.float(), a.float() @ b.float(), atol=3e-2 if dtype != torch.bfloat16 else 0.2, rtol=2e-2
    )
    assert p.launches[0]["counters"]["mma_flops"] > 0


def test_softmax():
    x = torch.randn(6, 100, device=dev)
    o = torch.empty_like(x)
    softmax_k[(6,)](x, o, 100, BLOCK=128)
    torch.testing.assert_close(o, x.softmax(-1))


def test_faults():
    x, o = torch.zeros(1000, device=dev), torch.zeros(1024, device=dev)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        add_nomask[(4,)](x, o, BLOCK=256)
        torch.cuda.synchronize()
    assert (
        "add_nomask" in vgpu.report()
        and "past the end of tensor block" in vgpu.report()
        and "test_vgpu_launch.py:" in vgpu.report()
    )
    vgpu.reset()
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add_nomask[(4,)](torch.zeros(1024), o, BLOCK=256)
    big = torch.zeros(256, 256, device=dev, dtype=torch.float32)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        mm_k[(1, 1)](big, big, big, 256, 256, 256, BM=256, BN=256, BK=128, num_stages=4)


def test_autotune_and_bench():
    @triton.autotune(
        configs=[triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256})], key=["n"]
    )
    @triton.jit
    def k(x, o, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(o + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)

    x = torch.randn(300, device=dev)
    o = torch.empty_like(x)
    k[lambda m: (triton.cdiv(300, m["BLOCK"]),)](x, o, 300)
    assert torch.equal(o, x * 2)


@triton.jit
def sum_of_squares(x, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(o, tl.sum(v * v, 0))


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_replicated_warps_may_store_one_address(n):
    """Fewer elements than threads: lanes of a warp hold partial sums with other last bits."""
    x, o = torch.randn(n, device=dev), torch.empty(1, device=dev)
    for _ in range(20):
        sum_of_squares[(1,)](x, o, n, BLOCK=n)
    torch.testing.assert_close(o[0], (x * x).sum())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention(causal, dtype):
    """Forward and backward through Triton's launcher, ragged, against torch in fp64."""
    H, M, N, D = 3, 75, 110, 32
    q, k, v = (torch.randn(H, n, D, device=dev, dtype=dtype) for n in (M, N, N))
    o, lse = torch.empty_like(q), torch.empty(H, M, device=dev)
    st = (M * D, D, N * D, D)
    cst = {"D": D, "BM": 64, "BN": 32, "CAUSAL": causal}
    kernels.attend[(2, H)](q, k, v, o, lse, 0.2, M, N, *st, N * D, D, M * D, D, **cst)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    ref, ref_lse = attn_ref(*leaves, causal, 0.2)
    tol = {"atol": 4e-3 if dtype == torch.float16 else 3e-2, "rtol": 2e-2}
    torch.testing.assert_close(o.double(), ref.detach(), **tol)
    torch.testing.assert_close(lse.double(), ref_lse.detach(), atol=1e-3, rtol=1e-3)
    do = torch.randn_like(o)
    ref.backward(do.double())
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    kernels.attend_grad_kv[(4, H)](q, k, v, o, do, lse, dk, dv, 0.2, M, N, *st, **cst)
    kernels.attend_grad_q[(2, H)](q, k, v, o, do, lse, dq, 0.2, M, N, *st, **cst)
    for got, want in zip((dq, dk, dv), leaves, strict=True):
        error = (got.double() - want.grad).abs().max() / want.grad.abs().max()
        assert error < (1e-2 if dtype == torch.float16 else 3e-2)


@pytest.mark.vgpu_arch(90)
def test_tensor_descriptors():
    """Host-made (cuTensorMapEncodeTiled) and device-made."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b = (torch.randn(s, device=dev, dtype=torch.float16) for s in ((128, 64), (64, 96)))
    c = torch.empty(128, 96, device=dev, dtype=torch.float16)
    t = TensorDescriptor.from_tensor
    mm_host[(2, 3)](t(a, [64, 32]), t(b, [32, 32]), t(c, [64, 32]), 64, BM=64, BN=32, BK=32)
    torch.testing.assert_close(c.float(), a.float() @ b.float(), atol=3e-2, rtol=2e-2)
    triton.set_allocator(lambda size, align, s: torch.empty(size, device=dev, dtype=torch.int8))
    x = torch.randn(40, 64, device=dev)
    o = torch.zeros_like(x)
    copy_dev[(3, 2)](x, o, 40, 64, BM=16, BN=32)
    torch.testing.assert_close(o, x * 2)


def test_profile_records_resources_and_coverage():
    x, o = torch.randn(1000, device=dev), torch.empty(1000, device=dev)
    with vgpu.profile(resources=True, coverage=True) as p:
        add_k[(4,)](x, x, o, 1000, BLOCK=256)
    (launch,) = p.launches
    assert launch["regs"] > 0 and launch["spill"] == 0 and launch["ctas_per_sm"] > 0
    assert launch["unique_read_bytes"] == launch["unique_written_bytes"] == 4000
    assert p.total("classes.ld_global") > 0


def test_structured_fault():
    x, o = torch.zeros(1000, device=dev), torch.zeros(1024, device=dev)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        add_nomask[(4,)](x, o, BLOCK=256)
    assert vgpu.sticky() == 700 and vgpu.launches()[-1]["fault"] == "address"


@pytest.mark.vgpu_arch(80)
def test_a_swallowed_fault_fails_its_test(tmp_path):
    (tmp_path / "test_it.py").write_text(f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_vgpu_launch import add_nomask

def test_one():
    try: add_nomask[(4,)](*(torch.zeros(n, device="cuda") for n in (1000, 1024)), BLOCK=256)
    except RuntimeError: pass

def test_two():
    assert (torch.ones(3, device="cuda") + 1).sum() == 6
""")
    cmd = [sys.executable, "-m", "pytest", "test_it.py"]
    r = subprocess.run(cmd, cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 1 and "broke a rule of the virtual GPU" in r.stdout
    for words in ("2 passed", "1 error", "gpu: virtual GPU sm_80, simulated"):
        assert words in r.stdout
