"""sm_90: tensor descriptors, TMA, mbarrier pipelines, wgmma; correct kernels and planted bugs."""

from pathlib import Path

import kernels as tk
import numpy as np
import pytest
import torch
import triton.language as tl
from test_vgpu_triton import wgmma_forms
from vgpu.sim import Module, SimError, poison
from vgpu.sim_triton import encode_tiled, run

pytestmark = pytest.mark.vgpu_arch(90)
CUDA = Path(__file__).parent / "cuda"
TORCH = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dt,BM,BN,BK,nw,ns",
    [
        (torch.float16, 64, 64, 64, 4, 3),
        (torch.bfloat16, 128, 128, 32, 8, 2),
        (torch.float16, 64, 128, 128, 4, 2),
        (torch.float32, 64, 64, 32, 4, 2),
        (torch.float16, 64, 32, 16, 4, 4),
    ],
)
@pytest.mark.parametrize("shape", [(128, 128, 128), (120, 72, 88)])
def test_device_descriptor(dt, BM, BN, BK, nw, ns, shape, arch):
    M, N, K = shape
    a, b = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt)
    c = poison(torch.empty(M, N, dtype=dt))
    r = run(
        tk.desc_mm,
        (-(-M // BM), -(-N // BN)),
        [a, b, c, M, N, K],
        dict(BM=BM, BN=BN, BK=BK),
        num_warps=nw,
        num_stages=ns,
        arch=arch,
        seed=M,
    )
    t32 = (
        (lambda t: (t.view(torch.int32) & -8192).view(torch.float32))
        if dt == torch.float32
        else (lambda t: t)
    )
    ref = t32(a).double() @ t32(b).double()
    assert (c.double() - ref).abs().max() < {
        torch.float16: 3e-2,
        torch.bfloat16: 0.2,
        torch.float32: 1e-4,
    }[dt] and r.unwritten(2) == 0
    if arch == 90:
        assert (
            r.stats["tma_load_bytes"] > 0
            and r.stats["tma_store_bytes"] > 0
            and wgmma_forms(r.kernel.ptx) == {"shared"}
        )


@pytest.mark.parametrize("BK,ns", [(64, 3), (32, 2)])
def test_host_descriptor(BK, ns):
    from triton.tools.tensor_descriptor import TensorDescriptor

    M, N, K = 128, 128, 192
    a, b, c = torch.randn(M, K).half(), torch.randn(N, K).half(), poison(torch.empty(M, N).half())

    def D(t, bs):
        return TensorDescriptor(t, list(t.shape), list(t.stride()), bs)

    run(
        tk.hostdesc_mm,
        (2, 2),
        [D(a, [64, BK]), D(b, [64, BK]), D(c, [64, 64]), K],
        dict(BM=64, BN=64, BK=BK),
        num_stages=ns,
        arch=90,
    )
    assert (c.float() - a.float() @ b.float().T).abs().max() < 3e-2


TMA = CUDA / "hopper.cu"


@pytest.fixture(scope="module")
def m(nvcc):
    return Module.from_cuda(TMA, arch="sm_90a")


def swizzle(b, base, mode):
    idx = np.arange(len(b)) + base
    x = {0: 0, 32: (idx >> 7) & 1, 64: (idx >> 7) & 3, 128: (idx >> 7) & 7}[mode] << 4
    out = np.zeros_like(b)
    out[(idx ^ x) - base] = b
    return out


@pytest.mark.parametrize(
    "rank,box,sw,coord",
    [
        (1, (64,), 0, (16,)),
        (2, (64, 8), 128, (0, 0)),
        (2, (32, 16), 64, (32, 4)),
        (2, (16, 16), 32, (48, -3)),
        (2, (64, 8), 128, (-8, 17)),
        (2, (128, 4), 0, (8, 2)),
        (3, (32, 4, 3), 64, (16, 18, 1)),
        (4, (16, 2, 3, 2), 32, (40, 1, -1, 2)),
        (5, (8, 2, 2, 2, 2), 0, (56, 3, 1, 1, 0)),
    ],
)
def test_tma_load(m, rank, box, sw, coord):
    dims = (72, 20, 5, 4, 3)[:rank]
    x = np.arange(1, np.prod(dims) + 1).astype(np.int64).astype(np.uint16).reshape(dims[::-1])
    buf = m.device.buffer(x, "x")
    st = list(np.cumprod([d for d in dims]) * 2)[: rank - 1]
    t = encode_tiled(buf, "u16", dims, [int(s) for s in st], box, sw)
    n = int(np.prod(box)) * 2
    o = np.zeros(n, np.uint8)
    m.launch(
        f"dump{rank}",
        1,
        64,
        [t, o, n, np.array(list(coord) + [0] * (5 - rank), np.int32)],
        smem=n,
    )
    ref = np.zeros(box[::-1], np.uint16)
    for i in np.ndindex(*box[::-1]):
        g = [c + k for c, k in zip(coord[::-1], i, strict=False)]
        if all(0 <= a < d for a, d in zip(g, dims[::-1], strict=False)):
            ref[i] = x[tuple(g)]
    assert np.array_equal(o, swizzle(ref.reshape(-1).view(np.uint8), 0, sw))


def test_tma_store(m):
    x = np.zeros((20, 40), np.float32)
    buf = m.device.buffer(x, "x")
    t = encode_tiled(buf, "f32", (40, 20), [160], (16, 32))
    m.launch("ts_ok", 1, 128, [t, 0.5, 30, 4])
    ref = np.zeros_like(x)
    ref[4:, 30:] = (np.arange(512).reshape(32, 16) + 0.5)[:16, :10]
    assert np.array_equal(x, ref)
    m.launch("ts_red", 1, 128, [t, 0.5, 30, 4])
    assert np.array_equal(x, 2 * ref)
    with pytest.raises(SimError, match="not followed by fence.proxy.async"):
        m.launch("ts_nofence", 1, 128, [t, 0.5, 30, 4])
    with pytest.raises(SimError, match="race|uninitialised"):
        m.launch("ts_nobar", 1, 128, [t, 0.5, 30, 4])
    x[:] = 0
    m.launch("ts_reuse", 1, 128, [t, 0.5, 0, 0])
    assert x[0, 3] == -1  # the source is read as late as the wait allows


@pytest.mark.parametrize("seed", range(5))
def test_ring(m, seed):
    n = 11
    x, o = np.random.rand(n, 128).astype(np.float32), poison(np.zeros((n, 128), np.float32))
    r = m.launch("ring_ok", 1, 160, [x, o, n], seed=seed)
    assert np.array_equal(o, x[:, ::-1]) and r.stats["tma_load_bytes"] == x.nbytes
    for name, msg in [
        ("ring_nofull", "race|not yet waited|uninitialised"),
        ("ring_noempty", "race|not yet waited|exceed"),
        ("ring_bytes", "deadlock"),
        ("ring_noinit", "not yet visible|no mbarrier was initialised|uninit"),
        ("ring_arr", "arrivals exceed|race|not yet waited|deadlock"),
    ]:
        with pytest.raises(SimError, match=msg) as e:
            m.launch(name, 1, 160, [x, o, n], seed=seed)
        assert name in str(e.value)
    o = np.zeros(128, np.float32)
    m.launch("cpmbar", 1, 128, [x[0], o], seed=seed)
    assert np.array_equal(o, x[0, ::-1])


def test_wgmma_direct(m):
    a, b, o = torch.randn(64, 16).half(), torch.randn(8, 16).half(), poison(torch.empty(64, 8))
    r = m.launch("wg_ok", 1, 128, [a, b, o])
    assert (o - a.float() @ b.float().T).abs().max() < 1e-4 and r.stats[
        "mma_flops"
    ] == 2 * 64 * 8 * 16
    init = 5.0 + torch.arange(8) % 2 + 2 * (torch.arange(64)[:, None] % 16 >= 8)
    for name, s, d in (("wg_fresh", 1, 0), ("wg_minus", -1, 1), ("wg_twice", 1, 1)):
        m.launch(name, 1, 128, [a, b, o])
        assert (o - d * init - s * (a.float() @ b.float().T)).abs().max() < 1e-4, name
    for name, msg in [
        ("wg_early", "accumulator register of an outstanding wgmma"),
        ("wg_nofence", "fence.proxy.async"),
        ("wg_over", "race|fence.proxy.async"),
    ]:
        with pytest.raises(SimError, match=msg):
            m.launch(name, 1, 128, [a, b, o])


@pytest.mark.parametrize("seed", range(3))
def test_bulk_store_and_reduce(m, seed):
    i = np.arange(128, dtype=np.float32)
    g = poison(np.zeros(128, np.float32))
    r = m.launch("bulk_st", 1, 128, [g, 0.5], seed=seed)
    assert np.array_equal(g, i + 0.5) and r.stats["tma_store_bytes"] == 512
    m.launch("bulk_add", 3, 128, [g, 2.0], seed=seed)
    assert np.array_equal(g, 4 * i + 6.5)
    u = np.full(128, 100, np.uint32)
    m.launch("bulk_min", 1, 128, [u, 40.0], seed=seed)
    assert np.array_equal(u, np.minimum(100, 40 + np.arange(128)))
    h = np.ones(256, np.float16)
    m.launch("bulk_addh", 2, 128, [h, 1.0], seed=seed)
    assert np.array_equal(h, np.repeat(1 + 2 * (1 + i), 2).astype(np.float16))
    with pytest.raises(SimError, match="not followed by fence.proxy.async"):
        m.launch("bulk_nofence", 1, 128, [g, 0.5], seed=seed)
    with pytest.raises(SimError, match="out-of-bounds global bulk copy"):
        m.launch("bulk_st", 1, 128, [g[:124].copy(), 0.5], seed=seed)
    v, a = np.zeros((8, 4), np.float32), np.zeros(34, np.float32)
    m.launch("redvec", 1, 32, [v, a], seed=seed)
    t = np.arange(32)
    assert (
        np.array_equal(
            v,
            np.stack(
                [np.full(8, 4.0), np.full(8, 8.0), t.reshape(4, 8).sum(0), np.full(8, 2.0)], 1
            ),
        )
        and a[:2].tolist() == [32, 64]
        and np.array_equal(np.sort(a[2:]), t * 201.0)
    )


def test_cluster_size_one(m):
    o = np.zeros(64, np.int32)
    m.launch("cluster1", 1, 64, [o])
    assert o.tolist() == [64 - t for t in range(64)]


def test_larger_clusters_are_refused():
    m = Module.from_cuda(CUDA / "cluster.cu", arch="sm_90a")
    with pytest.raises(SimError, match="only cluster size 1"):
        m.launch("c2", 2, 32, [np.zeros(32, np.int32)])
