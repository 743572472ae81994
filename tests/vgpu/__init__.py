"""A virtual CUDA device for the tests: `python -m vgpu run -- COMMAND` starts a process on it.

Inside such a process this module reads what happened: profile(), launches(), report(), sticky().
The README beside this file says what the device is trusted for and what it leaves out.
"""

import contextlib
import ctypes
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "Profile",
    "active",
    "arch",
    "clear",
    "describe",
    "launch_count",
    "launches",
    "memory_peak",
    "memory_used",
    "profile",
    "report",
    "reset",
    "sticky",
]


def active() -> bool:
    """True in a process started by `vgpu run`."""
    return os.environ.get("VGPU_ACTIVE") == "1"


def library(name: str) -> Path:
    """A library of the running device."""
    if not active():
        raise RuntimeError("vgpu: start the process with `python -m vgpu run -- COMMAND`")
    return Path(os.environ["VGPU_LIB"]) / name


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library("libcuda.so.1")))
    for n in ("vgpu_report", "vgpu_launches_from", "vgpu_describe"):
        getattr(lib, n).restype = ctypes.c_char_p
    lib.vgpu_launches_from.argtypes = lib.vgpu_describe.argtypes = [ctypes.c_uint64]
    for n in ("vgpu_launch_count", "vgpu_mem_used", "vgpu_mem_peak"):
        getattr(lib, n).restype = ctypes.c_uint64
    return lib


def arch() -> int:
    """80, 86 or 90."""
    return int(os.environ.get("VGPU_ARCH", "80"))


def launch_count() -> int:
    """Kernel launches of this process so far."""
    return _lib().vgpu_launch_count()


def launches(first: int = 0) -> list[dict[str, Any]]:
    """The launches since clear(), oldest first, without the first `first` of the process."""
    return json.loads(_lib().vgpu_launches_from(first).decode(errors="replace"))


def clear() -> None:
    """Forget the recorded launches."""
    _lib().vgpu_clear()


def reset() -> None:
    """Forget a fault, as a fresh process would."""
    _lib().vgpu_reset()


def sticky() -> int:
    """0, or the CUDA error that broke the context."""
    return _lib().vgpu_sticky()


def report() -> str:
    """The last fault: kernel, source line, PTX line, thread, address and whose memory it is."""
    return _lib().vgpu_report().decode(errors="replace")


def describe(address: int) -> str:
    """What lies at, or next to, a device address."""
    return _lib().vgpu_describe(int(address)).decode(errors="replace")


def memory_used() -> int:
    """Bytes of device memory held, torch's cached segments included."""
    return _lib().vgpu_mem_used()


def memory_peak() -> int:
    """The largest memory_used() of the process."""
    return _lib().vgpu_mem_peak()


class Profile:
    """Launches made inside `with profile() as p`."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def total(self, counter: str) -> float:
        """A counter summed over the launches; `classes.mufu` names a nested one."""
        total = 0
        for launch in self.launches:
            value = launch["counters"]
            for key in counter.split("."):
                value = value.get(key, 0) if isinstance(value, dict) else 0
            total += value
        return total

    def kernels(self) -> list[str]:
        return [launch["kernel"] for launch in self.launches]

    def __str__(self) -> str:
        rows = [f"{'kernel':48} {'grid':>14} {'block':>12} {'smem':>7} {'warp insts':>12}"]
        for r in self.launches:
            grid, block = ("x".join(map(str, r[k])) for k in ("grid", "block"))
            smem, insts = r["smem"] + r["static_smem"], r["counters"].get("warp_insts", 0)
            rows.append(f"{r['kernel'][:48]:48} {grid:>14} {block:>12} {smem:7} {insts:12}")
        return "\n".join(rows)


@contextlib.contextmanager
def profile(*, resources: bool = False, coverage: bool = False) -> Iterator[Profile]:
    """Record the launches made inside, with their counters.

    resources: also what ptxas allocates: regs, spill, stack, ctas_per_sm (half a second a kernel).
    coverage: also unique_read_bytes and unique_written_bytes of global memory.
    """
    p, first = Profile(), launch_count()
    _lib().vgpu_record(int(resources), int(coverage))
    try:
        yield p
    finally:
        _lib().vgpu_record(0, 0)
        p.launches = launches(first)
