"""What the ops' public functions share: autocast's cast and the dropout seed."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to autocast's dtype inside an autocast region, as torch.matmul does."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def draw_seed(dropout_p: float) -> Tensor | None:
    """A 63-bit Philox seed from torch's CPU generator; None without dropout."""
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
