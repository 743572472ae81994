"""sigmoid_loss on the C++ kernels of csrc/cpu and csrc/cuda; arguments as in the reference."""

from . import extension


def reject(problem) -> list[str]:
    """Why the native kernels cannot run `problem`."""
    return extension.reject(problem)


def fwd(*args):
    """Forward, see backends/reference/sigmoid_loss.py."""
    return extension.ops.sigmoid_loss_fwd(*args)


def bwd(*args):
    """Backward, see backends/reference/sigmoid_loss.py."""
    return extension.ops.sigmoid_loss_bwd(*args)


def kept_dots(n: int, like):
    """Room for raw products, the last argument of fwd and bwd."""
    return extension.kept_dots(n, like)
