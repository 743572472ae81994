"""The environment of a process on the virtual GPU."""

import importlib.util
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(
    lib: Path,
    arch: int,
    *,
    seed: int = 0,
    checks: str = "all",
    strict: bool = False,
    mem: int = 0,
    env: dict[str, str] | None = None,
) -> dict[str, str]:
    env = dict(os.environ if env is None else env)

    def prepend(name: str, value: object) -> None:
        old = [p for p in env.get(name, "").split(os.pathsep) if p and p != str(value)]
        env[name] = os.pathsep.join([str(value), *old])

    prepend("LD_PRELOAD", lib / "libcuda.so.1")
    prepend("LD_LIBRARY_PATH", lib)
    prepend("PYTHONPATH", HERE.parent)
    prepend("PYTHONPATH", HERE / "site")
    env.update(
        VGPU_ACTIVE="1",
        VGPU_LIB=str(lib),
        VGPU_ARCH=str(arch),
        VGPU_SEED=str(seed),
        VGPU_CHECKS=checks,
        TRITON_LIBCUDA_PATH=str(lib),
        PYTEST_PLUGINS="vgpu.plugin",
    )
    env.setdefault("CUDA_MODULE_LOADING", "LAZY")
    # for extensions that the process builds
    env.setdefault("TORCH_CUDA_ARCH_LIST", f"{arch // 10}.{arch % 10}+PTX")
    if mem:
        env["VGPU_MEM_MB"] = str(mem)
    if strict or env.get("VGPU_STRICT") == "1":
        env["VGPU_STRICT"] = "1"
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    cache = lib.parent / "cache"
    # Cubins made here carry PTX (hooks.py), so they must not mix with those for hardware.
    env.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    env.setdefault("VGPU_CACHE_DIR", str(cache / "ptxas"))
    os.makedirs(env["VGPU_CACHE_DIR"], exist_ok=True)
    spec = importlib.util.find_spec("triton")
    if spec is not None:  # Triton's wheel carries the CUDA tools
        tools = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
        env.setdefault("VGPU_CUOBJDUMP", str(tools / "cuobjdump"))
        env.setdefault("VGPU_PTXAS", str(tools / "ptxas"))
    return env
