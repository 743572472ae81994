"""The device beyond torch and Triton: torch.compile, NVRTC, fatbins, plain CUDA, allocators."""

import os
import subprocess

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
pytestmark = pytest.mark.vgpu_arch(80)
dev = "cuda"


def test_torch_compile(sub, tmp_path):
    r = sub(
        """
        import torch, vgpu
        import torch.nn.functional as F
        w = torch.randn(40, 40, device="cuda", requires_grad=True)
        x = torch.randn(16, 40, device="cuda")
        def f(x, w): return (torch.sin(x @ w) * 2 + F.gelu(x)).softmax(-1).square().sum()
        a = f(x, w); (ga,) = torch.autograd.grad(a, w)
        b = torch.compile(f)(x, w); (gb,) = torch.autograd.grad(b, w)
        torch.testing.assert_close(a, b); torch.testing.assert_close(ga, gb, atol=1e-4, rtol=1e-4)
        print("kernels", len(set(l["kernel"] for l in vgpu.launches())))
        """,
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )
    assert int(r.stdout.split()[-1]) >= 2


def test_nvrtc():
    k = torch.cuda._compile_kernel(
        'extern "C" __global__ void addk(const float* a, float* c, int n) '
        "{ int i = threadIdx.x; if (i < n) c[i] = 2 * a[i]; }",
        "addk",
    )
    a = torch.ones(100, device=dev)
    c = torch.empty_like(a)
    k((1, 1, 1), (128, 1, 1), (a, c, 100))
    assert c.sum().item() == 200


@pytest.mark.parametrize("mode", ["none", "speed", "balance", "size"])
def test_fatbin_compression(mode, sub, nvcc, tmp_path):
    source = os.path.join(HERE, "cuda", "times_three.cu")
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(
        [
            nvcc,
            "-shared",
            "-Xcompiler",
            "-fPIC",
            "-cudart",
            "shared",
            "-gencode",
            "arch=compute_80,code=[sm_80,compute_80]",
            "-gencode",
            "arch=compute_90,code=compute_90",
            f"--compress-mode={mode}",
            source,
            "-o",
            "a.so",
        ],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )
    for arch in (80, 90):
        r = sub(
            f"import ctypes; print(ctypes.CDLL({str(tmp_path / 'a.so')!r}).go())", "--arch", arch
        )
        assert r.stdout.strip() == "93"
        r = sub(
            f"import ctypes; print(ctypes.CDLL({str(tmp_path / 'a.so')!r}).go())",
            "--arch",
            arch,
            env={"VGPU_FORCE_CUOBJDUMP": "1"},
        )
        assert r.stdout.strip() == "93", r.stderr


def test_cuda_malloc_async_backend(sub):
    assert (
        "2000.0"
        in sub(
            "import torch; print((torch.ones(1000, device='cuda') + 1).sum().item())",
            env={"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
        ).stdout
    )


def test_profiler():
    from torch.profiler import ProfilerActivity, profile

    x = torch.ones(10, device=dev)
    with profile(activities=[ProfilerActivity.CPU]) as p:
        (x + 1).sum()
    assert any("add" in e.key for e in p.key_averages())


def test_spawned_child(sub):
    r = sub("""
        import torch, torch.multiprocessing as mp
        def work(i): print("child", torch.ones(3, device="cuda").sum().item(), flush=True)
        if __name__ == "__main__": mp.spawn(work, nprocs=1)
        """)
    assert "child 3.0" in r.stdout


@pytest.fixture(scope="module")
def misc(nvcc, tmp_path_factory):
    so = tmp_path_factory.mktemp("misc") / "misc.so"
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(
        [
            nvcc,
            "-shared",
            "-Xcompiler",
            "-fPIC",
            "-cudart",
            "shared",
            "-gencode",
            "arch=compute_80,code=compute_80",
            os.path.join(HERE, "cuda", "misc.cu"),
            "-o",
            str(so),
        ],
        env=env,
        check=True,
        capture_output=True,
    )
    return str(so)


@pytest.mark.parametrize(
    "fn,result,words",
    [
        ("coop", "127", ""),  # cooperative_groups grid sync
        ("not_coop", "-719", "not launched cooperatively"),
        ("spinner", "702", "endless loop"),
        ("launch_ex", "63", ""),
        ("pass_structs", "1", ""),
        ("bad_copies", "8", "past the end of an allocation"),
    ],
)
def test_plain_cuda(misc, sub, fn, result, words):
    r = sub(
        f"import ctypes; print(ctypes.CDLL({misc!r}).{fn}())", env={"VGPU_MAX_INSTS": "5000000"}
    )
    assert r.stdout.strip() == result and words in r.stderr, r.stdout + r.stderr


def test_blas_handle_is_no_crash(sub):
    r = sub("""
        import torch
        torch.ones(1, device="cuda")
        try: print("handle", torch.cuda.current_blas_handle())
        except RuntimeError as e: print("error", str(e).splitlines()[0])
        """)
    assert "error" in r.stdout or "handle" in r.stdout
