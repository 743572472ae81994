"""contrastive_loss on the C++ kernels of csrc/cpu and csrc/cuda; arguments as in the reference."""

from . import extension


def reject(problem) -> list[str]:
    """Why the native kernels cannot run `problem`."""
    return extension.reject(problem)


def fwd(*args):
    """Forward, see backends/reference/contrastive_loss.py."""
    return extension.ops.contrastive_loss_fwd(*args)


def bwd(*args):
    """Backward, see backends/reference/contrastive_loss.py."""
    return extension.ops.contrastive_loss_bwd(*args)


def row_loss(stats, label_smoothing):
    """`row_loss` of fusedmm/ops/pairs.py in one pass."""
    return extension.ops.contrastive_rows(stats, None, label_smoothing)


def coefficients(stats, dloss, label_smoothing):
    """`coefficients` of fusedmm/ops/pairs.py in one pass."""
    return extension.ops.contrastive_rows(stats, dloss, label_smoothing)


def kept_dots(n: int, like):
    """Room for raw products, the last argument of fwd and bwd."""
    return extension.kept_dots(n, like)
