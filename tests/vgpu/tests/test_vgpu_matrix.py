"""Warp-level matrix instructions through inline PTX: mma, ldmatrix, stmatrix, movmatrix, redux,
cp.async with zero fill; the lane race check on warp-synchronous kernels.

Fragments are loaded with ldmatrix, which is checked against plain shared loads (a 4-byte element
counts as two b16), so the operand layouts of mma come out of that instruction, not of a formula.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import vgpu
from vgpu.sim import Module, SimError, poison

CUDA = Path(__file__).parent / "cuda"
SRC = CUDA / "matrix.cu"


@pytest.fixture(scope="module")
def m(nvcc):
    return Module.from_cuda(SRC, arch=f"sm_{vgpu.arch()}")


def words(*shape):
    return np.random.default_rng(5).integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("t", ["", "t"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("pitch", [16, 48, 144])
def test_ldmatrix(m, n, t, pitch):
    x, o = words(8 * n, 4), np.zeros((2, n, 32), np.uint32)
    r = m.launch(f"lds{n}{t}", 1, 32, [x, o, pitch], smem=8 * n * pitch)
    assert np.array_equal(o[0], o[1]) and r.stats["ops"]["ldmatrix"] == 1
    h = x.view(np.uint16).reshape(n, 8, 8)
    assert np.array_equal(o[0].view(np.uint16).reshape(n, 8, 8), h.transpose(0, 2, 1) if t else h)


def test_ldmatrix_forms(m):
    x, o = words(8, 4), np.zeros(32, np.uint32)
    m.launch("ldgen", 1, 32, [x, o])
    assert np.array_equal(o, x.reshape(-1))
    for name, msg in (("ldodd", "misaligned"), ("ldpart", "lanes 0x0000ffff")):
        with pytest.raises(SimError, match=msg):
            m.launch(name, 1, 32, [o])


@pytest.mark.parametrize("t", ["", "t"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("pitch", [16, 80])
@pytest.mark.vgpu_arch(90)
def test_stmatrix(m, n, t, pitch):
    x, o = words(n, 32), np.zeros((2, 8 * n * pitch // 4), np.uint32)
    m.launch(f"sts{n}{t}", 1, 32, [x, o, pitch], smem=8 * n * pitch)
    assert np.array_equal(o[0], o[1])
    h = x.view(np.uint16).reshape(n, 8, 8)
    assert np.array_equal(
        o[0].reshape(8 * n, -1)[:, :4].copy().view(np.uint16).reshape(n, 8, 8),
        h.transpose(0, 2, 1) if t else h,
    )
    y, z = words(32, 4), np.zeros((32, 4), np.uint32)
    m.launch("ststrip", 1, 32, [y, z])
    assert np.array_equal(y, z)


def test_movmatrix(m):
    x, o = words(8, 4), np.zeros((2, 32), np.uint32)
    m.launch("movm", 1, 32, [x, o])
    assert np.array_equal(o[0], o[1]) and np.array_equal(
        o[0].view(np.uint16).reshape(8, 8), x.view(np.uint16).reshape(8, 8).T
    )


def upper(t):
    return (
        (t.view(torch.int32) & -8192).view(torch.float32) if t.dtype == torch.float32 else t
    )  # what tf32 reads


@pytest.mark.parametrize(
    "dt,name", [(torch.float16, "f16"), (torch.bfloat16, "bf16"), (torch.float32, "tf32")]
)
def test_small_mma(m, dt, name):
    torch.manual_seed(2)
    K, fl = (
        32 // dt.itemsize,
        {
            torch.float16: "m16n8k8.f32.f16.f16.f32",
            torch.bfloat16: "m16n8k8.f32.bf16.bf16.f32",
            torch.float32: "m16n8k4.f32.tf32.tf32.f32",
        }[dt],
    )
    a, b, c = torch.randn(16, K).to(dt), torch.randn(8, K).to(dt), torch.randn(16, 8)
    d1, d2 = poison(torch.empty(16, 8)), poison(torch.empty(16, 8))
    r = m.launch(name + "_two", 1, 32, [a, b, c, d1, d2])
    ref = upper(a).double() @ upper(b).double().T + c.double()
    assert (d1.double() - ref).abs().max() < 2e-6 * K and (d2.double() - ref).abs().max() < 2e-6 * K
    assert r.stats["mma"][fl] == {"count": 2, "flops": 2 * 2 * 16 * 8 * K // 2}
    a, b, d = a[:, : K // 2].contiguous(), b[:, : K // 2].contiguous(), poison(torch.empty(16, 8))
    m.launch(name + "_one", 1, 32, [a, b, c, d])
    assert (
        d.double() - (upper(a).double() @ upper(b).double().T + c.double())
    ).abs().max() < 2e-6 * K
    for i, k in (
        (0, 0),
        (3, 1),
        (9, K // 2 - 1),
        (15, 2),
    ):  # one element of A at a time selects a row of B, exactly
        e = torch.zeros(16, K // 2, dtype=dt)
        e[i, k] = 1
        m.launch(name + "_one", 1, 32, [e, b, torch.zeros(16, 8), d])
        want = torch.zeros(16, 8)
        want[i] = upper(b)[:, k].float()
        assert torch.equal(d, want)


def test_small_mma_f16_accumulators(m):
    torch.manual_seed(3)
    a, b, c, d = (
        torch.randn(16, 8).half(),
        torch.randn(8, 8).half(),
        torch.randn(16, 8).half(),
        poison(torch.empty(16, 8).half()),
    )
    m.launch("f16_acc", 1, 32, [a, b, c, d])
    ref = a.double() @ b.double().T + c.double()
    assert (d.double() - ref).abs().max() <= 2.0**-10 * ref.abs().max()


@pytest.mark.parametrize("w", [4, 8, 16])
def test_cp_async_zero_fill(m, w):
    rng = np.random.default_rng(w)
    size = 32 * w
    x = rng.integers(1, 256, size).astype(np.uint8)
    n = rng.integers(0, w + 1, 32).astype(np.int32)
    n[:3] = (0, w, w - 1)
    at = (rng.permutation(32) * w).astype(np.int64)
    o = np.zeros(size, np.uint8)
    r = m.launch(f"cpz{w}", 1, 32, [x, at, n, o])
    ref = np.zeros((32, w), np.uint8)
    for lane in range(32):
        ref[lane, : n[lane]] = x[at[lane] : at[lane] + n[lane]]
    assert (
        np.array_equal(o.reshape(32, w), ref)
        and r.stats["cp_async_bytes"] == size
        and r.stats["cp_async_global_bytes"] == n.sum()
    )
    assert r.stats["buffers"][0]["read"] == n.sum()
    # nothing is read for size 0, wherever the source points; a partial size may end at the end
    at[5], n[5] = 1 << 40, 0
    y = x[: size - 1].copy()
    k = int(np.argmax(at == size - w)) if (at == size - w).any() else 6
    at[k], n[k] = size - w, w - 1
    m.launch(f"cpz{w}", 1, 32, [y, at, n, o])
    n[k] = w
    with pytest.raises(SimError, match="out-of-bounds global cp.async read.*1 bytes past its end"):
        m.launch(f"cpz{w}", 1, 32, [y, at, n, o])
    n[k] = w + 1
    with pytest.raises(SimError, match=f"src-size {w + 1} exceeds cp-size {w}"):
        m.launch(f"cpz{w}", 1, 32, [y, at, n, o])
    n[k], at[k] = w, 2
    with pytest.raises(SimError, match="misaligned cp.async global"):
        m.launch(f"cpz{w}", 1, 32, [y, at, n, o])
    z = x[: 20 * w].copy()  # ignore-src predicate: lanes 20.. are zero and read nothing
    m.launch(f"cpi{w}", 1, 32, [z, 20, o])
    assert np.array_equal(o[: 20 * w], z) and not o[20 * w :].any()


def test_half_math(m):
    n = 256
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(n, 2, generator=g) * 4).half()
    y = (torch.randn(n, 2, generator=g) * 8).bfloat16()
    o = torch.zeros(7, n, 2, dtype=torch.int16)
    m.launch("half_exp", 1, n, [x, y, o, n])
    a, b = x.double(), y.double()
    ref = [
        a.exp2(),
        a.tanh(),
        (a * a + a).clamp(min=0),
        b.exp2(),
        b.tanh(),
        b * b + b,
        b.clamp(min=1),
    ]
    for k, t in enumerate(ref):
        d = torch.float16 if k < 3 else torch.bfloat16
        got, want = o[k].view(d).double(), t.to(d).double()
        assert (
            torch.equal(got, want)
            if k in (2, 5, 6)
            else (got - want).abs().max() <= 2.0 ** (-10 if k < 3 else -7) * want.abs().max()
        ), k
        torch.testing.assert_close(
            got, want, rtol=2.0 ** (-10 if k < 3 else -7), atol=1e-7, msg=str(k)
        )


@pytest.mark.parametrize("q", [8, 16, 32])
def test_redux(m, q):
    x, o = words(32).view(np.int32), np.zeros((9, 32), np.int32)
    m.launch(f"rdx{q}", 1, 32, [x, o])
    g, u = x.reshape(-1, q), x.view(np.uint32).reshape(-1, q)
    s = g.astype(np.int64).sum(1).astype(np.int32)
    ref = [
        s,
        s,
        g.min(1),
        u.min(1).view(np.int32),
        g.max(1),
        u.max(1).view(np.int32),
        np.bitwise_and.reduce(g, 1),
        np.bitwise_or.reduce(g, 1),
        np.bitwise_xor.reduce(g, 1),
    ]
    assert np.array_equal(o, np.repeat(np.stack(ref), q, 1))
    with pytest.raises(SimError, match="not in its member mask"):
        m.launch("rdxbad", 1, 32, [o])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", ["l_ldsm", "l_cpa", "l_cpw", "l_many", "l_loop", "l_same"])
def test_lane_races(m, k, seed):
    x, o = words(8, 4), np.zeros(32, np.uint32)
    ck = ("race", "init", "lanes")
    lane, f = np.arange(32), x.reshape(-1)
    m.launch(k + "_ok", 1, 32, [x, o], checks=ck, seed=seed)
    ref = {
        "l_ldsm": x.view(np.uint16).reshape(8, 8).T.copy().view(np.uint32).reshape(-1),
        "l_cpa": f[lane ^ 5],
        "l_cpw": (31 - lane).astype(np.uint32) + f,
        "l_many": np.full(32, 107),
        "l_loop": lane * 10 + 3,
        "l_same": np.full(32, 9),
    }[k]
    assert np.array_equal(o, ref)
    if k == "l_same":  # two writes of one value are accepted
        m.launch(k + "_bad", 1, 32, [x, o], checks=ck, seed=seed)
        return
    with pytest.raises(
        SimError,
        match="race between lanes of a warp.*(lane \\d+|several lanes) without bar.warp.sync",
    ):
        m.launch(k + "_bad", 1, 32, [x, o], checks=ck, seed=seed)
    m.launch(k + "_bad", 1, 32, [x, o], seed=seed)  # off by default
