"""The ring over ranks against one process: gloo groups of 1, 2, 3 and 4 out of one start.

Workers run every case and save what they got; the tests compare it here with the same call on the
concatenation. Rows per rank are uneven, one rank has none.
"""

import contextlib
import dataclasses
import datetime
import functools
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fusedmm
from fusedmm import distributed
from fusedmm.grad_cache import cached_backward

WORLD = 4
GROUPS = {1: [2], 2: [1, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}
ROWS = [5, 3, 0, 6]
TIMEOUT = datetime.timedelta(seconds=60)
DEAD_TIMEOUT = datetime.timedelta(seconds=4)


@dataclasses.dataclass(frozen=True)
class Case:
    loss: str = "contrastive_loss"
    options: tuple = ()
    # Or "ids", "positives", "moved" (columns lie on other ranks than rows), "self" (y is x).
    data: str = "square"
    lead: tuple = ()
    per_row: bool = False
    dtype: torch.dtype = torch.float64
    backend: str | None = "reference"

    def __str__(self) -> str:
        names = [self.loss[:4], self.data, *(f"{k}={v}" for k, v in self.options)]
        extra = ["lead"] * bool(self.lead) + ["per_row"] * self.per_row
        return "-".join([*names, *extra, str(self.dtype)[6:], str(self.backend)])


def options(**kwargs) -> tuple:
    return tuple(kwargs.items())


CASES = [
    Case(),
    Case(data="moved"),
    Case(lead=(2,), per_row=True),
    Case(options=options(direction="x", normalize=True)),
    Case(options=options(direction="y", normalize=True)),
    Case(options=options(label_smoothing=0.1, reduction="sum")),
    Case(options=options(label_smoothing=0.2, reduction="none"), data="ids"),
    Case(options=options(reduction="none", direction="y"), per_row=True),
    Case(options=options(duplicates="positive"), data="ids"),
    Case(options=options(duplicates="ignore", label_smoothing=0.1), data="ids+positives"),
    Case(options=options(normalize=True), data="positives"),
    Case(dtype=torch.float32, backend=None),
    Case(dtype=torch.float32, backend=None, options=options(normalize=True), data="ids"),
    Case(dtype=torch.bfloat16, backend=None, options=options(normalize=True)),
    Case(data="self+pairs", options=options(normalize=True)),
    Case(data="self+pairs", options=options(reduction="none", label_smoothing=0.1), lead=(2,)),
    Case(data="self+ids", dtype=torch.float32, backend=None),
    Case("sigmoid_loss"),
    Case("sigmoid_loss", data="moved", options=options(normalize=True), lead=(2,), per_row=True),
    Case("sigmoid_loss", data="ids", options=options(reduction="sum")),
    Case("sigmoid_loss", options=options(reduction="none")),
    Case("sigmoid_loss", dtype=torch.float32, backend=None),
]


@dataclasses.dataclass
class Data:
    """Inputs of one process; rows and cols split them over ranks."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    extra: dict
    weight_x: torch.Tensor
    weight_y: torch.Tensor
    rows: list[int]
    cols: list[int]


def make(case: Case, world: int) -> Data:
    generator = torch.Generator().manual_seed(world)
    rows = ROWS[:world]
    rows[0] += sum(rows) % 2 if "pairs" in case.data else 0
    cols = rows
    if case.data == "moved":
        cols = rows[::-1]
    elif case.data != "square" and "self" not in case.data:
        cols = [4, 0, 7, 2][:world]
        cols[0] += max(0, sum(rows) - sum(cols)) if "positives" in case.data else 0
    M, N = sum(rows), sum(cols)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    x, y = randn(*case.lead, M, 6), randn(*case.lead, N, 6)
    extra = {}
    if "ids" in case.data:
        extra = dict(ids_x=torch.arange(M) % 4, ids_y=torch.arange(N) % 5)
    if "positives" in case.data:
        extra["positives"] = torch.randperm(N, generator=generator)[:M]
    if "pairs" in case.data:
        order = torch.randperm(M, generator=generator)
        mate = torch.arange(M).scatter(0, order, order.roll(M // 2))
        extra["positives"] = mate.expand(*case.lead, M)
    stats = torch.float64 if case.dtype == torch.float64 else torch.float32
    shape = (*case.lead, M) if case.per_row else ()
    scale = 3.0 + torch.rand(shape, generator=generator, dtype=torch.float64).to(stats)
    bias = torch.tensor(-2.0, dtype=stats)
    weights = [torch.rand(*case.lead, n, generator=generator).to(stats) for n in (M, N)]
    return Data(x, y, scale, bias, extra, *weights, rows, cols)


def mine(t: torch.Tensor, sizes: list[int], rank: int, dim: int) -> torch.Tensor:
    return t.split(sizes, dim)[rank].clone()


def run(case: Case, data: Data, group=None, rank: int = 0) -> dict:
    """Outputs and gradients of the case on this rank's share, or on everything without a group."""
    x, y, scale, bias, extra = data.x, data.y, data.scale, data.bias, dict(data.extra)
    weight_x, weight_y = data.weight_x, data.weight_y
    if group is not None:
        x, y = mine(x, data.rows, rank, -2), mine(y, data.cols, rank, -2)
        weight_x, weight_y = (
            mine(weight_x, data.rows, rank, -1),
            mine(weight_y, data.cols, rank, -1),
        )
        scale = mine(scale, data.rows, rank, -1) if case.per_row else scale
        for k, t in extra.items():
            extra[k] = mine(t, data.cols if k == "ids_y" else data.rows, rank, -1)
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale, bias)]
    arguments = leaves if case.loss == "sigmoid_loss" else leaves[:3]
    if "self" in case.data:
        arguments[1], extra["exclude_self"] = arguments[0], True
        extra |= {k: extra["ids_x"] for k in ("ids_x", "ids_y") if k in extra}
    out = getattr(fusedmm, case.loss)(
        *arguments, **extra, **dict(case.options), group=group, backend=case.backend
    )
    if isinstance(out, tuple):
        total = (out[0] * weight_x).sum() + (out[1] * weight_y).sum()
    else:
        total = (out * weight_x).sum() if out.dim() else out
        out = (out,)
    total.backward()
    return dict(out=[t.detach() for t in out], grads=[t.grad for t in arguments])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    groups = {w: dist.new_group(ranks, timeout=TIMEOUT) for w, ranks in GROUPS.items()}
    results: dict = {}
    for world, ranks in GROUPS.items():
        if rank not in ranks:
            continue
        group = groups[world]
        here = dist.get_rank(group)
        for case in CASES:
            data = make(case, world)
            results[world, str(case)] = [run(case, data, group, here) for _ in range(2)]
    if rank in GROUPS[1]:
        results["compiled"] = compiled(groups[1])
    group = groups[4]
    results["bytes"] = count_bytes(group, rank)
    results["refusals"] = refusals(group, rank)
    results["second"] = second_derivatives(group)
    results["ddp"] = train(group, rank)
    results["fsdp"] = fsdp_step(group)
    with_a_dead_rank(rank, folder, results)


