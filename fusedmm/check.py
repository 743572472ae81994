"""Validators of user input; every user-facing error text is built here.

A message reads `op: argument: expected ..., got ...`. ValueError is the caller's mistake, TypeError
not a tensor or not floating, NotImplementedError our limit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bad(op: str, arg: str, expected: str, got: object) -> ValueError:
    """The one message format."""
    return ValueError(f"{op}: {arg}: expected {expected}, got {got}")


def name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def is_tensor(op: str, arg: str, t: object) -> None:
    """TypeError unless `t` is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {arg}: expected a torch.Tensor, got {type(t).__name__}")


def floating(op: str, arg: str, t: object) -> None:
    """TypeError unless `t` is a floating tensor, NotImplementedError if of a dtype we lack."""
    is_tensor(op, arg, t)
    if not t.is_floating_point():
        raise TypeError(f"{op}: {arg}: expected a floating dtype, got {name(t.dtype)}")
    if t.dtype not in FLOATING:
        names = ", ".join(name(d) for d in FLOATING)
        raise NotImplementedError(f"{op}: {arg}: expected one of {names}, got {name(t.dtype)}")
    if t.layout != torch.strided:
        raise NotImplementedError(f"{op}: {arg}: expected a strided tensor, got {t.layout}")


def ndim(op: str, arg: str, t: Tensor, dims: str) -> None:
    """ValueError unless `t` has as many dimensions as `dims` (say "B, H, M, D") names."""
    n = len(dims.split(", "))
    if t.dim() != n:
        raise bad(op, arg, f"{n} dimensions [{dims}]", f"shape {list(t.shape)}")


def shape(op: str, arg: str, t: Tensor, expected: Sequence[int], partner: str) -> None:
    """ValueError unless `t` has shape `expected`, which `partner` dictates."""
    if tuple(t.shape) != tuple(expected):
        raise bad(op, arg, f"shape {list(expected)} to match {partner}", list(t.shape))


def same(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """ValueError unless all tensors have the dtype and device of the first."""
    arg0, t0 = first
    for arg, t in others:
        if t.dtype != t0.dtype:
            raise bad(op, arg, f"dtype {name(t0.dtype)} to match {arg0}", name(t.dtype))
    device(op, first, *others)


def device(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """ValueError unless all tensors are on the device of the first."""
    arg0, t0 = first
    for arg, t in others:
        if t.device != t0.device:
            raise bad(op, arg, f"device {t0.device} to match {arg0}", t.device)


def mask(
    op: str, arg: str, t: object, expected: Sequence[int], partner: tuple[str, Tensor]
) -> None:
    """A key mask: bool, True = keep, [B, keys]."""
    if t is None:
        return
    is_tensor(op, arg, t)
    if t.dtype != torch.bool:
        raise bad(op, arg, "dtype bool (True = keep)", name(t.dtype))
    shape(op, arg, t, expected, partner[0])
    device(op, partner, (arg, t))


def bias(
    op: str, arg: str, t: object, expected: Sequence[int], partner: tuple[str, Tensor]
) -> None:
    """An additive bias, broadcastable to `expected`."""
    if t is None:
        return
    floating(op, arg, t)
    ok = t.dim() == len(expected) and all(
        a == b or a == 1 for a, b in zip(t.shape, expected, strict=True)
    )
    if not ok:
        raise bad(op, arg, f"a shape broadcastable to {list(expected)}", list(t.shape))
    device(op, partner, (arg, t))


def number(op: str, arg: str, v: object) -> None:
    """A finite Python number."""
    if isinstance(v, bool) or not isinstance(v, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {arg}: expected a number, got {type(v).__name__}")
    if v != v or v in (float("inf"), float("-inf")):
        raise bad(op, arg, "a finite number", v)


def integer(op: str, arg: str, v: object, low: int, high: int, partner: str) -> None:
    """An integer in [low, high]; `partner` dictates the bounds."""
    if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
        raise TypeError(f"{op}: {arg}: expected an integer, got {type(v).__name__}")
    if not low <= v <= high:
        raise bad(op, arg, f"an integer in [{low}, {high}] to match {partner}", v)


def choice(op: str, arg: str, v: object, options: Sequence[str]) -> None:
    """One of a few strings."""
    if v not in options:
        raise bad(op, arg, "one of " + ", ".join(map(repr, options)), repr(v))


def flag(op: str, arg: str, v: object) -> None:
    """A Python bool."""
    if not isinstance(v, bool):
        raise TypeError(f"{op}: {arg}: expected a bool, got {type(v).__name__}")


def fraction(op: str, arg: str, v: object) -> None:
    """A number in [0, 1]."""
    number(op, arg, v)
    if not 0.0 <= v <= 1.0:
        raise bad(op, arg, "a number in [0, 1]", v)
