"""What the kernels take: named tuples of pointers, strides and compile-time facts; their makers.

A tuple reaches a kernel as one argument; its `constexpr` fields specialise the kernel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 256  # of D and Dv


class Rows(NamedTuple):
    """A [B, H, L, width] tensor with any strides (elements)."""

    ptr: Any
    b: Any
    h: Any
    m: Any
    d: Any


class Bias(NamedTuple):
    """A [B, H, M, N] bias, broadcast dimensions with stride 0; HAS is false without one."""

    ptr: Any
    b: Any
    h: Any
    m: Any
    d: Any
    HAS: Any


class Keep(NamedTuple):
    """A [B, L] bool mask of keys; HAS is false without one."""

    ptr: Any
    b: Any
    m: Any
    HAS: Any


class Score(NamedTuple):
    """How a product becomes a score: scale, then the clamp if CLAMPED. PLAIN says that it is the
    product times a positive scale, which then moves into the exponent."""

    scale: Any
    clamp: Any
    CLAMPED: Any
    PLAIN: Any


class Drop(NamedTuple):
    """Dropout: keep where the Philox word is at least `threshold`, times `inverse`."""

    threshold: Any
    inverse: Any
    ON: Any


def rows(t: Tensor) -> Rows:
    return Rows(t, *t.stride())


def bias_of(t: Tensor | None, like: Tensor, shape: tuple[int, ...], swap: bool = False) -> Bias:
    """`t` broadcast to `shape` [B, H, M, N]; with `swap`, read as [B, H, N, M]."""
    if t is None:
        return Bias(like, 0, 0, 0, 0, tl.constexpr(False))
    b, h, m, n = t.expand(shape).stride()
    return Bias(t, b, h, *((n, m) if swap else (m, n)), tl.constexpr(True))


def keep_of(t: Tensor | None, like: Tensor) -> Keep:
    if t is None:
        return Keep(like, 0, 0, tl.constexpr(False))
    return Keep(t, *t.stride(), tl.constexpr(True))


def score_of(scale: float, clamp: float | None, bias: Tensor | None) -> Score:
    plain = clamp is None and bias is None and scale > 0.0
    return Score(scale, clamp or 0.0, tl.constexpr(clamp is not None), tl.constexpr(plain))


def drop_of(p: float, seed: Tensor | None) -> tuple[Drop, int]:
    """Dropout parameters and the seed as a number: it lives on the CPU, so nothing waits."""
    if seed is None:
        return Drop(0, 1.0, tl.constexpr(False)), 0
    threshold = min(int(p * 2**32), 2**32 - 1)
    inverse = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return Drop(threshold, inverse, tl.constexpr(True)), int(seed)


def padded(width: int) -> int:
    """Width of a tile: the next power of two that tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


def tiles(length: int, block: int) -> int:
    return triton.cdiv(length, block)


def reject_attention(problem) -> list[str]:
    """Limits that co_attention and bi_attention share."""
    reasons = reject_dtype(problem)
    widest = max(problem.x.D, problem.y.D, problem.x.Dv, problem.y.Dv)
    if widest > WIDEST:
        reasons.append(f"D or Dv of {widest} above {WIDEST}")
    return reasons


def reject_dtype(problem) -> list[str]:
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return [f"{str(problem.dtype).removeprefix('torch.')} not in float32, float16, bfloat16"]
    return []
