"""Planted bugs: every check must fire, with a precise message; the correct twin must pass."""

import re
from pathlib import Path

import numpy as np
import pytest
from vgpu.sim import Module, SimError, poison

pytestmark = pytest.mark.vgpu_arch(80)
CUDA = Path(__file__).parent / "cuda"
SRC = CUDA / "bugs.cu"


@pytest.fixture(scope="module")
def m(nvcc):
    return Module.from_cuda(SRC)


X = np.arange(256, dtype=np.float32)


def out(n=256):
    return poison(np.zeros(n, np.float32))


def bad(m, match, name, block, args, **kw):
    with pytest.raises(SimError, match=match) as e:
        m.launch(name, kw.pop("grid", 1), block, args, **kw)
    s = str(e.value)
    assert name in s and re.search(r"line \d+: \S", s), s
    return s


def test_oob_by_one(m):
    o = out(100)
    m.launch("copy", 2, 64, [X[:100], o, 100, 0])
    assert np.array_equal(o, X[:100])
    s = bad(
        m,
        r"out-of-bounds global read of 4 bytes.*byte offset 400, 4 bytes past its end",
        "copy",
        64,
        [X[:100].copy(), out(101), 100, 1],
        grid=2,
    )
    assert "thread (36,0,0)" in s and "CTA (1,0,0)" in s
    bad(
        m,
        r"out-of-bounds global write of 4 bytes.*arg1.*byte offset 400",
        "copy",
        64,
        [X, out(100), 100, 1],
        grid=2,
    )
    s = bad(
        m,
        r"out-of-bounds global read.*byte offset -4, before its start",
        "rd_before",
        32,
        [X, out()],
    )
    bad(m, r"out-of-bounds global", "vec_oob", 32, [X[:127].copy(), out(128), 32])
    bad(m, r"misaligned", "misalign", 32, [X.view(np.int8), out()])


def test_unwritten(m):
    o = out(100)
    r = m.launch("copy", 2, 64, [X[:100].copy(), o, 100, -3])
    assert r.unwritten(1) == 12 and np.isnan(o[97:]).all()


@pytest.mark.parametrize("seed", range(4))
def test_races(m, seed):
    o = out()
    m.launch("turn_ok", 1, 256, [X, o], seed=seed)
    assert np.array_equal(o, X[(np.arange(256) + 100) % 256 ^ 3])
    bad(m, r"race|uninitialised", "turn_bad", 256, [X, out()], seed=seed)
    m.launch("war_ok", 1, 128, [X, out()], seed=seed)
    bad(
        m,
        r"shared memory race.*(write by warp|read by warp)",
        "war_bad",
        128,
        [X, out()],
        seed=seed,
    )
    bad(
        m,
        r"shared memory race.*write by warp \d conflicts with an earlier write by warp \d",
        "waw_bad",
        128,
        [out()],
        seed=seed,
    )
    bad(m, r"race|uninitialised|not yet waited", "cpa_nosync", 128, [X, out()], seed=seed)


def test_race_without_init_check(m):
    bad(m, r"shared memory race", "turn_bad", 256, [X, out()], checks={"race"})
    m.launch("turn_bad", 1, 256, [X, out()], checks=())


def test_cp_async_wait(m):
    o = out()
    m.launch("cpa_ok", 1, 128, [X, o])
    m.launch("cpa_ok1", 1, 128, [X, o])
    bad(
        m,
        r"outstanding cp.async not yet waited for \(issued at line \d+: cp.async",
        "cpa_bad",
        128,
        [X, out()],
    )
    x, o = X.copy(), out()
    m.launch("cpa_late", 1, 32, [x, o])
    assert (o[:32] == -1).all()  # the source is read as late as the wait allows
    bad(m, r"write of shared address.*outstanding cp.async", "cpa_over", 32, [X, out()])
    o = out()
    m.launch("cpa_bad", 1, 128, [X, o], checks=())
    assert np.isnan(o[:128]).all()  # poison, not the data


def test_uninit(m):
    s = bad(m, r"read of uninitialised shared memory", "uninit", 128, [out()])
    assert "thread (77,0,0)" in s


def test_barriers(m):
    bad(m, r"divergen", "divbar", 32, [out()])
    s = bad(m, r"deadlock in CTA", "skipbar", 128, [out()])
    assert "barrier 0: 32 of 128 threads have arrived" in s and "barrier 1: 96 of 128" in s
    o = out()
    m.launch("exited", 1, 64, [o])
    assert np.array_equal(o[:40], X[:40])
    bad(m, r"divergence deadlock|do not take part|never", "badshfl", 32, [np.zeros(32, np.int32)])
    bad(m, r"not in its member mask", "wrongmask", 32, [np.zeros(32, np.int32)])
    bad(
        m,
        r"instruction limit|no CTA makes progress",
        "loop",
        32,
        [np.zeros(1, np.int32)],
        max_insts=300000,
    )


def test_local_and_args(m):
    m.launch("local_oob", 1, 1, [np.arange(8, dtype=np.int32), 3])
    bad(m, r"out-of-bounds local", "local_oob", 1, [np.arange(8, dtype=np.int32), 1 << 20])
    with pytest.raises(SimError, match="takes 4 arguments"):
        m.launch("copy", 1, 32, [X])
    with pytest.raises(SimError, match="found \\["):
        m.launch("nothere", 1, 32, [X])


def test_unsupported_instruction():
    t = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) {
  .reg .b32 %r<3>;
  tex.1d.v4.f32.s32 {%r1,%r1,%r1,%r1}, [p, {%r1}];
  ret;
}"""
    with pytest.raises(SimError, match=r"line 6: tex.1d"):
        Module(t).launch("k", 1, 32, [0])
    with pytest.raises(SimError, match=r"modifier .foo"):
        Module(
            t.replace("tex.1d.v4.f32.s32 {%r1,%r1,%r1,%r1}, [p, {%r1}]", "add.foo.u32 %r1, %r1, 1")
        ).launch("k", 1, 32, [0])


def test_speed():
    m = Module.from_cuda(CUDA / "bugs_sm90.cu")
    r = m.launch("alu", 1, 128, [out(), 20000])
    rate = r.stats["warp_insts"] / r.stats["seconds"]
    print("ALU warp instructions/s: %.1f M" % (rate / 1e6))
    assert rate > 3e6


def test_lane_races_optional(m):
    ck = ("race", "init", "lanes")
    o = out(32)
    m.launch("wsum_ok", 1, 32, [X[:32].copy(), o], checks=ck)
    assert (o == X[:32].sum()).all()
    bad(m, "race between lanes of a warp", "wsum_bad", 32, [X[:32].copy(), o], checks=ck)
    m.launch("wsum_bad", 1, 32, [X[:32].copy(), o])
