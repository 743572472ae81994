"""Exact large-batch backward in the memory of one chunk: encode, loss on all rows, encode again.

Rows are encoded chunk by chunk without a graph; the loss sees all of them and yields their
gradients; then each chunk is encoded once more, with the same random numbers, and goes backward.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states


def cached_backward(
    model: Callable[[Any], Tensor | tuple[Tensor, ...]],
    chunks: Iterable[Any],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Accumulates the gradients of loss(*model(all chunks)) and returns that loss, detached.

        outputs = [model(chunk) for chunk in chunks]
        value = loss(*map(join, zip(*outputs)))         # join: torch.cat, or the first if a scalar
        value.backward()

    Args:
        model: encoder, a plain module, DDP (gradients are reduced once, with the last chunk) or
            FSDP2 (which wants as many chunks on every rank). Its outputs are rows [n, ...], joined
            along dim 0, or scalars such as logit_scale, equal for all chunks.
        chunks: inputs of `model`, one call each; they are kept until the end.
        loss: of the joined outputs; `group=` inside it makes the batch that of all ranks.
    Returns: the loss, without graph; gradients are in `.grad`.
    Memory: outputs of all chunks and the activations of one; each chunk is encoded twice.
    Raises: ValueError, no chunk, or outputs that change from chunk to chunk.
    Source: GradCache, arXiv:2101.06983. Layers that update state in forward (batch norm) see every
        chunk twice.
    """
    chunks = list(chunks)
    if not chunks:
        raise ValueError("cached_backward: chunks: expected at least one, got none")
    states, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append((torch.get_rng_state(), get_device_states(*_tensors(chunk))))
            outputs.append(_as_tuple(model(chunk)))
    if len({tuple(_shared(t) for t in out) for out in outputs}) > 1:
        raise ValueError("cached_backward: model: expected the same kinds of output for all chunks")
    columns = list(zip(*outputs, strict=True))
    joined = [parts[0].clone() if _shared(parts[0]) else torch.cat(parts) for parts in columns]
    for t in joined:
        t.requires_grad_(t.is_floating_point())
    sizes = [None if _shared(p[0]) else [t.shape[0] for t in p] for p in columns]
    del outputs, columns
    with _gradient_sync(model, False):
        value = loss(*joined)
        value.backward()
    # Per output, the gradient of each chunk; a scalar's goes back through the last one alone.
    others = [None] * (len(chunks) - 1)
    grads = [
        None if t.grad is None else [*others, t.grad] if size is None else t.grad.split(size)
        for t, size in zip(joined, sizes, strict=True)
    ]
    for i, (chunk, (cpu_state, device_states)) in enumerate(zip(chunks, states, strict=True)):
        last = i == len(chunks) - 1
        with _gradient_sync(model, last), torch.random.fork_rng(devices=device_states[0]):
            torch.set_rng_state(cpu_state)
            set_device_states(*device_states)
            out = _as_tuple(model(chunk))
            wanted, upstream = [], []
            for t, g in zip(out, grads, strict=True):
                if t.requires_grad:
                    wanted.append(t)
                    upstream.append(torch.zeros_like(t) if g is None or g[i] is None else g[i])
            torch.autograd.backward(wanted, upstream)
    return value.detach()


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _shared(t: Tensor) -> bool:
    """A scalar output, the same for every chunk."""
    return t.dim() == 0 or t.shape == (1,)


def _tensors(chunk: Any) -> list[Tensor]:
    return [t for t in tree_leaves(chunk) if isinstance(t, Tensor)]


@contextlib.contextmanager
def _gradient_sync(model: Any, on: bool) -> Iterator[None]:
    """Whether a backward inside reduces gradients over ranks, for DDP and FSDP2."""
    if on:
        yield
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
            yield
