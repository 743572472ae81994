"""Loads fusedmm._C once; without it every native kernel is refused with the reason."""

import torch

try:
    from ... import _C

    MISSING = None
except ImportError as error:
    _C = None
    MISSING = f"extension not built ({error})"

ops = torch.ops._fusedmm_C

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reject(problem) -> list[str]:
    """Reasons that hold for every native kernel."""
    if _C is None:
        return [MISSING]
    if problem.device_type == "cuda" and not _C.built_with_cuda():
        return ["extension built without CUDA"]
    if problem.dtype not in _DTYPES:
        return [f"{problem.dtype} not in float32, float16, bfloat16"]
    return []


def kept_dots(n: int) -> torch.Tensor:
    """fp32 [n], not written: where a loss's forward leaves raw products for its backward."""
    return ops.kept_dots(n)


def isa() -> str:
    """The CPU instruction set in use: avx512bf16, avx512, avx2 or baseline."""
    return _C.cpu_isa()


def isas() -> list[str]:
    """The CPU instruction sets this machine can run, best first."""
    return _C.cpu_isas()
