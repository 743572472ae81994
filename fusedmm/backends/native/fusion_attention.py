"""fusion_attention on the C++ kernels of csrc/cpu; arguments as in the reference."""

from . import extension


def reject(problem) -> list[str]:
    """Why the native kernels cannot run `problem`."""
    return extension.reject(problem)


def fwd(*args):
    """Forward, see backends/reference/fusion_attention.py."""
    return extension.ops.fusion_attention_fwd(*args)


def bwd(*args):
    """Backward, see backends/reference/fusion_attention.py."""
    return extension.ops.fusion_attention_bwd(*args)
