"""The ring that both losses run over the ranks of a process group.

y travels: in W hops each rank meets every rank's y, while the next one is already on its way.
Results about rows of x stay here; results about rows of y (column statistics, dy) travel one hop
behind their tower and end where they belong. Order is fixed by rank, so results repeat bit for bit.
Memory O(rows * D): only sizes and sums are gathered. All ranks must call, and go backward, alike.
"""

from __future__ import annotations  # torch may be built without torch.distributed

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from . import backends, check, problem
from .ops import pairs, self_similarity

# What must be equal on all ranks, by name; M and N may differ.
_FACTS = (
    "op", "D", "leading dimensions", "dtype", "normalize", "reduction", "direction", "duplicates",
    "exclude_self", "label_smoothing", "positives given", "ids given", "logit_scale per row",
    "requires_grad",
)  # fmt: skip
_OPS = ("contrastive_loss", "sigmoid_loss")
_DIRECTIONS = ("both", "x", "y")
_DUPLICATES = ("positive", "ignore")
_REDUCTIONS = ("mean", "sum", "none")


class Ring:
    """This rank's place in a group, and the sizes of all ranks' blocks.

    Attributes: rank, size; M, N, rows of x and y per rank; row0, col0, their offsets in the
    concatenation; sent, bytes this rank has sent to its neighbour so far.
    """

    def __init__(self, op: str, group: dist.ProcessGroup, M: list[int], N: list[int]) -> None:
        self.op, self.group, self.M, self.N = op, group, M, N
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.row0 = [sum(M[:r]) for r in range(self.size)]
        self.col0 = [sum(N[:r]) for r in range(self.size)]
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)
        self.sent = 0

    def holder_of(self, hop: int) -> int:
        """The rank whose y is here at this hop."""
        return (self.rank - hop) % self.size

    def shift(self, send: list[Tensor], hop: int, rows_dim: list[int]) -> Transfer:
        """Starts sending to the next rank; what comes from the previous one belongs to hop.
        rows_dim names the dimension of each tensor that counts rows, and may name more."""
        rows = self.N[self.holder_of(hop)]
        received = []
        for t, dim in zip(send, rows_dim, strict=False):
            shape = list(t.shape)
            shape[dim] = rows
            received.append(t.new_empty(shape))
        send = [t.contiguous() for t in send]
        self.sent += sum(t.nbytes for t in send)
        calls = [dist.P2POp(dist.isend, t, self._next, self.group) for t in send if t.numel()]
        calls += [
            dist.P2POp(dist.irecv, t, self._previous, self.group) for t in received if t.numel()
        ]
        with _explained(self.op):
            works = dist.batch_isend_irecv(calls) if calls else []
        return Transfer(self.op, works, send, received)

    def towers(
        self, tower: list[Tensor], rows_dim: list[int]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors) for every rank, this one first, fetching one hop ahead."""
        for hop in range(self.size):
            ahead = self.shift(tower, hop + 1, rows_dim) if hop + 1 < self.size else None
            yield self.holder_of(hop), tower
            tower = ahead.wait() if ahead is not None else tower


class Transfer:
    """A hop under way; keeps its tensors alive."""

    def __init__(self, op: str, works: list, sent: list[Tensor], received: list[Tensor]) -> None:
        self._op, self._works, self._sent, self._received = op, works, sent, received

    def wait(self) -> list[Tensor]:
        """The tensors received."""
        with _explained(self._op):
            for work in self._works:
                work.wait()
        return self._received


class Carried:
    """A result about rows of y that follows its tower round the ring and is merged on the way."""

    def __init__(
        self, ring: Ring, rows_dim: int, merge: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._ring, self._rows_dim, self._merge = ring, rows_dim, merge
        self._hop = 0
        self._own: Tensor | None = None
        self._behind: Transfer | None = None

    def add(self, block: Tensor) -> None:
        """This hop's result; call once a hop, in order."""
        if self._hop == 0:
            self._own = block
        else:
            if self._behind is not None:
                block = self._merge(self._behind.wait()[0], block)
            self._behind = self._ring.shift([block], self._hop + 1, [self._rows_dim])
        self._hop += 1

    def home(self) -> Tensor:
        """The result over all ranks for this rank's own y."""
        if self._behind is None:
            return self._own
        return self._merge(self._own, self._behind.wait()[0])


