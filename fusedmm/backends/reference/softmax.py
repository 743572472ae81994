"""Pieces that the reference attentions share: scores' softmax with the -inf rule, and dropout.

Philox4x32-10 (Salmon et al., SC 2011): word n % 4 of counter (n // 4, m, b * H + h, direction)
under the 64-bit seed decides element [b, h, m, n]; kernels draw the same bits.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_MUL = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp64 stays, everything else becomes fp32."""
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def full_precision(function: Callable) -> Callable:
    """Runs `function` outside autocast, which would cast the products of the reference."""

    @functools.wraps(function)
    def outside(*args):
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return outside


def softmax(s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """p, lse of the last dimension; a row with no kept key gives p = 0, lse = -inf."""
    if keep is not None:
        s = torch.where(keep[:, None, None, :], s, float("-inf"))  # [B, H, M, N]
    lse = torch.logsumexp(s, -1)  # [B, H, M]
    # Not exp(s - lse): at scores of 1e4 an fp32 lse is off by 5e-4, and so would be every p.
    return torch.where(lse[..., None] == float("-inf"), 0.0, s.softmax(-1)), lse


def dropout_factor(
    seed: Tensor | None, direction: int, shape: torch.Size, p: float, like: Tensor
) -> Tensor | None:
    """[B, H, M, N] of 0 and 1 / (1 - p), or None without dropout."""
    if seed is None:
        return None
    B, H, M, N = shape
    n = torch.arange(N, device=like.device)
    counter = [
        (n // 4)[None, None, :],
        torch.arange(M, device=like.device)[None, :, None],
        torch.arange(B * H, device=like.device)[:, None, None],
        torch.full((1, 1, 1), direction, device=like.device),
    ]
    words = _philox(counter, seed.to(like.device))
    bits = words[0]
    for i in range(1, 4):
        bits = torch.where(n % 4 == i, words[i], bits)
    keep = bits >= min(int(p * 2**32), _U32)
    return keep.view(shape).to(like.dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def _philox(c: list[Tensor], seed: Tensor) -> list[Tensor]:
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        a, b = c[0] * _MUL[0], c[2] * _MUL[1]  # wraps like uint64: bits are what we need
        c = [
            ((b >> 32) & _U32) ^ c[1] ^ k0,
            b & _U32,
            ((a >> 32) & _U32) ^ c[3] ^ k1,
            a & _U32,
        ]
        k0, k1 = (k0 + _KEY[0]) & _U32, (k1 + _KEY[1]) & _U32
    return list(torch.broadcast_tensors(*c))
