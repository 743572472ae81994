"""Compile the virtual GPU's three libraries into build/vgpu, with g++ and nothing else.

Objects and libraries are named by a hash of everything they are made from, so that a build is
reused across checkouts and commands, and two concurrent builds never see half a file. The CUDA
headers are those of torch's and Triton's wheels; a toolkit is needed only where these lack one.
"""

import concurrent.futures
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
BUILD = Path(os.environ.get("VGPU_BUILD_DIR") or HERE.parents[1] / "build" / "vgpu")
CXX = os.environ.get("CXX", "g++")
COMMON = [
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-parentheses",
    "-Wno-misleading-indentation",
]
STATIC = ["-static-libstdc++", "-static-libgcc"]  # preloaded into every process, also foreign ones


class BuildError(RuntimeError):
    """A library cannot be built; the text says what is missing."""


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def _torch() -> Path:
    torch = _package("torch")
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").exists():
        raise BuildError("vgpu: needs a torch that was built with CUDA (the PyPI wheel for Linux)")
    return torch


def _cuda_dirs() -> tuple[list[Path], Path]:
    """Include directories in order of preference, and libcudart to take the entry points from."""
    roots = sorted((_package("nvidia") or Path("/nonexistent")).glob("cu1*"))
    includes = [r / "include" for r in roots]
    triton = _package("triton")
    if triton:
        includes.append(triton / "backends" / "nvidia" / "include")
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    includes += [t / "include" for t in toolkits]
    includes = [d for d in includes if (d / "cuda.h").exists()]
    cudart = [
        f
        for r in [*roots, *toolkits]
        for d in ("lib", "lib64")
        for f in sorted((r / d).glob("libcudart.so.1*"))
    ]
    if not any((d / "crt" / "host_defines.h").exists() for d in includes) or not cudart:
        raise BuildError("vgpu: no CUDA headers: install triton, or set CUDA_HOME to a toolkit")
    return includes, cudart[0]


def march() -> list[str]:
    """x86-64-v3 where the processor has it; VGPU_MARCH overrides (`native` is somewhat faster)."""
    name = os.environ.get("VGPU_MARCH")
    if name is None:
        try:
            flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
            have = set(flags[1].split()) if flags else set()
        except OSError:
            have = set()
        name = "x86-64-v3" if {"avx2", "fma", "f16c", "bmi2", "movbe", "abm"} <= have else ""
    return [f"-march={name}"] if name else []


