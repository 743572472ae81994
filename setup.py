"""The only build decision: which native parts of fusedmm can be built here, printed in one line.

CPU kernels (fusedmm._C) always (FUSEDMM_NO_EXT=1: nothing native); CUDA kernels (fusedmm._C_cuda)
when FORCE_CUDA=1 or a GPU is visible, and nvcc and a CUDA torch are present; FUSEDMM_CUDA=0/1
overrides. Architectures are TORCH_CUDA_ARCH_LIST, else those of the visible GPUs, else
8.0+PTX;9.0a, whose `a` is Hopper's wgmma. A missing compiler is no error: the package then runs on
`reference` (and Triton on a GPU), and `python -m fusedmm info` says why.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
KERNELS = (
    "bi_attention_fwd", "bi_attention_bwd", "co_attention", "contrastive_loss", "sigmoid_loss",
    "peak",
)  # fmt: skip
COMMON = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
WARN = ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
WIDE = ["-mprefer-vector-width=512"]
# GCC 12 and newer know every flag; an older compiler without -mavx512bf16 is a clear build error.
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = AVX512 + WIDE
    ISAS["avx512bf16"] = [*AVX512, "-mavx512bf16", *WIDE]


def decide() -> tuple[str, str]:
    """What to build ("nothing", "cpu", "cpu+cuda") and why not more."""
    if os.environ.get("FUSEDMM_NO_EXT") == "1":
        return "nothing", "FUSEDMM_NO_EXT=1"
    try:
        import torch
    except ImportError as error:
        return "nothing", f"torch is not importable while building ({error})"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        return "nothing", f"no C++ compiler ({compiler} not found)"
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        return "cpu", "no CUDA kernels in this release"
    asked = os.environ.get("FUSEDMM_CUDA")
    wanted = asked == "1" or os.environ.get("FORCE_CUDA") == "1" or torch.cuda.is_available()
    if asked == "0" or not wanted:
        return "cpu", "CUDA not asked for (FORCE_CUDA=1 builds it) and no GPU visible"
    if torch.version.cuda is None:
        return "cpu", "this torch has no CUDA"
    if nvcc() is None:
        return "cpu", "no nvcc"
    return "cpu+cuda", ""


def nvcc() -> str | None:
    """The CUDA compiler: NVCC, that of CUDA_HOME, or the one on PATH."""
    home = Path(os.environ.get("CUDA_HOME", "")) / "bin" / "nvcc"
    if os.environ.get("CUDA_HOME") and home.exists():
        return str(home)
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def toolkit() -> Path:
    """The folder of nvcc's own toolkit, which a wrapper elsewhere on PATH does not show."""
    command = [nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)[1])


def architectures() -> list[str]:
    """Compute capabilities to build, as "9.0a" or "8.0+PTX"."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked:
        return asked
    import torch

    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    seen = sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in found})
    return [{"9.0": "9.0a"}.get(arch, arch) for arch in seen] or ["8.0+PTX", "9.0a"]


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for `archs`; +PTX adds code that newer devices compile for themselves."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags


def build_info(parts: str, why: str) -> None:
    """Writes fusedmm/_build_info.py."""
    text = f'"""Written by setup.py."""\n\nPARTS = {parts!r}\nWHY_NOT_MORE = {why!r}\n'
    (ROOT / "fusedmm" / "_build_info.py").write_text(text)


def fresh(out: Path) -> bool:
    """Whether an object is newer than all that its .d file lists."""
    depends = out.with_suffix(".d")
    if not (out.exists() and depends.exists()):
        return False
    names = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = out.stat().st_mtime
    return all(Path(n).exists() and Path(n).stat().st_mtime < built for n in names)


def compile_all(spawn, jobs: list[list[str]]) -> None:
    """Runs compiler commands, MAX_JOBS at once."""
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(spawn, jobs))


def cpu_objects(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Objects of csrc/cpu/<op>.cpp per ISA, and the commands for those that are out of date."""
    compiler = os.environ.get("CXX", "g++").split()
    extra = os.environ.get("FUSEDMM_CXXFLAGS", "").split()
    jobs, objects = [], []
    for isa, flags in ISAS.items():
        for name in KERNELS:
            source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
            out = folder / f"{name}.{isa}.o"
            objects.append(str(out))
            if not fresh(out):
                define = f"-DFMM_ISA={isa}"
                base = [*compiler, *COMMON, *WARN, *flags, *extra, define, "-MMD"]
                jobs.append([*base, "-c", str(source), "-o", str(out)])
    return objects, jobs


def cuda_objects(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Objects of csrc/cuda/*.cu for all architectures, and the commands for outdated ones."""
    archs = architectures()
    tag = re.sub(r"[^0-9a-zA-Z]+", "_", "_".join(archs))
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler=-fPIC"]
    jobs, objects = [], []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        out = folder / f"{source.stem}.{tag}.o"
        objects.append(str(out))
        if not fresh(out):
            base = [nvcc(), *flags, *gencode(archs), "-MD", "-MF", str(out.with_suffix(".d"))]
            jobs.append([*base, "-c", str(source), "-o", str(out)])
    return objects, jobs


def extension(parts: str):
    """The extension modules and the command that compiles kernels before torch's part."""
    if "cuda" in parts:
        os.environ.setdefault("CUDA_HOME", str(toolkit()))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            folder = Path(self.build_temp) / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            jobs = []
            for ext in self.extensions:
                make = cuda_objects if ext.name.endswith("_cuda") else cpu_objects
                objects, todo = make(folder)
                ext.extra_objects = [*ext.extra_objects, *objects]
                jobs += todo
            compile_all(self.spawn, jobs)
            super().build_extensions()

    extra = os.environ.get("FUSEDMM_CXXFLAGS", "").split()
    # at::parallel_for is serial without -fopenmp. Not a link flag: the symbols then come from the
    # OpenMP runtime that torch has loaded, whose threads torch.set_num_threads governs.
    flags = ["-O2", "-fopenmp", *WARN, *extra]

    def sources(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))

    modules = [
        CppExtension(
            "fusedmm._C",
            sources(
                "csrc/bindings.cpp",
                "csrc/cpu/dispatch.cpp",
                "csrc/cpu/result_memory.cpp",
                "csrc/cpu/*_launch.cpp",
            ),
            extra_compile_args={"cxx": flags},
            extra_link_args=extra,
        )
    ]
    if "cuda" in parts:
        modules.append(
            CUDAExtension(
                "fusedmm._C_cuda",
                sources("csrc/cuda/*.cpp"),
                define_macros=[("FMM_CUDA_ARCHS", f'"{" ".join(architectures())}"')],
                extra_compile_args={"cxx": flags},
                extra_link_args=extra,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


PARTS, WHY = decide()
build_info(PARTS, WHY)
print(f"fusedmm: building {PARTS}" + (f" ({WHY})" if WHY else ""))
setup(**({} if PARTS == "nothing" else extension(PARTS)))