def compiled(group) -> list[torch.Tensor]:
    """A compiled function with the ring inside, and the same without torch.compile."""

    def step(x, y):
        return 2 * fusedmm.contrastive_loss(x.tanh(), y, 3.0, group=group)

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    return [torch.compile(step, backend="eager")(x, y), step(x, y)]


def count_bytes(group, rank: int) -> list[int]:
    """Bytes that one contrastive and one sigmoid loss send, forward and backward."""
    rings, init = [], distributed.Ring.__init__

    def watched(self, *args):
        init(self, *args)
        rings.append(self)

    distributed.Ring.__init__ = watched
    x, y = (torch.randn(32, 16, requires_grad=True) for _ in range(2))
    fusedmm.contrastive_loss(x, y, 2.0, group=group).backward()
    fusedmm.sigmoid_loss(x, y, 2.0, -1.0, group=group).backward()
    distributed.Ring.__init__ = init
    return [ring.sent for ring in rings]


def refusals(group, rank: int) -> list[str]:
    """What each rank says when rank 1 differs from the others."""
    odd = rank == 1

    def call(D=4, **kwargs):
        x = torch.zeros(3, D, requires_grad=kwargs.pop("grad", True))
        loss = kwargs.pop("loss", fusedmm.contrastive_loss)
        loss(x, torch.zeros(3, D), *kwargs.pop("rest", (1.0,)), group=group, **kwargs)

    tries = [
        lambda: call(D=5 if odd else 4),
        lambda: call(direction="z" if odd else "x"),
        lambda: call(label_smoothing=0.5 if odd else 0.25),
        lambda: call(grad=not odd),
        lambda: call(loss=fusedmm.sigmoid_loss, rest=(1.0, 0.0)) if odd else call(),
        lambda: fusedmm.contrastive_loss(
            torch.zeros(4 if odd else 3, 2), torch.zeros(3, 2), 1.0, group=group
        ),
        lambda: call(positives=torch.tensor([0, 1, 12 if odd else 2])),
    ]
    said = []
    for attempt in tries:
        try:
            attempt()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def second_derivatives(group) -> list[str]:
    """What a gradient says that is differentiated through the inputs alone."""
    said = []
    for loss, rest in ((fusedmm.contrastive_loss, ()), (fusedmm.sigmoid_loss, (-1.0,))):
        for reduction in ("mean", "sum"):
            w = torch.eye(4, requires_grad=True)
            x = torch.ones(3, 4) @ w
            value = loss(x.tanh(), torch.ones(3, 4), 2.0, *rest, group=group, reduction=reduction)
            (grad,) = torch.autograd.grad(value, w, create_graph=True)
            try:
                (value + grad.square().sum()).backward()
                said.append("nothing")
            except RuntimeError as error:
                said.append(str(error))
    return said


