"""co_attention on the C++ kernels of csrc/cpu and csrc/cuda; arguments as in the reference."""

from . import extension


def reject(problem) -> list[str]:
    """Why the native kernels cannot run `problem`."""
    return extension.reject_attention(problem)


def fwd(*args):
    """Forward, see backends/reference/co_attention.py."""
    return extension.ops.co_attention_fwd(*args)


def bwd(*args):
    """Backward, see backends/reference/co_attention.py."""
    return extension.ops.co_attention_bwd(*args)
