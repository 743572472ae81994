"""Intrinsics, indirect calls, fp8, 64-bit shuffles, vector and cached accesses."""

from pathlib import Path

import numpy as np
import pytest
import torch
import vgpu
from vgpu.sim import Module

CUDA = Path(__file__).parent / "cuda"
SRC = CUDA / "intrinsics.cu"


@pytest.fixture(scope="module")
def m(nvcc):
    return Module.from_cuda(SRC, arch=f"sm_{vgpu.arch()}")


def test_indirect(m):
    x, o = np.random.rand(32).astype(np.float32), np.zeros(32, np.float32)
    i = np.arange(32)
    m.launch("virt", 1, 32, [x, o])
    assert np.array_equal(o, np.where(i % 3, x * np.float32(3), x + np.float32(10)))
    m.launch("fptr", 1, 32, [x, o])
    assert np.array_equal(o, np.where(i & 1, -x, x * x))


def test_fp8(m):
    x = torch.cat([torch.randn(90) * 30, torch.tensor([0.0, -0.0, 500.0, 1e6, 1e-3, 448.0])])
    n = len(x)
    o = torch.zeros(4, n)
    m.launch("fp8", 1, n, [x, o, n])
    r = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    s = x.clamp(-57344, 57344).to(torch.float8_e5m2).float()
    assert (
        torch.equal(o[0], r)
        and torch.equal(o[1], s)
        and torch.equal(o[2], r)
        and torch.equal(o[3], -r)
    )


def test_memory_forms(m):
    x, d, o = (
        np.random.rand(64, 4).astype(np.float32),
        np.random.rand(64, 2),
        np.zeros(192, np.float32),
    )
    m.launch("loads", 1, 64, [x, d, o])
    assert (
        np.allclose(o[:64], x[:, 0] + x[:, 1] + x[:, 2] + d[:, 1])
        and np.array_equal(o[64:128], x[:, 3])
        and np.array_equal(o[128:], x.reshape(-1)[:64])
    )
    u, v = (
        np.random.randint(0, 2**32, (32, 4), dtype=np.uint64).astype(np.uint32),
        np.zeros((32, 4), np.uint32),
    )
    m.launch("b128", 1, 32, [u, v])
    assert np.array_equal(u, v)


def test_warp_wide(m):
    x, o, q = np.random.rand(32), np.zeros(33), np.zeros(160, np.int64)
    m.launch("wide", 1, 32, [x, o, q])
    i = np.arange(32)
    assert (
        np.allclose(o[:32], x.sum())
        and np.array_equal(q[:32], np.minimum(i + 1, 31) << 40)
        and (q[32:64] & 0xFFFFFFFF == sum(1 << k for k in range(0, 32, 3))).all()
        and (q[64:96] & 0xFFFFFFFF == 0xFFFFFFFF).all()
        and (q[96:128] == 5).all()
    )
    assert np.array_equal(
        q[128:], np.repeat([np.bitwise_xor.reduce(i[8 * k : 8 * k + 8]) for k in range(4)], 8)
    )


def test_simd(m):
    n = 64
    rng = np.random.default_rng(3)
    a, b = [rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32) for _ in range(2)]
    o = np.zeros((8, n), np.uint32)
    m.launch("simd", 1, n, [a, b, o, n])
    A8, B8, A2, B2 = (
        a.view(np.uint8).astype(int),
        b.view(np.uint8).astype(int),
        a.view(np.int16).astype(int),
        b.view(np.int16).astype(int),
    )

    def p8(v):
        return v.astype(np.uint8).view(np.uint32)

    def p2(v):
        return v.astype(np.int16).view(np.uint32)

    def s(v):
        return v.astype(np.int64) - ((v >> 31).astype(np.int64) << 32)

    def w(v):
        return (v & 0xFFFFFFFF).astype(np.uint32)

    assert (
        np.array_equal(o[0], p8(abs(A8 - B8)))
        and np.array_equal(o[1], p2(np.maximum(A2, B2)))
        and np.array_equal(o[2], p8((A8 > B8) * 255))
        and np.array_equal(o[3], p8((A8 + B8 + 1) >> 1))
        and np.array_equal(o[4], p2(np.clip(A2 - B2, -32768, 32767)))
    )
    S = s(w(s(a) + s(b)))
    assert (
        np.array_equal(o[5], w(np.maximum(S, 5)))
        and np.array_equal(o[6], w(np.minimum(np.minimum(s(a), s(b)), 77)))
        and np.array_equal(o[7], p2((A2 + B2).astype(np.int16)))
    )