class Encoder(torch.nn.Module):
    """Two towers and a scale that forward returns, as open_clip's models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, 5), torch.nn.Linear(7, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.dropout = torch.nn.Dropout(0.0)

    def forward(self, pair):
        return (
            self.dropout(self.image(pair[0])),
            self.dropout(self.text(pair[1])),
            self.logit_scale.exp(),
        )


def batches() -> list[tuple]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(16, 6, generator=generator), torch.randn(16, 7, generator=generator))
        for _ in range(2)
    ]


def shard(batch: tuple, rank: int) -> tuple:
    return tuple(t.split([5, 3, 2, 6])[rank] for t in batch)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def train(group, rank: int) -> list[list[torch.Tensor]]:
    """Gradients under DDP: one step, accumulation with no_sync, and cached_backward in chunks."""
    loss = functools.partial(fusedmm.contrastive_loss, normalize=True, group=group)
    ddp = torch.nn.parallel.DistributedDataParallel(Encoder(), process_group=group)
    loss(*ddp(shard(batches()[0], rank))).backward()
    step = gradients(ddp)
    ddp.zero_grad()
    for i, batch in enumerate(batches()):
        with ddp.no_sync() if i == 0 else contextlib.nullcontext():
            loss(*ddp(shard(batch, rank))).backward()
    accumulated = gradients(ddp)
    ddp.zero_grad()
    pair = shard(batches()[0], rank)
    chunks = list(zip(*(t.split(2) for t in pair), strict=True))
    cached_backward(ddp, chunks, loss)
    return [step, accumulated, gradients(ddp)]


def fsdp_step(group) -> list[torch.Tensor]:
    """Full gradients under FSDP2, of one step and of cached_backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank(group)
    loss = functools.partial(fusedmm.contrastive_loss, normalize=True, group=group)
    model = Encoder()
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    pair = shard(batches()[0], rank)
    loss(*model(pair)).backward()
    step = [p.grad.full_tensor() for p in model.parameters()]
    model.zero_grad()
    cached_backward(model, list(zip(*(t.tensor_split(2) for t in pair), strict=True)), loss)
    return [step, [p.grad.full_tensor() for p in model.parameters()]]


