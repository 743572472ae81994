"""An nvcc extension's own kernels: PTX from its fatbin, run by the simulator."""

import pytest
import torch
import vgpu

dev = "cuda"


def test_saxpy_and_stats(ext):
    x, y = torch.randn(1000, device=dev), torch.randn(1000, device=dev)
    with vgpu.profile() as p:
        o = ext.saxpy(2.0, x, y, 128)
    torch.testing.assert_close(o, 2 * x + y)
    (k,) = p.launches
    assert (
        k["kernel"].startswith("saxpy(")
        and k["grid"] == [8, 1, 1]
        and k["block"] == [128, 1, 1]
        and k["ok"]
    )
    assert p.total("warp_insts") > 0 and "saxpy" in str(p)
    assert len(vgpu.launches()) == 1
    vgpu.clear()
    assert vgpu.launches() == []


def test_big_shared_memory(ext):
    x = torch.randn(3, 20000, device=dev)
    with pytest.raises(RuntimeError, match="invalid argument"):
        ext.rowsum(x, 0, True)  # 80000 bytes without the opt-in
    torch.testing.assert_close(ext.rowsum(x, 1, True), x.sum(1), atol=1e-3, rtol=1e-4)
    with pytest.raises(RuntimeError, match="invalid argument"):
        ext.rowsum(x, 228 * 1024, True)  # more than any device has
    torch.testing.assert_close(ext.rowsum(x, 1, True), x.sum(1), atol=1e-3, rtol=1e-4)


@pytest.mark.vgpu_arch(80)
def test_limit_depends_on_arch(ext, sub):
    code = """
        import torch, vgpu_test_ext as E
        x = torch.ones(1, 50000, device="cuda")
        try: print("sum", E.rowsum(x, 1, True).item())
        except RuntimeError as e: print("refused")
        """
    assert "refused" in sub(code, "--arch", 80).stdout
    assert "sum 50000.0" in sub(code, "--arch", 90).stdout


def test_atomics(ext):
    x = torch.randint(0, 16, (5000,), device=dev, dtype=torch.int32)
    h, w = ext.histogram(x, 16)
    assert torch.equal(h.long(), torch.bincount(x, minlength=16)) and torch.equal(w, h * 0.5)


def test_half2_and_symbols(ext):
    x = torch.randn(256, device=dev).half()
    y = x.clone()
    ext.hscale(y, 3.0)
    assert torch.equal(y, x * 3)
    t, z = torch.arange(8.0), torch.zeros(16, device=dev)
    c = ext.use_const(t, z)
    assert torch.equal(z.cpu(), t.repeat(2)) and ext.use_const(t, z) == c + 1


def test_streams(ext):
    s1, s2 = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.ones(64, device=dev)
    s1.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s1):
        i1 = ext.stream_id()
        a = ext.saxpy(1.0, x, x, 64)
    s2.wait_stream(s1)
    with torch.cuda.stream(s2):
        i2 = ext.stream_id()
        b = ext.saxpy(1.0, a, x, 64)
    torch.cuda.synchronize()
    assert i1 != i2 and [k["stream"] for k in vgpu.launches()] == [i1, i2] and (b == 3).all()


def test_autograd_function(ext):
    class Saxpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, x, y):
            ctx.a = a
            return ext.saxpy(a, x, y, 128)

        @staticmethod
        def backward(ctx, g):
            return None, ext.saxpy(ctx.a, g, torch.zeros_like(g), 128), g

    x, y = (torch.randn(300, device=dev, requires_grad=True) for _ in range(2))
    (Saxpy.apply(3.0, x, y) ** 2).sum().backward()
    o = 3 * x.detach() + y.detach()
    torch.testing.assert_close(x.grad, 6 * o)
    torch.testing.assert_close(y.grad, 2 * o)
    assert len(vgpu.launches()) == 2


def test_attributes(ext):
    regs, smem, threads, occ, dyn = ext.kattrs()
    assert 8 <= regs <= 64 and smem == 128 and threads == 1024 and dyn >= 49152
    assert occ == {80: 164, 86: 100, 90: 228}[vgpu.arch()] * 1024 // (
        40000 + 1024 + 128
    )  # limited by shared memory


def test_printf(ext, capfd):
    ext.bug(8, torch.zeros(4, device=dev))
    assert capfd.readouterr().out.count("hello from thread") == 4


BUGS = [  # kernel number, message, CUDA code, words of the report
    (0, "unspecified launch failure", 719, ["uninitialised shared", "thread (32,0,0)", "k.cu:"]),
    (1, "misaligned address", 716, ["not a multiple of 4"]),
    (2, "unspecified launch failure", 719, ["trap", "thread (3,0,0)"]),
    (3, "device-side assert", 710, ["p[threadIdx.x] > 0"]),
    (4, "unspecified launch failure", 719, ["bar.sync"]),
    (5, "illegal memory access", 700, ["null pointer"]),
]


