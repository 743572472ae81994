"""Chooses the backend of a call: by name, by `use_backend`, by FUSEDMM_BACKEND, or the first of
PRIORITY that accepts. Looks at sizes, dtypes and devices, never at data; knows no op.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

from . import backends, env

PRIORITY = ("cuda", "triton", "cpu", "reference")


class _Region(threading.local):
    """Names of the regions this thread is in, innermost last; torch.compile traces through it."""

    def __init__(self) -> None:
        # In every thread from the start: torch.compile guards what is there, not what is missing.
        self.names: tuple[str, ...] = ()


_region = _Region()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every op called inside the `with` block.

        with fusedmm.use_backend("reference"):
            o_x, o_y = fusedmm.bi_attention(qk_x, qk_y, v_x, v_y)

    Args:
        name: one of "cuda", "triton", "cpu", "reference".
    Raises: ValueError, unknown name.
    """
    _known("use_backend", name)
    outer = _region.names
    _region.names = (*outer, name)
    try:
        yield
    finally:
        _region.names = outer


def _known(op: str, name: object) -> None:
    if name not in PRIORITY:
        names = ", ".join(map(repr, PRIORITY))
        raise ValueError(f"{op}: backend: expected one of {names}, got {name!r}")


def wanted(backend: str | None) -> str | None:
    """The backend asked for by name, by region or by environment; None: the first that accepts."""
    if backend is None:
        return _region.names[-1] if _region.names else env.backend()
    return backend


def select(op: str, problem, backend: str | None) -> str:
    """The name of the backend that runs `problem`; a named backend never falls back."""
    named = wanted(backend)
    if named is not None:
        _known(op, named)
        reasons = backends.reject(named, op, problem)
        if reasons:
            raise NotImplementedError(_refusal(op, problem, {named: reasons}))
        return named
    refusals = {}
    for name in PRIORITY:
        reasons = backends.reject(name, op, problem)
        if not reasons:
            if name == "reference" and problem.device_type == "cuda":
                _warn(_refusal(op, problem, refusals))
            return name
        refusals[name] = reasons
    raise NotImplementedError(_refusal(op, problem, refusals))


def _refusal(op: str, problem, refusals: dict[str, list[str]]) -> str:
    lines = [f"{op}: no backend can run {problem.describe()}"]
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    return "\n".join(lines)


def _warn(text: str) -> None:
    note = "using reference, which stores the whole score matrix"
    warnings.warn(f"{text}\n  {note}", RuntimeWarning, stacklevel=5)