def stubs(cudart: Path, include: Path) -> str:
    """C source: a weak definition of every CUDA runtime and driver entry point.

    Each reports its name and fails, so nothing passes silently; the strong definitions in
    csrc/cuda replace them at link time.
    """
    names = {}
    nm = subprocess.run(["nm", "-D", "--defined-only", cudart], capture_output=True, text=True)
    for line in nm.stdout.splitlines():
        p = line.split()
        if len(p) >= 3 and p[1] in "TWi":
            n = p[2].split("@")[0]
            if re.match(r"(__)?cuda[A-Z]", n):
                names[n] = "runtime"
    text = (include / "cuda.h").read_text()
    if (include / "cudaProfiler.h").exists():
        text += (include / "cudaProfiler.h").read_text()
    vers = dict(re.findall(r"#define\s+(cu[A-Z]\w*)\s+(cu\w+_v\d+)\b", text))
    vers.update(re.findall(r"#define\s+(cu[A-Z]\w*)\s+__CUDA_API_PT[A-Z_]+\((\w+)\)", text))
    for n in set(re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\s*\(", text)):
        names[n] = names[vers.get(n, n)] = "driver"
    for n in vers.values():
        if re.match(r"cu[A-Z]\w*$", n):
            names[n] = "driver"
    out = ["int vgpu_unmocked(const char*, int);"]
    weak = '__attribute__((weak, visibility("default")))'
    out += [
        f'{weak} int {n}(void) {{ return vgpu_unmocked("{n}", {int(k == "driver")}); }}'
        for n, k in sorted(names.items())
    ]
    out.append(
        "struct vgpu_ver { const char *name, *sym; };\nconst struct vgpu_ver vgpu_versions[] = {"
    )
    out += [
        f'  {{"{a}", "{b}"}},'
        for a, b in sorted(vers.items())
        if re.match(r"cu[A-Z]\w*$", b) and names.get(b) == "driver"
    ]
    return "\n".join([*out, "  {0, 0}};", ""])


def _hash(*parts: object) -> str:
    h = hashlib.sha256()
    for p in parts:
        h.update(p.read_bytes() if isinstance(p, Path) else str(p).encode())
        h.update(b"\0")
    return h.hexdigest()[:16]


def _run(cmd: list[object]) -> None:
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True)
    if r.returncode:
        raise BuildError(f"{' '.join(map(str, cmd))}\n{r.stdout}{r.stderr}")


def _make(out: Path, cmd: list[object]) -> Path:
    """Run cmd with `-o out` unless out exists; the file appears complete or not at all."""
    if not out.exists():
        tmp = out.with_suffix(f".{os.getpid()}.tmp")
        _run([*cmd, "-o", tmp])
        os.replace(tmp, out)
    return out


def libraries() -> Path:
    """The directory of the built libraries; builds them when a source changed (about a minute)."""
    torch = _torch()
    includes, cudart = _cuda_dirs()
    inc = [f"-I{d}" for d in includes]
    torch_version = (torch / "version.py").read_text()
    groups = {
        "sim": ["-std=c++17", "-O3", *march(), "-fno-math-errno", "-ffp-contract=off", *COMMON],
        "cuda": ["-std=c++17", "-O2", "-g1", *COMMON, *inc],
    }
    aten_flags = ["-std=c++20", "-O1", "-fPIC", "-w", *inc]
    aten_flags += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]

    jobs = []  # (library, object, command)
    for g, flags in groups.items():
        headers = sorted((CSRC / g).glob("*.h")) + [CSRC / "vsim.h"]
        for f in sorted((CSRC / g).glob("*.cpp")):
            key = _hash(CXX, flags, *headers, f)
            jobs.append((g, BUILD / "obj" / f"{g}-{f.stem}-{key}.o", [CXX, *flags, "-c", f]))
    key = _hash(CXX, aten_flags, torch_version, CSRC / "aten.cpp")
    jobs.append(
        ("aten", BUILD / "obj" / f"aten-{key}.o", [CXX, *aten_flags, "-c", CSRC / "aten.cpp"])
    )
    key = _hash(Path(__file__), cudart, includes[0] / "cuda.h")
    stub_c = BUILD / "obj" / f"stubs-{key}.c"
    jobs.append(("cuda", stub_c.with_suffix(".o"), ["gcc", "-O1", "-fPIC", "-w", "-c", stub_c]))

    lib = BUILD / _hash(*(str(o) for _, o, _ in jobs))
    if (lib / "complete").exists():
        return lib
    (BUILD / "obj").mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stub_c.exists():
            stub_c.write_text(stubs(cudart, includes[0]))
        todo = [j for j in jobs if not j[1].exists()]
        todo.sort(key=lambda j: j[0] != "aten")  # the longest first
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for r in [pool.submit(_make, o, cmd) for _, o, cmd in todo]:
                r.result()
        lib.mkdir(exist_ok=True)
        objs = {g: [o for h, o, _ in jobs if h == g] for g in ("sim", "cuda", "aten")}
        _make(lib / "libvgpu_sim.so", [CXX, "-shared", *STATIC, *objs["sim"], "-lpthread"])
        # One object is the preloaded runtime and, by its soname, the driver.
        link = ["-shared", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic-functions", *STATIC]
        link += ["-Wl,--exclude-libs,ALL"]
        _make(lib / "libcuda.so.1", [CXX, *link, *objs["cuda"], "-ldl", "-lpthread"])
        if not (lib / "libcuda.so").is_symlink():
            (lib / "libcuda.so").symlink_to("libcuda.so.1")
        libs = [f"-L{torch}/lib", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda"]
        link = ["-shared", *objs["aten"], *libs, "-Wl,--allow-shlib-undefined"]
        _make(lib / "libvgpu_aten.so", [CXX, *link])
        (lib / "complete").touch()
    return lib
