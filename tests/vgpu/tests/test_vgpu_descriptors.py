"""Tensor-descriptor kernels of Triton for sm_90 (and the same programs for sm_80)."""

import math

import kernels as tk
import pytest
import torch
from test_vgpu_triton import attn_ref, full, wgmma_forms
from vgpu.sim import poison
from vgpu.sim_triton import run


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dt,D,BM,BN,nw,ns",
    [
        (torch.float16, 64, 64, 64, 4, 2),
        (torch.bfloat16, 128, 128, 64, 8, 2),
        (torch.float16, 32, 64, 32, 4, 3),
    ],
)
@pytest.mark.parametrize("ws", [False, True])
@pytest.mark.parametrize("M,N", [full(256, 256), (100, 184)])
def test_attention_descriptor(dt, D, BM, BN, nw, ns, ws, M, N, arch):
    if ws and arch == 80:
        pytest.skip("no warp specialisation")
    H = 2
    torch.manual_seed(1)
    q, k, v = [(torch.randn(H, L, D) * 0.7).to(dt) for L in (M, N, N)]
    o, lse = poison(torch.empty(H, M, D, dtype=dt)), poison(torch.empty(H, M))
    s = 1 / math.sqrt(D)
    r = run(
        tk.desc_attend,
        (-(-M // BM), H),
        [q, k, v, o, lse, s, H, M, N],
        dict(D=D, BM=BM, BN=BN, WS=ws),
        num_warps=nw,
        num_stages=ns,
        arch=arch,
        seed=D,
    )
    ref, ref_lse = attn_ref(q, k, v, False, s)
    torch.testing.assert_close(
        o.double(), ref, rtol=2e-2, atol=4e-3 if dt == torch.float16 else 2e-2
    )
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-3, atol=1e-3)
    assert r.unwritten(3) == 0 and r.unwritten(4) == 0
    if arch == 90:
        assert (
            wgmma_forms(r.kernel.ptx) == {"shared", "registers"} and r.stats["tma_load_bytes"] > 0
        )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("ws", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_persistent_matmul(ws, arch, seed):
    if ws and arch == 80:
        pytest.skip("no warp specialisation")
    M, N, K = 192, 128, 160
    a, b, c = torch.randn(M, K).half(), torch.randn(N, K).half(), poison(torch.empty(M, N).half())
    run(
        tk.resident_mm,
        (2,),
        [a, b, c, M, N, K],
        dict(CTAS=2, BM=64, BN=64, BK=64, WS=ws),
        num_warps=4,
        num_stages=3,
        arch=arch,
        seed=seed,
    )
    assert (c.float() - a.float() @ b.float().T).abs().max() < 3e-2


def test_descriptor_reduction():
    A, B, C = 3, 40, 48
    x = torch.randn(A, B, C)
    o, s = torch.zeros(B, C), torch.full((B, C), -(10**6), dtype=torch.int32)
    run(tk.desc_ops, (2, 2), [x, o, s], dict(A=A, B=B, C=C, BB=32, BC=32), arch=90)
    torch.testing.assert_close(o, x.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(s, (x * 100).int().max(0).values)
