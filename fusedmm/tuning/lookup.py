"""Tile choices of the Triton kernels: the nearest row of a table, in log space.

tables/<op>.<gpu>.json holds a list of rows {kernel, bits, width, tile..., evidence}; <gpu> is the
device's name in lower case with dashes, and "default" serves every device without a table. A row
with `shared` takes that many bytes of shared memory and is for devices that have them; another of
the same width follows it.
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator

import torch

_TABLES = pathlib.Path(__file__).parent / "tables"
_forced: dict[tuple[str, str], dict[str, int]] = {}


def gpu_name(index: int | None = None) -> str:
    """The device's name as tables spell it; "default" without one (the Triton interpreter)."""
    if not torch.cuda.is_available():
        return "default"
    return torch.cuda.get_device_name(index).lower().replace(" ", "-")


@functools.cache
def _rows(op: str, gpu: str) -> list[dict]:
    path = _TABLES / f"{op}.{gpu}.json"
    if not path.exists():
        path = _TABLES / f"{op}.default.json"
    return json.loads(path.read_text())


def tile(op: str, kernel: str, dtype: torch.dtype, width: int, index: int | None) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of `kernel` for inputs of `dtype` and padded `width`."""
    return _forced.get((op, kernel)) or _nearest(op, kernel, torch.finfo(dtype).bits, width, index)


@functools.cache
def _nearest(op: str, kernel: str, bits: int, width: int, index: int | None) -> dict[str, int]:
    rows = [
        r
        for r in _rows(op, gpu_name(index))
        if r["kernel"] == kernel and r["bits"] == bits and r.get("shared", 0) <= shared(index)
    ]
    return min(rows, key=lambda r: abs(math.log2(r["width"]) - math.log2(width)))["tile"]


@contextlib.contextmanager
def forced(op: str, kernel: str, tile: dict[str, int]) -> Iterator[None]:
    """Another tile inside the `with` block: for benchmarks/tune.py and for tests."""
    _forced[op, kernel] = tile
    try:
        yield
    finally:
        del _forced[op, kernel]


@functools.cache
def processors(index: int | None) -> int:
    """Streaming multiprocessors of the device; 1 without one."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def shared(index: int | None) -> int:
    """Bytes of shared memory that a program may take; without a device, what every one has."""
    if not torch.cuda.is_available():
        return 64 * 1024
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
