"""nvcc-compiled kernels (official headers) against numpy/torch references."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from vgpu.sim import Module, SimError, poison

pytestmark = pytest.mark.vgpu_arch(80)
CUDA = Path(__file__).parent / "cuda"
WMMA = CUDA / "wmma.cu"


@pytest.fixture(scope="module")
def wm(nvcc):
    return Module.from_cuda(WMMA)


@pytest.mark.parametrize(
    "name,M,N,dt,odt,ta,tb",
    [
        ("w_h16", 16, 16, torch.float16, torch.float32, 0, 0),
        ("w_h16cc", 16, 16, torch.float16, torch.float32, 1, 1),
        ("w_h32x8", 32, 8, torch.float16, torch.float32, 0, 0),
        ("w_h8x32", 8, 32, torch.float16, torch.float16, 0, 1),
        ("w_bf", 16, 16, torch.bfloat16, torch.float32, 0, 1),
        ("w_s8", 16, 16, torch.int8, torch.int32, 0, 1),
        ("w_f64", 8, 8, torch.float64, torch.float64, 0, 1),
        ("w_tf32", 16, 16, torch.float32, torch.float32, 0, 1),
    ],
)
def test_wmma(wm, name, M, N, dt, odt, ta, tb):
    K = 48

    def mk(*s):
        return torch.randint(-50, 50, s, dtype=dt) if dt == torch.int8 else torch.randn(*s).to(dt)

    a, b, c = mk(M, K), mk(K, N), poison(torch.empty(M, N, dtype=odt))
    r = wm.launch(
        name, 1, 32, [a.t().contiguous() if ta else a, b.t().contiguous() if tb else b, c, K]
    )
    ref = (a.double() @ b.double()) * (1 if name == "w_tf32" else 2)
    tol = (
        0.1
        if odt == torch.float16
        else 3e-2
        if name == "w_tf32"
        else 1e-4
        if odt == torch.float32
        else 1e-9
    )
    assert (c.double() - ref).abs().max() < tol and r.stats["mma_flops"] == 2 * M * N * K


def test_wmma_smem(wm):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.empty(16, 16)
    wm.launch("w_smem", 1, 32, [a, b, c])
    assert (c - a.float() @ b.float()).abs().max() < 1e-4


MISC = CUDA / "idioms.cu"


@pytest.fixture(scope="module")
def mm(nvcc):
    return Module.from_cuda(MISC)


def test_reductions(mm):
    x, o = torch.rand(5000), torch.zeros(1)
    mm.launch("block_sum", 3, 256, [x, o, 5000])
    assert abs(o.item() - x.double().sum().item()) < 1e-2


def test_coop(mm):
    x, o = np.random.default_rng(1).integers(0, 100, 128).astype(np.int32), np.zeros(896, np.int32)
    mm.launch("coop", 1, 128, [x, o])
    w = x.reshape(4, 32)
    assert np.array_equal(o[:128], np.repeat(x.reshape(8, 16).sum(1), 16))
    up = w.copy()
    up[:, 3:] = w[:, :-3]
    assert np.array_equal(o[128:256].reshape(4, 32), up)
    assert np.array_equal(o[256:384].reshape(4, 32)[:, 0], (w > 90).any(1) * 2 + (w >= 0).all(1))
    assert np.array_equal(o[384:512].reshape(4, 32)[:, 5], (w & 1).sum(1))
    for k in range(4):
        r = 0
        for lane in range(32):
            if w[k, lane] & 1:
                assert o[512 + 32 * k + lane] == (w[k] & 1).sum() * 100 + r
                r += 1
            assert o[640 + 32 * k + lane] == w[k].max() + (w[k] & 3).sum()
            assert int(o[768 + 32 * k + lane]) & 0xFFFFFFFF == sum(
                1 << j for j in range(32) if (w[k, j] & 3) == (w[k, lane] & 3)
            )


def test_shfl(mm):
    x, o = np.arange(100, 132).astype(np.int32), np.zeros(160, np.int32)
    mm.launch("shfls", 1, 32, [x, o])
    lane = np.arange(32)
    assert (
        np.array_equal(o[:32], x[(lane * 7) & 31])
        and np.array_equal(o[32:64], np.where(lane % 16 >= 5, x[np.maximum(lane - 5, 0)], x))
        and np.array_equal(o[64:96], np.where(lane % 8 + 3 < 8, x[np.minimum(lane + 3, 31)], x))
        and np.array_equal(o[96:128], x[lane ^ 9])
        and np.array_equal(o[128:], x[lane // 8 * 8 + 2])
    )


def test_pipeline(mm):
    x, o = np.random.rand(10, 64, 4).astype(np.float32), np.zeros((10, 64, 4), np.float32)
    r = mm.launch("pipe", 1, 64, [x, o, 10])
    assert np.array_equal(o, x[:, ::-1]) and r.stats["cp_async_bytes"] == x.nbytes
    x, o = np.random.rand(100).astype(np.float32), np.zeros(128, np.float32)
    mm.launch("pipe_zfill", 1, 128, [x, o])
    assert np.array_equal(o[::-1][:100], x) and (o[::-1][100:] == 0).all()


def test_half(mm):
    n = 64
    a, b = torch.randn(n, 2).half() * 3, torch.randn(n, 2).half() * 3 + 0.01
    o, f = torch.zeros(10, n, 2).half(), torch.zeros(2, n)
    mm.launch("halfs", 1, n, [a, b, o, f, n])
    ref = [
        a + b,
        a * b,
        (a.double() * b.double() + a.double()).half(),
        torch.maximum(a, b),
        a - b,
        torch.exp2(a.float()).half(),
        -a.abs(),
        (a >= b).half(),
        (1 / b.float()).half(),
        torch.stack([(a[:, 0].float() * 3).half(), a[:, 1]], 1),
    ]
    for k in range(10):
        assert (o[k].float() - ref[k].float()).abs().max() <= (
            2e-3 * ref[k].abs().max().float() if k in (5, 8) else 0
        ), k
    assert torch.equal(
        f[0], torch.where(a[:, 0] > b[:, 0], a[:, 1].float(), b[:, 0].float().round())
    ) and torch.equal(f[1], (a[:, 1] < b[:, 1]).float())
    a, b = torch.randn(n, 2).bfloat16(), torch.randn(n, 2).bfloat16()
    o, f = torch.zeros(5, n, 2).bfloat16(), torch.zeros(n)
    mm.launch("bfs", 1, n, [a, b, o, f, n])
    i = torch.arange(n).float()
    ref = [
        a + b,
        a * b,
        (a.double() * b.double() + a.double()).bfloat16(),
        torch.minimum(a, b),
        torch.stack([(np.float32(1.0 / 3) * i), -i], 1).bfloat16(),
    ]
    for k in range(5):
        assert torch.equal(o[k], ref[k]), k
    assert torch.equal(f, a[:, 0].float() + b[:, 1].float())


@pytest.mark.parametrize("seed", range(3))
def test_atomics(mm, seed):
    o, u, f, d, q, h = (
        np.zeros(16, np.int32),
        np.array([0, 3, 0, 5], np.uint32),
        np.zeros(1, np.float32),
        np.zeros(1),
        np.zeros(1, np.uint64),
        np.zeros(2, np.float16),
    )
    o[7] = 0
    o[8] = -1
    mm.launch("atom", 2, 64, [o, u, f, d, q, h], seed=seed)
    t = np.arange(128)
    assert (
        o[:4].tolist() == [t[t % 4 == k].sum() for k in range(4)]
        and o[4] == 127
        and o[5] == -127
        and o[6] == 0
        and o[7] == 255
        and (o[8] & 15) == 0
        and o[9] == 128
        and o[10] == 127
    )
    c, e = 0, 3
    for _ in range(128):
        c = 0 if c >= 10 else c + 1
        e = 7 if e == 0 or e > 7 else e - 1
    assert (
        u.tolist() == [c, e, 77, 9]
        and f[0] == 64
        and d[0] == 32
        and q[0] == 128 << 33
        and h.tolist() == [128, 256]
    )


def test_mutex_forward_progress(mm):
    lock, cnt = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mm.launch("mutex", 2, 64, [lock, cnt])
    assert cnt[0] == 2 * 64 * 3 and lock[0] == 0


def test_calls(mm):
    x = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    o = np.zeros(160, np.float32)
    s = struct.pack("<fid3s5x", 1.5, 7, 2.25, b"abc")
    mm.launch("calls", 1, 32, [x, o, s])
    for i in range(32):
        r = np.float32(1)
        for k in range(i % 7):
            r = r * x[i] + k
        d = [97, 98, 99]
        d[i % 3] = 122
        assert (
            abs(o[i] - r) <= 1e-4 * max(1, abs(r))
            and abs(o[32 + i] - (1.5 + i + 14 + 2.25 + sum(d))) < 1e-3
            and o[64 + i] == [3, 1, 4, 1, 5, 9, 2, 6][i & 7] + 0.5 + (i & 3)
        )
        j = int(x[i] * np.float32(100)) & 15
        assert o[96 + i] == x[(i + j) & 31] + x[(i + (j * 3 & 15)) & 31]
        v = float(x[i])
        e = [
            np.sin(v),
            v * 2,
            np.log(abs(v) + 1),
            3,
            np.exp(v),
            abs(v) ** 0.5,
            abs(v) ** 1.5,
            np.tanh(v),
            -v,
        ][i % 9]
        assert abs(o[128 + i] - e) < 2e-6 * max(1, abs(e)), i % 9
    assert mm.read_symbol("gcount", np.int32)[0] == 42


def test_ints(mm):
    n = 128
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b = (rng.integers(1, 2**31, n) >> rng.integers(0, 30, n)).astype(np.int32) * rng.choice(
        [-1, 1], n
    ).astype(np.int32)
    b[b == 0] = 3
    o = np.zeros((19, n), np.int64)
    mm.launch("ints", 1, n, [a, b, o, n])
    M32, M64 = 2**32 - 1, 2**64 - 1

    def s32(v):
        return ((v & M32) ^ 2**31) - 2**31

    def s64(v):
        return ((v & M64) ^ 2**63) - 2**63

    def tdiv(x, y):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    for i in range(n):
        x, y = int(a[i]), int(b[i])
        ux, uy = x & M32, y & M32
        X, Y = x, s64(y << 7)

        def by(v, k):
            return v >> 8 * k & 255

        def sg(v):
            return v - 256 if v > 127 else v

        v64 = ux | uy << 32
        sh = x & 31
        fl = ((uy << 32 | ux) << sh >> 32) & M32
        assert (
            o[0, i] == s32(tdiv(x, y))
            and o[1, i] == ux % uy
            and o[2, i] == s64(X * Y)
            and o[3, i] == x * y >> 32
        )
        assert o[4, i] == s32(
            bin(ux).count("1") + 100 * (32 - ux.bit_length()) + 10000 * ((ux & -ux).bit_length())
        )
        assert (
            o[5, i] == int(f"{ux:032b}"[::-1], 2)
            and o[6, i] == sum(by(v64, k) << 8 * j for j, k in enumerate([5, 1, 7, 3]))
            and o[7, i] == fl
        )
        assert (
            o[8, i] == tdiv(s64(X * 1000003), y | 1)
            and o[9, i] == s32(5 + sum(sg(by(ux, k)) * sg(by(uy, k)) for k in range(4)))
            and o[10, i] == (7 + abs(x - y)) & M32
        )

        def s16(v):
            return ((v & 65535) ^ 32768) - 32768

        assert (
            o[11, i] == s16(x) * s16(y)
            and o[12, i] == s64(((X * X & M64) * (Y * Y & M64)) >> 64)
            and o[13, i] == ((x >> 3) & 255) - sg(y & 255)
        )
        assert (
            o[14, i] == (s32(abs(x) + min(x, y)) - max(ux, uy)) & M32
            or o[14, i] == ((abs(x) + min(x, y)) - max(ux, uy)) & M32
        )
        assert (
            o[15, i] == s64(X * Y >> 40)
            and o[16, i] == sum(((by(ux, k) + by(uy, k)) & 255) << 8 * k for k in range(4))
            and o[17, i] == (x + y + 1) >> 1
            and o[18, i] == s64((X & M64) >> (y & 63))
        )


def test_rounding(mm):
    n = 64
    a, b = torch.randn(n) * 5, torch.randn(n) * 3
    o, d = np.zeros((11, n), np.float32), np.zeros((2, n))
    mm.launch("rounding", 1, n, [a, b, o, d, n])
    from fractions import Fraction as Fr

    def rnd(v, mode):  # v: Fraction -> float32 in direction
        f = np.float32(float(v))
        e = Fr(float(f))
        if e == v:
            return f
        lo, hi = (
            (f, np.nextafter(f, np.float32(np.inf)))
            if e < v
            else (np.nextafter(f, np.float32(-np.inf)), f)
        )
        return {"rd": lo, "ru": hi, "rz": lo if v > 0 else hi}[mode]

    for i in range(n):
        x, y = Fr(a[i].item()), Fr(b[i].item())
        assert (
            o[0, i] == rnd(x + y, "rz")
            and o[1, i] == rnd(x * y, "ru")
            and o[2, i] == rnd(x * y + x, "rd")
            and o[4, i] == rnd(1 / y, "ru")
            and o[8, i] == rnd(x * y, "rz")
        )
        assert (
            o[6, i] == np.floor(a[i].item())
            and o[7, i] == max(0, int(a[i].item()))
            and o[9, i] == min(max(a[i].item(), 0), 1)
            and d[0, i] >= float(x)
        )
        s = Fr(float(o[5, i]))
        assert s * s <= abs(x) and Fr(float(np.nextafter(o[5, i], np.float32(9e9)))) ** 2 > abs(x)
    assert np.array_equal(o[3], (a / b).numpy()) and np.array_equal(
        o[10], (a.round() + b.trunc()).numpy()
    )
    assert np.allclose(
        d[1],
        np.sin(a.double().numpy()) * np.exp(b.double().numpy()) + np.cbrt(a.double().numpy()),
        rtol=1e-12,
    )


def test_printf_assert_trap(mm):
    assert mm.launch("prints", 1, 32, [5]).printf == f"k=5 f=1.50 s=abc u={1 << 40}\n"
    with pytest.raises(SimError, match="device assertion failed: k != 13"):
        mm.launch("prints", 1, 32, [13])
    with pytest.raises(SimError, match="trap"):
        mm.launch("prints", 1, 32, [14])


@pytest.mark.parametrize("seed", range(4))
def test_divergence_and_barriers(mm, seed):
    o = np.zeros(64, np.int32)
    mm.launch("diverge", 1, 64, [o], seed=seed)
    for t in range(64):
        s = 0
        for i in range(t % 13):
            if i & 1:
                s += 1
            else:
                s += 2 + (0 if t & 4 else 3)
        assert o[t] == s + 100
    o = np.zeros(128, np.int32)
    mm.launch("named", 1, 128, [o], seed=seed)
    assert o[:64].tolist() == [(63 - t) * 3 for t in range(64)] and (o[64:] == 64 + 1000).all()


def test_dynamic_smem(mm):
    o = np.zeros(32, np.float32)
    r = mm.launch("smemdyn", 1, 128, [o], smem=512)
    assert (
        np.array_equal(o, np.arange(128).reshape(32, 4).sum(1) + 1)
        and r.stats["smem_dynamic"] == 512
    )
    with pytest.raises(SimError, match="out-of-bounds shared"):
        mm.launch("smemdyn", 1, 128, [o], smem=508)