def test_fmath(m):
    import math

    x = torch.randn(64) * 2
    n = 64
    o = torch.zeros(18, n)
    m.launch("fmath", 1, n, [x, o, n])
    d = x.double()
    ref = [
        d.exp(),
        d.abs().log(),
        d.sin(),
        d / 3,
        d.abs().rsqrt(),
        d.clamp(min=0.25) + d.clamp(max=-0.5),
        torch.fmod(x, 0.7),
        d * 32,
        torch.copysign(torch.tensor(2.0).double(), d),
        (d < 0) * 4.0,
        None,
        torch.erfc(d),
        torch.lgamma(d.abs() + 1),
        torch.from_numpy(np.cbrt(d.numpy())),
        (d * 4).round(),
        torch.atan2(d, torch.tensor(0.3).double()),
        d.tanh(),
        torch.hypot(d, torch.tensor(1.0).double()),
    ]
    for k, r in enumerate(ref):
        if r is not None:
            torch.testing.assert_close(o[k].double(), r.double(), rtol=3e-5, atol=3e-6, msg=str(k))
    assert all(
        abs(o[10, i].item() - math.remainder(x[i].item(), float(np.float32(0.3)))) < 1e-6
        for i in range(n)
    )


def test_scopes_grid_hist(m):
    o = np.zeros(32, np.int32)
    m.launch("nest", 1, 32, [o])
    t = np.arange(32)
    assert np.array_equal(o, np.where(t > 5, 2, 1) + np.where(t > 9, 20, 10))
    o = np.zeros((2 * 3 * 2, 4 * 3 * 2), np.int32)
    m.launch("grid3", (2, 3, 2), (4, 3, 2), [o])
    t = np.arange(24)
    assert np.array_equal(
        o, np.arange(12)[:, None] * 1000 + (t % 4 + 10 * (t // 4 % 3) + 100 * (t // 12))
    )
    x, h = np.random.randint(0, 256, 5000).astype(np.uint8), np.zeros(256, np.int32)
    m.launch("hist", 3, 128, [x, h, 5000])
    assert np.array_equal(h, np.bincount(x, minlength=256))
    f, r = np.random.rand(4000).astype(np.float32), np.zeros(1, np.float32)
    m.launch(
        "lastblock", 7, 32, [f, np.zeros(7, np.float32), np.zeros(1, np.uint32), r, 4000], seed=4
    )
    assert abs(r[0] - f.sum()) < 1e-2


def test_statistics(m):
    o = np.zeros(32, np.float32)
    s = {k: m.launch("bank", 1, 32, [o, k]).stats for k in (0, 1, 2, 32, 33)}
    w = {k: s[k]["shared_load_wavefronts"] for k in s}
    assert w == {0: 1, 1: 1, 2: 2, 32: 32, 33: 1}
    x = np.zeros(32 * 32, np.float32)
    for st, sec in ((1, 4), (2, 8), (8, 32), (32, 32), (0, 1)):
        r = m.launch("strided", 1, 32, [x, o, st]).stats
        assert (
            r["global_load_sectors"] == sec
            and r["global_store_sectors"] == 4
            and r["global_load_bytes"] == 128
            and r["buffers"][0]["read"] == (128 if st else 4)
        )