def with_a_dead_rank(rank: int, folder: str, results: dict) -> None:
    """Rank 3 leaves after a forward: the others' backward and their next call must raise in time.
    Saves the results."""
    first, second = (dist.new_group(timeout=DEAD_TIMEOUT) for _ in range(2))
    x = torch.randn(3, 4, requires_grad=True)
    loss = fusedmm.contrastive_loss(x, x, 1.0, group=first)
    dist.barrier()
    if rank == 3:
        torch.save(results, f"{folder}/{rank}.pt")
        os._exit(0)
    results["dead"] = []
    for call in (loss.backward, lambda: fusedmm.contrastive_loss(x, x, 1.0, group=second)):
        start = time.monotonic()
        try:
            call()
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        results["dead"].append((said, time.monotonic() - start))
    torch.save(results, f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    # One server imports torch, and forks the ranks: a third of the time of four spawns.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "fusedmm"])
    mp.start_processes(worker, (folder,), nprocs=WORLD, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", GROUPS)
def test_equals_one_process(results, world, case):
    data = make(case, world)
    truth = run(case, data)
    got = [results[rank][world, str(case)][0] for rank in GROUPS[world]]
    exact = case.dtype == torch.float64
    close = functools.partial(
        torch.testing.assert_close, rtol=1e-11 if exact else 1e-6, atol=1e-12 if exact else 1e-6
    )
    per_row = dict(case.options).get("reduction") == "none"
    if per_row:
        for i, out in enumerate(truth["out"]):
            close(torch.cat([g["out"][i] for g in got], -1), out)
    else:
        for g in got:
            assert torch.equal(g["out"][0], got[0]["out"][0]), "the same number on every rank"
            close(g["out"][0], truth["out"][0], rtol=1e-6 if not exact else 1e-11)
    if case.dtype == torch.float32:
        close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    if case.dtype == torch.bfloat16:  # a hop's gradient is rounded before it is added
        close = functools.partial(torch.testing.assert_close, rtol=2**-6, atol=2e-3)
    factor = 1.0 if per_row else 1.0 / world  # rows live on one rank: the mean divides by world
    dx, dy, dscale, *dbias = truth["grads"]
    close(torch.cat([g["grads"][0] for g in got], -2) * factor, dx)
    close(torch.cat([g["grads"][1] for g in got], -2) * factor, dy)
    scales = [g["grads"][2] for g in got]
    close((torch.cat(scales, -1) if case.per_row else sum(scales)) * factor, dscale)
    if dbias:
        close(sum(g["grads"][3] for g in got) * factor, dbias[0])


@pytest.mark.parametrize("world", GROUPS)
def test_repeats_bit_for_bit(results, world):
    for rank in GROUPS[world]:
        for case in CASES:
            first, second = results[rank][world, str(case)]
            for key in ("out", "grads"):
                for a, b in zip(first[key], second[key], strict=True):
                    assert torch.equal(a, b), (str(case), key)


def test_compiled_code_may_call_the_ring(results):
    got, expected = results[GROUPS[1][0]]["compiled"]
    assert torch.equal(got, expected)


def test_bytes_per_rank(results):
    """W - 1 hops of y forward, of y and dy backward, and 48 + 40 bytes of statistics a row."""
    hops, rows, D, fp32 = WORLD - 1, 32, 16, 4
    tower = rows * D * fp32
    for r in results:
        assert r["bytes"] == [hops * (3 * tower + rows * (48 + 40)), hops * 3 * tower]


def test_one_odd_rank_is_an_error_on_every_rank(results):
    said = zip(*(r["refusals"] for r in results), strict=True)
    D, option, smoothing, grad, op, rows, positives = said
    assert set(D) == {
        "contrastive_loss: group: expected the same D on every rank, got [4, 5, 4, 4]"
    }
    assert option[1] == "contrastive_loss: direction: expected one of 'both', 'x', 'y', got 'z'"
    assert {option[0], option[2], option[3]} == {
        "contrastive_loss: group: expected valid arguments on every rank, not on [1]"
    }
    assert set(smoothing) == {
        "contrastive_loss: group: expected the same label_smoothing on every rank, "
        "got [0.25, 0.5, 0.25, 0.25]"
    }
    assert all("expected the same requires_grad on every rank" in text for text in grad)
    assert all("expected the same op on every rank" in text for text in op)
    assert set(rows) == {
        "contrastive_loss: y: expected as many rows as x over all ranks, 13, got 12"
    }
    assert set(positives) == {"contrastive_loss: positives: expected indices in [0, 12), got 12"}


def test_second_derivatives_are_refused(results):
    for r in results:
        assert len(r["second"]) == 4
        for said, op in zip(r["second"], ["contrastive"] * 2 + ["sigmoid"] * 2, strict=True):
            assert said == f"{op}_loss: group: a second derivative is not implemented"


def test_a_dead_rank_is_an_error_in_time(results):
    for r in results[:3]:
        for said, seconds in r["dead"]:
            assert said == (
                "contrastive_loss: group: a rank failed or did not answer within the group's "
                "timeout"
            )
            assert seconds < DEAD_TIMEOUT.total_seconds() + 5


def single_process() -> tuple[list, list]:
    """Gradients of one step and of the two-batch accumulation on the whole batch."""
    model, batch = Encoder(), batches()
    fusedmm.contrastive_loss(*model(batch[0]), normalize=True).backward()
    step = gradients(model)
    fusedmm.contrastive_loss(*model(batch[1]), normalize=True).backward()
    return step, gradients(model)


def test_ddp_no_sync_and_grad_cache(results):
    step, accumulated = single_process()
    for r in results:
        for got, expected in zip(r["ddp"], (step, accumulated, step), strict=True):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_fsdp2_and_grad_cache(results):
    step, _ = single_process()
    order = [0, 1, 2, 3, 4]
    for r in results:
        for got in r["fsdp"]:
            for a, i in zip(got, order, strict=True):
                torch.testing.assert_close(a.reshape(step[i].shape), step[i], rtol=1e-5, atol=1e-6)


TORCHRUN = """
import torch, torch.distributed as dist, fusedmm
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.Linear(6, 4)
x, y = torch.randn(10, 6), torch.randn(10, 6)
loss = fusedmm.contrastive_loss(model(x), model(y), 5.0, normalize=True)
(want,) = torch.autograd.grad(loss, model.weight)
x, y = (t.split([7, 3])[rank] for t in (x, y))
ddp = torch.nn.parallel.DistributedDataParallel(model)
rows = ddp(torch.cat([x, y])).split(len(x))
got = fusedmm.contrastive_loss(*rows, 5.0, normalize=True, group=dist.group.WORLD)
got.backward()
torch.testing.assert_close(got, loss)
torch.testing.assert_close(model.weight.grad, want)
dist.destroy_process_group()
"""


def test_under_torchrun(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(TORCHRUN)
    launch = "torch.distributed.run --standalone --nproc-per-node 2".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script)], capture_output=True, text=True,
        env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_grad_cache_repeats_dropout():
    """With dropout, both encodings of a chunk draw the same mask."""
    model = Encoder()
    model.dropout.p = 0.5
    x, y = batches()[0]
    chunks = list(zip(x.split(5), y.split(5), strict=True))
    torch.manual_seed(3)
    value = cached_backward(model, chunks, fusedmm.contrastive_loss)
    after = torch.rand(1)
    got = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = [model(chunk) for chunk in chunks]
    xs, ys, scales = zip(*outputs, strict=True)
    expected = fusedmm.contrastive_loss(torch.cat(xs), torch.cat(ys), scales[0])
    expected.backward()
    assert torch.equal(after, torch.rand(1)), "the generator moves on as in one pass"
    torch.testing.assert_close(value, expected.detach())
    for a, b in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(a, b)


def test_grad_cache_refuses_no_chunks():
    with pytest.raises(ValueError, match="cached_backward: chunks: expected at least one"):
        cached_backward(Encoder(), [], fusedmm.contrastive_loss)


def test_group_must_be_a_group():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="group: expected a torch.distributed.ProcessGroup"):
        fusedmm.contrastive_loss(x, x, 1.0, group="all")


def test_still_compiles_without_a_group():
    compiled = torch.compile(fusedmm.contrastive_loss, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(compiled(x, y, 2.0), fusedmm.contrastive_loss(x, y, 2.0))
