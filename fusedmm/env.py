"""The only reader of os.environ.

FUSEDMM_BACKEND names the backend for the whole process; FUSEDMM_CPU_ISA caps the CPU kernels'
instruction set (read by the C++ dispatcher as well); FUSEDMM_AUTOTUNE=1 lets Triton time tiles.
"""

import os


def backend() -> str | None:
    """Backend forced for the process, or None."""
    return os.environ.get("FUSEDMM_BACKEND") or None


def autotune() -> bool:
    """Whether Triton kernels may time tile choices on a user's call."""
    return os.environ.get("FUSEDMM_AUTOTUNE", "0") == "1"
