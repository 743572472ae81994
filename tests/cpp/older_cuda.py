"""Compiles csrc/cuda/*.cu with the compiler of CUDA 12.6; says what spills. Needs no GPU, no nvcc.

python tests/cpp/older_cuda.py [ARCH ...]          80 without any

nvcc 12.6 is not on package registries, but what it calls is: NVRTC has its front end and optimiser,
and there is its ptxas. What .cu files have for the host is compiled for the device too, where parts
of the standard library are missing; they come from libcu++ or from a few lines below.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "cuda-12.6"
WHEELS = {"nvrtc": "12.6.85", "nvcc": "12.6.85", "runtime": "12.6.77", "cccl": "12.6.77"}
FROM_LIBCUXX = "#include <cuda/std/{}>\nnamespace std {{ using namespace cuda::std; }}\n"
HEADERS = {name: FROM_LIBCUXX.format(name) for name in ("cstdint", "type_traits", "limits")} | {
    "new": "",
    "functional": "namespace std { template <class F> struct function; }\n",
    "cmath": "namespace std { using ::exp; using ::fabs; using ::isfinite; using ::log1p; }\n",
    "utility": FROM_LIBCUXX.format("utility")
    + """namespace std {
template <class T, T... I> struct integer_sequence {};
template <class T, int N, T... I> struct Make : Make<T, N - 1, N - 1, I...> {};
template <class T, T... I> struct Make<T, 0, I...> { using Type = integer_sequence<T, I...>; };
template <class T, T N> using make_integer_sequence = typename Make<T, N>::Type;
}
""",
}  # fmt: skip
# NVRTC 12.6 has no infinity that is a constant.
FLOAT, DOUBLE = "__int_as_float(0x7f800000)", "__longlong_as_double(0x7ff0000000000000ll)"
INFINITY = {
    r"constexpr float kInf = .*;": f"#define kInf {FLOAT}",
    r"constexpr double kInf = .*;": f"#define kInf {DOUBLE}",
    r"\bHUGE_VAL\b": DOUBLE,
}
ENTRY = re.compile(r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes", re.DOTALL)


def prepare() -> None:
    """The compiler, the headers and a copy of csrc in OUT."""
    wanted = [f"nvidia-cuda-{k}-cu12=={v}" for k, v in WHEELS.items()]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", OUT / "wheels", *wanted], check=True)
    (OUT / "std").mkdir(exist_ok=True)
    for name, text in HEADERS.items():
        (OUT / "std" / name).write_text("#pragma once\n" + text)
    shutil.rmtree(OUT / "csrc", ignore_errors=True)
    shutil.copytree(ROOT / "csrc", OUT / "csrc")
    for file in [*OUT.glob("csrc/*.h"), *OUT.glob("csrc/c*/*.*h"), *OUT.glob("csrc/cuda/*.cu")]:
        text = file.read_text()
        for pattern, constant in INFINITY.items():
            text = re.sub(pattern, constant, text)
        file.write_text(text)


def ptx(source: Path, arch: str) -> str:
    """What NVRTC makes of a file; raises with its errors."""
    wheels = OUT / "wheels" / "nvidia"
    nvrtc = ctypes.CDLL(str(next(wheels.glob("cuda_nvrtc/lib/libnvrtc.so.*"))))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = source.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None)
    include = [OUT / "std", source.parent, *wheels.glob("cuda_*/include")]
    options = ["-std=c++17", f"-arch=compute_{arch}", "-default-device", "-rdc=true"]
    options += [f"-I{path}" for path in include]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    kind = "ProgramLog" if failed else "PTX"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, result)
    if failed:
        raise RuntimeError(result.value.decode())
    return result.value.decode()


def compile_one(source: Path, arch: str) -> tuple[bool, str]:
    """(whether it compiles without spills, a line or the errors)."""
    stem = OUT / f"{source.stem}.{arch}"
    try:
        stem.with_suffix(f".{arch}.ptx").write_text(ptx(source, arch))
        ptxas = OUT / "wheels" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
        ptxas.chmod(0o755)
        command = [ptxas, "-c", "-v", f"-arch=sm_{arch}", stem.with_suffix(f".{arch}.ptx")]
        done = subprocess.run([*command, "-o", f"{stem}.cubin"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
    except RuntimeError as error:
        return False, f"{source.name} sm_{arch}: {error}"
    kernels = ENTRY.findall(done.stderr)
    spilling = [f"{name}: {stores} + {loads} B" for name, stores, loads in kernels if stores != "0"]
    line = f"{source.name} sm_{arch}: {len(kernels)} kernels, {len(spilling)} spill"
    return bool(kernels) and not spilling, "\n  ".join([line, *spilling])


def main(archs: list[str]) -> int:
    """0 if all files compile for `archs`, and nothing spills."""
    prepare()
    sources = sorted((OUT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for arch in archs or ["80"] for source in sources]
    with ProcessPoolExecutor(2) as pool:
        good = []
        for fine, text in pool.map(compile_one, *zip(*jobs, strict=True)):
            print(text, flush=True)
            good.append(fine)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
