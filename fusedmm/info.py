"""What is installed and runs here: versions, instruction set, each backend and why it is off."""

import platform
import sys

import torch

from . import __version__, backends, dispatch, problem
from .backends.native import extension


def lines() -> list[str]:
    """One fact per line, for people and bug reports."""
    try:
        from . import _build_info as build

        built = build.PARTS + (f" ({build.WHY_NOT_MORE})" if build.WHY_NOT_MORE else "")
    except ImportError:
        built = "not built by setup.py"
    facts = [
        f"fusedmm {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"platform: {platform.platform()}, {torch.get_num_threads()} threads",
        f"extension: {built}",
    ]
    if extension.MISSING is None:
        isas = ", ".join(extension.isas())
        facts.append(f"cpu kernels: {extension.isa()} in use (usable here: {isas})")
    if extension.archs():
        facts.append(f"cuda kernels: compiled for {extension.archs()}")
    if torch.cuda.is_available():
        facts.append(f"cuda device: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return facts + [f"backend {name}: {state(name)}" for name in dispatch.PRIORITY]


def state(name: str) -> str:
    """ "on", or why backend `name` cannot run an ordinary call on its own device."""
    device = "cuda" if name in ("cuda", "triton") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return "off: no CUDA device"
    side = problem.Side(16, 16, 64, 64)
    asked = problem.AttentionProblem("bi_attention", 1, 1, side, side, torch.float32, device)
    reasons = backends.reject(name, "bi_attention", asked)
    return "off: " + "; ".join(reasons) if reasons else "on"


def main() -> None:
    """`python -m fusedmm info`."""
    sys.stdout.write("\n".join(lines()) + "\n")