@contextlib.contextmanager
def _explained(op: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = f"{op}: group: a rank failed or did not answer within the group's timeout"
        raise RuntimeError(text) from error


@contextlib.contextmanager
def joint_validation(op: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """If the body raises on this rank, the other ranks of `group` hear of it and raise as well."""
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            got = type(group).__name__
            raise TypeError(f"{op}: group: expected a torch.distributed.ProcessGroup, got {got}")
        if dist.get_rank(group) < 0:
            raise check.bad(op, "group", "a group that this rank belongs to", "another one")
    try:
        yield
    except Exception:
        if group is not None:
            with contextlib.suppress(RuntimeError):
                _gather(op, group, torch.zeros(5 + len(_FACTS), dtype=torch.int64))
        raise


def _gather(op: str, group: dist.ProcessGroup, t: Tensor) -> Tensor:
    """t [n] of every rank, [W, n]; over the GPU if the group has no backend for t's device."""
    home = t.device
    if f"{home.type}:" not in str(dist.get_backend_config(group)):
        t = t.cuda()
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    with _explained(op):
        dist.all_gather(parts, t, group=group)
    return torch.stack(parts).to(home)


def _meet(
    op: str,
    group: dist.ProcessGroup,
    asked: problem.PairLossProblem,
    positives: Tensor | None,
    *facts: int,
) -> Ring:
    """The ring of this call, or a ValueError on every rank if they disagree."""
    mine = [1, asked.M, asked.N, *pairs.range_of(positives), _OPS.index(op), asked.D, asked.G]
    mine += [check.FLOATING.index(asked.dtype), int(asked.normalize), *facts]
    every = _gather(op, group, torch.tensor(mine)).tolist()
    refused = [r for r, (valid, *_) in enumerate(every) if not valid]
    if refused:
        raise ValueError(f"{op}: group: expected valid arguments on every rank, not on {refused}")
    for name, *values in zip(_FACTS, *(row[5:] for row in every), strict=True):
        if len(set(values)) > 1:
            raise check.bad(op, "group", f"the same {name} on every rank", _decoded(name, values))
    M, N = ([row[i] for row in every] for i in (1, 2))
    for row in every:
        pairs.check_positives(row[3], row[4], sum(N))
    return Ring(op, group, M, N)


def _decoded(name: str, values: list[int]) -> list:
    words = dict(
        op=_OPS, direction=_DIRECTIONS, duplicates=_DUPLICATES, reduction=_REDUCTIONS,
        dtype=[check.name(d) for d in check.FLOATING],
    )  # fmt: skip
    if name == "label_smoothing":
        return [struct.unpack("d", struct.pack("q", v))[0] for v in values]
    return [words[name][v] for v in values] if name in words else values


def _requires_grad(*tensors: Tensor) -> int:
    """Bits of who requires a gradient: the ranks' backwards must match."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << i for i, t in enumerate(tensors) if t.requires_grad)


def _positives(ring: Ring, asked, positives: Tensor | None, by_id: bool, device) -> Tensor | None:
    """Global columns of this rank's rows, [G, M]; without positives, row i matches column i if
    there are as many, by_id or not."""
    if positives is not None:
        return positives.reshape(asked.G, asked.M)
    rows, cols = sum(ring.M), sum(ring.N)
    if rows == cols:
        return pairs.default_positives(asked.G, asked.M, device) + ring.row0[ring.rank]
    if by_id:
        return None
    raise check.bad(ring.op, "y", f"as many rows as x over all ranks, {rows}", cols)


class _SumOverRanks(torch.autograd.Function):
    """Sum of every rank's vector, in rank order. Its gradient is the sum of every rank's: averaged
    over ranks later, as DDP does, that is the gradient of the mean of their losses."""

    @staticmethod
    def forward(ctx, t: Tensor, op: str, group: dist.ProcessGroup) -> Tensor:
        ctx.op, ctx.group = op, group
        return _gather(op, group, t).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dt: Tensor):
        return _gather(ctx.op, ctx.group, dt).sum(0), None, None


# torch.compile breaks the graph here and calls the ring as it is. Unlike torch.compiler.disable,
# this does not import the compiler, two seconds, with the package.
@_disable_dynamo
def contrastive_loss(
    asked: problem.PairLossProblem,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    *,
    duplicates: str,
    direction: str,
    label_smoothing: float,
    exclude_self: bool,
    reduction: str,
    group: dist.ProcessGroup,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """contrastive_loss over the ranks of a group, arguments validated; x [G, M, D], y [G, N, D]."""
    ring = _meet(
        "contrastive_loss", group, asked, positives, _REDUCTIONS.index(reduction),
        _DIRECTIONS.index(direction), _DUPLICATES.index(duplicates), int(exclude_self),
        struct.unpack("q", struct.pack("d", label_smoothing))[0],
        int(positives is not None), int(asked.ids), int(scale.dim() > 1),
        _requires_grad(x, y, scale),
    )  # fmt: skip
    by_id = asked.ids and duplicates == "positive"
    direction = "x" if exclude_self else direction  # losses of columns are those of rows
    if positives is not None or not exclude_self:
        positives = _positives(ring, asked, positives, by_id, x.device)
    loss_x, loss_y, n_x, n_y = _Contrastive.apply(
        x, y, scale, positives, ids_x, ids_y, ring, backend, duplicates == "ignore",
        label_smoothing, asked.normalize, direction, exclude_self,
    )  # fmt: skip
    if exclude_self:
        loss_y = loss_x
    if reduction == "none":
        return loss_x, loss_y
    sums = torch.stack([loss_x.double().sum(), loss_y.double().sum(), n_x, n_y])
    total_x, total_y, n_x, n_y = _SumOverRanks.apply(sums, ring.op, group)
    if reduction == "mean":
        total_x, total_y = total_x / n_x.clamp_min(1), total_y / n_y.clamp_min(1)
    total = {"x": total_x, "y": total_y, "both": (total_x + total_y) / 2}[direction]
    return total.to(loss_x.dtype)


class _Refused(torch.autograd.Function):
    """Gradients as they are, of which a derivative is an error."""

    @staticmethod
    def forward(ctx, op: str, count: int, *tensors):
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: group: a second derivative is not implemented")


def _first_order(backward: Callable) -> Callable:
    """A backward that nobody can differentiate: not by the gradients that come, which is all that
    once_differentiable refuses, nor by the inputs that it saved."""

    @functools.wraps(backward)
    def refusing(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        op = ctx.options[0].op
        return _Refused.apply(op, len(results), *results, *ctx.saved_tensors, *grads)

    return refusing


class _Contrastive(torch.autograd.Function):
    """loss_x [G, M], loss_y [G, N] and how many of their rows have a match, of this rank."""

    @staticmethod
    def forward(
        ctx, x, y, scale, positives, ids_x, ids_y, ring, backend, ignore, smoothing, normalize,
        direction, exclude_self,
    ):  # fmt: skip
        want_x, want_y = direction != "y", direction != "x"
        module = backends.load(backend, ring.op)
        stats_x, columns = None, Carried(ring, 2, pairs.merge)
        with torch.autocast(x.device.type, enabled=False):
            for owner, (y_o, *ids_o) in ring.towers([y, *_given(ids_y)], [1, 1]):
                local = _local(ring, positives, owner)
                if exclude_self and owner == ring.rank:
                    block_x = self_similarity.fwd(module, x, scale, local, ids_x, ignore, normalize)
                else:
                    block_x, block_y = module.fwd(
                        x, y_o, scale, local, ids_x, *(ids_o or [None]), ignore, normalize,
                        want_x, want_y,
                    )  # fmt: skip
                stats_x = block_x if stats_x is None else pairs.merge(stats_x, block_x)
                if want_y:
                    columns.add(block_y)
        stats_y = columns.home() if want_y else stats_x.new_zeros(6, *y.shape[:2])
        loss_x = (
            pairs.row_loss(stats_x, smoothing, module) if want_x else torch.zeros_like(stats_x[0])
        )
        loss_y = (
            pairs.row_loss(stats_y, smoothing, module) if want_y else torch.zeros_like(stats_y[0])
        )
        n_x, n_y = ((s[3] > 0.0).double().sum() for s in (stats_x, stats_y))
        ctx.mark_non_differentiable(n_x, n_y)
        ctx.save_for_backward(x, y, scale, positives, ids_x, ids_y, stats_x, stats_y)
        ctx.options = ring, backend, ignore, smoothing, normalize, want_x, want_y, exclude_self
        return loss_x.to(scale.dtype), loss_y.to(scale.dtype), n_x, n_y

    @staticmethod
    @_first_order
    def backward(ctx, dloss_x, dloss_y, _dn_x, _dn_y):
        x, y, scale, positives, ids_x, ids_y, stats_x, stats_y = ctx.saved_tensors
        ring, backend, ignore, smoothing, normalize, want_x, want_y, exclude_self = ctx.options
        dloss_x = dloss_x if want_x else torch.zeros_like(dloss_x)
        dloss_y = dloss_y if want_y else torch.zeros_like(dloss_y)
        module = backends.load(backend, ring.op)
        coef_x = pairs.coefficients(stats_x, dloss_x, smoothing, module)
        coef_y = pairs.coefficients(stats_y, dloss_y, smoothing, module)
        needs = list(ctx.needs_input_grad[:3])
        grads = _Gradients(ring, (x, y, scale), needs)
        tower = [y, coef_y, *_given(ids_y)]
        with torch.autocast(x.device.type, enabled=False):
            for owner, (y_o, coef_o, *ids_o) in ring.towers(tower, [1, 2, 1]):
                local = _local(ring, positives, owner)
                if exclude_self and owner == ring.rank:
                    blocks = self_similarity.bwd(
                        module, coef_x, x, scale, local, ids_x, ignore, normalize, needs[::2]
                    )
                    if needs[1]:  # of both roles of x
                        blocks.insert(1, torch.zeros_like(y))
                else:
                    blocks = module.bwd(
                        coef_x, coef_o, x, y_o, scale, local, ids_x, *(ids_o or [None]), ignore,
                        normalize, needs,
                    )  # fmt: skip
                grads.add(blocks)
        return *grads.home(), *[None] * 10


@_disable_dynamo
def sigmoid_loss(
    asked: problem.PairLossProblem,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    *,
    reduction: str,
    group: dist.ProcessGroup,
    backend: str,
) -> Tensor:
    """sigmoid_loss over the ranks of a group, arguments validated; x [G, M, D], y [G, N, D]."""
    ring = _meet(
        "sigmoid_loss", group, asked, None, _REDUCTIONS.index(reduction), 0, 0, 0, 0, 0,
        int(asked.ids), int(scale.dim() > 1), _requires_grad(x, y, scale, bias),
    )  # fmt: skip
    positives = None if asked.ids else _positives(ring, asked, None, False, x.device)
    loss = _Sigmoid.apply(
        x, y, scale, bias, positives, ids_x, ids_y, ring, backend, asked.normalize
    )
    if reduction == "none":
        return loss
    total = _SumOverRanks.apply(loss.double().sum().reshape(1), ring.op, group)
    if reduction == "mean":
        total = total / max(asked.G * sum(ring.M), 1)
    return total.reshape(()).to(loss.dtype)


class _Sigmoid(torch.autograd.Function):
    """Row sums of the loss, [G, M], of this rank's x over every rank's y."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, positives, ids_x, ids_y, ring, backend, normalize):
        module, loss = backends.load(backend, ring.op), None
        with torch.autocast(x.device.type, enabled=False):
            for owner, (y_o, *ids_o) in ring.towers([y, *_given(ids_y)], [1, 1]):
                block = module.fwd(
                    x, y_o, scale, bias, _local(ring, positives, owner), ids_x,
                    *(ids_o or [None]), normalize,
                )  # fmt: skip
                loss = block if loss is None else loss + block
        ctx.save_for_backward(x, y, scale, bias, positives, ids_x, ids_y)
        ctx.options = ring, backend, normalize
        return loss

    @staticmethod
    @_first_order
    def backward(ctx, dloss):
        x, y, scale, bias, positives, ids_x, ids_y = ctx.saved_tensors
        ring, backend, normalize = ctx.options
        needs = list(ctx.needs_input_grad[:4])
        module = backends.load(backend, ring.op)
        grads = _Gradients(ring, (x, y, scale, bias), needs)
        dloss = dloss.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            for owner, (y_o, *ids_o) in ring.towers([y, *_given(ids_y)], [1, 1]):
                grads.add(
                    module.bwd(
                        dloss, x, y_o, scale, bias, _local(ring, positives, owner), ids_x,
                        *(ids_o or [None]), normalize, needs,
                    )
                )  # fmt: skip
        return *grads.home(), *[None] * 6


class _Gradients:
    """Sums gradients of (x, y, per-row scalars ...) over hops in fp32: y's travel, others stay."""

    def __init__(self, ring: Ring, inputs: tuple[Tensor, ...], needs: list[bool]) -> None:
        self._inputs, self._needs = inputs, needs
        self._sums: list[Tensor | None] = [None] * len(inputs)
        self._dy = Carried(ring, 1, Tensor.add_)

    def add(self, blocks: list[Tensor]) -> None:
        """The gradients of one hop, those needed only."""
        blocks = iter(blocks)
        for i, need in enumerate(self._needs):
            if not need:
                continue
            block = next(blocks)
            block = block if block.dtype == torch.float64 else block.float()
            if i == 1:
                self._dy.add(block)
            else:
                self._sums[i] = block if self._sums[i] is None else self._sums[i].add_(block)

    def home(self) -> list[Tensor | None]:
        """Gradients in the inputs' shapes and dtypes."""
        if self._needs[1]:
            self._sums[1] = self._dy.home()
        for i, (t, total) in enumerate(zip(self._inputs, self._sums, strict=True)):
            if total is not None:
                total = total if total.shape == t.shape else total.sum().reshape(t.shape)
                self._sums[i] = total.to(t.dtype)
        return self._sums


def _given(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _local(ring: Ring, positives: Tensor | None, owner: int) -> Tensor | None:
    """Global positives as columns of owner's block; those elsewhere fall outside it."""
    return None if positives is None else positives - ring.col0[owner]
