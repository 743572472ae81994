"""The only build decision: which parts of fusedmm._C can be built here, printed in one line.

CPU kernels always (FUSEDMM_NO_EXT=1: nothing native); CUDA when FORCE_CUDA=1 or a GPU is visible,
and nvcc and a CUDA torch are present; FUSEDMM_CUDA=0/1 overrides. A missing compiler is no error:
the package then runs on `reference` (and Triton on a GPU), and `python -m fusedmm info` says why.
"""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
KERNELS = ("bi_attention", "co_attention", "contrastive_loss", "sigmoid_loss", "peak")
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
        from torch.utils import cpp_extension
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
    if cpp_extension.CUDA_HOME is None or shutil.which("nvcc") is None:
        return "cpu", "no nvcc"
    return "cpu+cuda", ""


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


def extension(parts: str):
    """The extension module and the command that compiles each CPU kernel once per ISA."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            for ext in self.extensions:
                ext.extra_objects = [*ext.extra_objects, *self.kernel_objects()]
            super().build_extensions()

        def kernel_objects(self) -> list[str]:
            """Objects of csrc/cpu/<op>.cpp per ISA, rebuilt when a header or source is newer."""
            compiler = os.environ.get("CXX", "g++").split()
            extra = os.environ.get("FUSEDMM_CXXFLAGS", "").split()
            folder = Path(self.build_temp) / "isa"
            folder.mkdir(parents=True, exist_ok=True)
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
            workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self.spawn, jobs))
            return objects

    extra = os.environ.get("FUSEDMM_CXXFLAGS", "").split()
    sources = ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp"]
    sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*_launch.cpp"))
    module = CppExtension(
        "fusedmm._C",
        sources,
        # at::parallel_for is serial without -fopenmp. Not a link flag: the symbols then come from
        # the OpenMP runtime that torch has loaded, whose threads torch.set_num_threads governs.
        extra_compile_args={"cxx": ["-O2", "-fopenmp", *WARN, *extra]},
        extra_link_args=extra,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


PARTS, WHY = decide()
build_info(PARTS, WHY)
print(f"fusedmm: building {PARTS}" + (f" ({WHY})" if WHY else ""))
setup(**({} if PARTS == "nothing" else extension(PARTS)))
