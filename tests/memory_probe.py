"""Prints by how many bytes one forward and backward of each op raises this process's peak memory.

Run as a script with a backend and M = N; prints {op: bytes} as JSON, or "unsupported" where the
kernel does not let a process reset its peak.
"""

import json
import os
import sys

import torch

from fusedmm.testing import LOSSES, POSITIONAL, AttentionShape, PairShape, fused, make_case


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak), in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """The peak is what is resident now. OSError where a process may not say so."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")


def growth(op: str, backend: str, size: int) -> int:
    """Peak above what is resident before the call, inputs included in the latter."""
    for n in (64, size):  # a tiny call first, which loads and allocates what any call does
        shape = PairShape(n, n, 32) if op in LOSSES else AttentionShape(1, 1, n, n, 32, 32)
        case = make_case(op, shape).leaves()
        reset_peak()
        before = resident("VmRSS")
        torch.cat([o.flatten() for o in fused(case, backend)]).sum().backward()
        grown = resident("VmHWM") - before
    return grown


def in_child(op: str, backend: str, size: int) -> int:
    """`growth` in a process of its own, where no other op has left memory to reuse."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(growth(op, backend, size)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    return int(os.read(reader, 100))


def main(backend: str, size: int) -> None:
    """Forks before anything has started a thread."""
    try:
        reset_peak()
    except OSError:
        print("unsupported")
        return
    print(json.dumps({op: in_child(op, backend, size) for op in POSITIONAL}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1], int(sys.argv[2]))
