"""What the ops share: autocast's cast, the dropout seed, the public lse, zeros for gradients."""

from collections.abc import Sequence

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
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


def public_lse(o: Tensor, *lse: Tensor) -> tuple[Tensor, ...]:
    """lse as users get it, fp32. Inside it is fp64: at scores of 1e4 an fp32 lse is off by 5e-4,
    and so would be every probability that a backward takes from it."""
    return lse if o.dtype == torch.float64 else tuple(t.float() for t in lse)


def given_or_zeros(grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of outputs, zeros for those that the loss does not depend on."""
    pairs = zip(grads, outputs, strict=True)
    return [torch.zeros_like(out) if grad is None else grad for grad, out in pairs]