@pytest.mark.parametrize("which,msg,code,words", BUGS)
def test_planted_faults(ext, capfd, which, msg, code, words):
    x = torch.zeros(64, device=dev, dtype=torch.int32 if which in (2, 3) else torch.float32)
    with pytest.raises(RuntimeError, match=msg):
        ext.bug(which, x)
    assert vgpu.sticky() == code and all(w in vgpu.report() for w in words), vgpu.report()
    assert vgpu.report() in capfd.readouterr().err
    for f in (
        torch.cuda.synchronize,
        lambda: x + 1,
        lambda: torch.empty(1 << 22, device=dev),
        lambda: x.cpu(),
    ):  # the context is broken
        with pytest.raises(RuntimeError, match=msg):
            f()
    vgpu.reset()
    torch.cuda.synchronize()
    assert (x * 0).sum().item() == 0


@pytest.mark.parametrize(
    "which,msg",
    [(6, "too many resources"), (7, "invalid configuration"), (9, "invalid configuration")],
)
def test_bad_launch_is_not_sticky(ext, which, msg):
    x = torch.zeros(64, device=dev)
    with pytest.raises(RuntimeError, match=msg):
        ext.bug(which, x)
    assert vgpu.sticky() == 0
    torch.cuda.synchronize()
    assert x.sum().item() == 0


def test_out_of_bounds_by_one(ext):
    x, y = torch.zeros(1000, device=dev), torch.zeros(1000, device=dev)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ext.saxpy_oob(1.0, x, y)
    assert "0 bytes past the end of tensor block" in vgpu.report() and "arg 1" in vgpu.report()


@pytest.mark.vgpu_arch(80)
def test_out_of_bounds_strict(ext, sub):
    r = sub(
        """
        import torch, vgpu, vgpu_test_ext as E
        x, y = torch.zeros(1001, device="cuda"), torch.zeros(1001, device="cuda")
        try: E.saxpy_oob(1.0, x, y)
        except RuntimeError as e: print(e); print(vgpu.report())
        """,
        "--strict",
    )
    assert (
        "illegal memory access" in r.stdout
        and "0 bytes past the end of device allocation" in r.stdout
    )


def test_use_after_free(ext):
    _x, _y = torch.zeros(1000, device=dev), torch.zeros(1000, device=dev)
    z = torch.zeros(1000, device=dev)
    p = z.data_ptr()
    del z
    assert "inside a freed tensor block" in vgpu.describe(p)


def test_missing_sync(ext):
    x = torch.randn(2, 8000, device=dev)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        ext.rowsum(x, 0, False)
    assert (
        "race" in vgpu.report() or "uninitialised shared" in vgpu.report()
    ) and "k.cu:" in vgpu.report()


@pytest.mark.vgpu_arch(80)
def test_checks_can_be_off(ext, sub):
    r = sub(
        """
        import torch, vgpu_test_ext as E
        x = torch.ones(2, 8000, device="cuda")
        print("sum", E.rowsum(x, 0, False).sum().item())
        """,
        "--checks",
        "none",
    )
    assert "sum" in r.stdout


@pytest.mark.vgpu_arch(80)
def test_no_ptx_is_loud(sub):
    r = sub("""
        import ctypes, torch
        # a torch kernel that the aten fallback does not cover: its library has SASS only
        try: torch.ops.aten._fused_dropout(torch.ones(8, device="cuda"), 0.5)
        except (RuntimeError, NotImplementedError) as e: print("error", e)
        """)
    assert "no CPU kernel" in r.stdout or "PTX" in r.stdout + r.stderr


@pytest.mark.vgpu_arch(80)
def test_unmocked_is_loud(sub):
    r = sub("""
        import ctypes, vgpu
        L = ctypes.CDLL(vgpu.library("libcuda.so.1"))
        print(L.cudaGraphCreate(None, 0), L.cuTexObjectCreate(0, 0, 0, 0))
        """)
    assert (
        r.stdout.split() == ["801", "801"]
        and "cudaGraphCreate" in r.stderr
        and "cuTexObjectCreate" in r.stderr
    )


@pytest.mark.vgpu_arch(80)
def test_host_dereference_is_a_fault(sub):
    code = """
        import ctypes, torch
        x = torch.full((10,), 7., device="cuda")
        print("value", ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))[3])
        """
    r = sub(code, ok=False)
    assert (
        r.returncode == -11
        and "host code dereferenced a device pointer" in r.stderr
        and "at byte 12 of" in r.stderr
    )
    assert "value 7.0" in sub(code, env={"VGPU_HOST_READABLE": "1"}).stdout


def test_fault_in_backward(ext):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            ext.bug(5, g.contiguous())
            return g

    x = torch.ones(64, device=dev, requires_grad=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Bad.apply(x).sum().backward()
    vgpu.reset()
    (x * 3).sum().backward()  # the same autograd thread works again
    assert (x.grad == 3).all()
