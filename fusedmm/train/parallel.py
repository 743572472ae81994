"""Training by several processes, as torchrun starts them: each takes batches of its own, gradients
are averaged.

W processes do in a step what one does with `loop.accumulate` W times as large, so the logs of
both are the same. Losses contrast within a process's batch. Left out: sharded weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes files and talks."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the group that torchrun describes; alone, do nothing."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange."""
    if world() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))


def agree(yes: bool) -> bool:
    """True on every process as soon as it is on one."""
    if world() == 1:
        return yes
    place = "cuda" if torch.cuda.is_available() else "cpu"
    flag = torch.tensor(float(yes), device=place)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()
