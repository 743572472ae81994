"""Self tests of the virtual GPU, collected only on it; each runs for one of its architectures."""

import fcntl
import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import vgpu
from vgpu import build, sim

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Mark ours `gpu`. A test of one architecture runs where that is the device; the rest once."""
    keep, drop = [], []
    for item in items:
        if HERE not in item.path.parents:
            keep.append(item)
            continue
        item.add_marker(pytest.mark.gpu)
        params = item.callspec.params if hasattr(item, "callspec") else {}
        arch = params.get("arch") or next((m.args[0] for m in item.iter_markers("vgpu_arch")), 0)
        (keep if arch // 10 in (0, vgpu.arch() // 10) else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    yield
    vgpu.reset()


@pytest.fixture(scope="session")
def nvcc():
    if sim.nvcc() is None:
        pytest.skip("no nvcc")
    return sim.nvcc()


@pytest.fixture(scope="session")
def ext(nvcc):
    """The nvcc extension in cuda/extension, built once into the build directory."""
    sources = sorted((HERE / "cuda" / "extension").iterdir())
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:16]
    out = build.BUILD / "cache" / f"ext-{torch.__version__}-{key}"
    out.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(out.glob("*.so")):
            code = f"""
from torch.utils.cpp_extension import load
files = {[str(f) for f in sources if f.suffix != ".h"]}
load("vgpu_test_ext", files, extra_cflags=["-O1"],
     extra_cuda_cflags=["-O2", "-lineinfo"], build_directory={str(out)!r}, is_python_module=False)
"""
            env = {k: v for k, v in os.environ.items() if not k.startswith(("LD_", "VGPU_"))}
            env.update(TORCH_CUDA_ARCH_LIST="8.0+PTX", MAX_JOBS="2")
            env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
            if Path("/usr/local/cuda").exists():  # where a wrapper of nvcc elsewhere points to
                env.setdefault("CUDA_HOME", "/usr/local/cuda")
            r = subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True
            )
            assert list(out.glob("*.so")), r.stdout[-3000:] + r.stderr[-3000:]
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(out)])  # for `sub`
    sys.path.append(str(out))
    import vgpu_test_ext

    return vgpu_test_ext


@pytest.fixture
def sub(tmp_path):
    """Run code in a process of its own, under other options of `vgpu run`."""

    def go(code, *opts, env=None, ok=True):
        f = tmp_path / "sub.py"
        f.write_text(textwrap.dedent(code))
        cmd = [sys.executable, "-m", "vgpu", "run", *map(str, opts), "--", sys.executable, str(f)]
        env = {**os.environ, **(env or {})}
        r = subprocess.run(cmd, capture_output=True, text=True, timeout=300, env=env)
        if ok:
            assert r.returncode == 0, r.stdout + r.stderr
        return r

    return go
