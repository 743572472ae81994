"""Loads fusedmm._C and fusedmm._C_cuda once; a native kernel without its module is refused with
the reason.
"""

import functools
import re

import torch

try:
    from ... import _C

    MISSING = None
except ImportError as error:
    _C = None
    MISSING = f"extension not built ({error})"

try:
    from ... import _C_cuda

    MISSING_CUDA = MISSING
except ImportError as error:
    _C_cuda = None
    MISSING_CUDA = f"extension built without CUDA ({error})"

ops = torch.ops._fusedmm_C

_WIDEST = 256  # of D and Dv, on CUDA
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reject(problem) -> list[str]:
    """Reasons that hold for every native kernel."""
    on_cuda = problem.device_type == "cuda"
    missing = MISSING_CUDA if on_cuda else MISSING
    if missing:
        return [missing]
    if on_cuda and _unfit():
        return [_unfit()]
    if problem.dtype not in _DTYPES:
        return [f"{problem.dtype} not in float32, float16, bfloat16"]
    return []


def kept_dots(n: int, like: torch.Tensor) -> torch.Tensor:
    """fp32 [n] on like's device, not written: where a loss's forward leaves raw products for its
    backward."""
    return like.new_empty((n,), dtype=torch.float32) if like.is_cuda else ops.kept_dots(n)


def reject_attention(problem) -> list[str]:
    """Reasons that hold for both attentions."""
    reasons = reject(problem)
    widest = max(problem.x.D, problem.y.D, problem.x.Dv, problem.y.Dv)
    if problem.device_type == "cuda" and widest > _WIDEST:
        reasons.append(f"D or Dv of {widest} above {_WIDEST}")
    return reasons


@torch.compiler.assume_constant_result
@functools.cache
def _unfit() -> str:
    """Why the current device cannot run code that was compiled for `archs`, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = torch.cuda.get_device_capability()
    if any(_runs(arch, device) for arch in archs().split()):
        return ""
    return f"compiled for {archs()}, which sm_{device[0]}{device[1]} cannot run"


def _runs(arch: str, device: tuple[int, int]) -> bool:
    """Whether code for `arch`, say "9.0", "9.0a" or "8.0+PTX", runs on a compute capability."""
    major, minor, only, ptx = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch).groups()
    built = int(major), int(minor)
    if only == "a":  # neither it nor its PTX runs elsewhere
        return built == device
    return (built[0] == device[0] or bool(ptx and not only)) and built <= device


def isa() -> str:
    """The CPU instruction set in use: avx512bf16, avx512, avx2 or baseline."""
    return _C.cpu_isa()


def isas() -> list[str]:
    """The CPU instruction sets this machine can run, best first."""
    return _C.cpu_isas()


def archs() -> str:
    """The CUDA architectures in the build, "" without CUDA kernels."""
    return _C_cuda.archs if _C_cuda else ""
