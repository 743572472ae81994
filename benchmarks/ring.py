"""python -m benchmarks.ring: what the ring over ranks costs, on gloo ranks of this machine, and a
model of it, checked against those measurements and carried on to thousands of GPUs.

Writes benchmarks/results/ring.json and docs/ring.md; `--report` writes the page alone.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fusedmm
from fusedmm import backends, distributed

from . import measure, run

RESULT = run.RESULTS / "ring.json"
PAGE = measure.ROOT / "docs" / "ring.md"
ROWS, WIDTH = 4096, 512
RANKS = (1, 2, 4, 8)
STATS = 48 + 40  # bytes a row of y: statistics in the forward, coefficients in the backward


# The model. n rows of each tower a rank, width D, b bytes an element, W ranks.


def sent(n: int, D: int, b: int, W: int) -> int:
    """Bytes a rank sends in forward and backward: y, then y, coefficients and dy in fp32."""
    return (W - 1) * n * (D * (2 * b + 4) + STATS)


def flops(n: int, D: int) -> tuple[int, int]:
    """FLOP of one hop: one pass over its n x n scores forward, three backward."""
    return 2 * n * n * D, 6 * n * n * D


def memory(n: int, D: int, b: int) -> int:
    """Bytes of a rank beyond its own rows, at the peak in the backward, for any W >= 3: y before,
    here and to come; in fp32 dx so far, own dy, dy going and coming; the kernel's dx and dy, one of
    them in fp32 as well."""
    return n * (D * (3 * b + 16 + 2 * b + (4 if b < 4 else 0)) + 6 * 2 * 8 + 3 * 40)


def packed(n: int, D: int, b: int) -> int:
    """Bytes of the blocks of x and y that a call of the cpu kernels packs, two forms of each."""
    return 4 * n * D * b


def hop_bytes(n: int, D: int, b: int) -> tuple[int, int]:
    """Bytes on the wire in one hop, forward and backward."""
    return n * (D * b + 48), n * (D * (b + 4) + 40)


def least_rows(b: int, rate: float, bandwidth: float) -> int:
    """Rows a rank from which compute hides the transfer in both passes, latency left out:
    2 n n D / rate >= n D b / bandwidth and 6 n n D / rate >= n D (b + 4) / bandwidth."""
    return int(max(b / 2, (b + 4) / 6) * rate / bandwidth) + 1


def gathered(n: int, D: int, b: int, W: int) -> dict[str, int]:
    """Bytes a rank sends and the least it holds in open_clip's modes, from its collectives: both
    towers gathered, with gather_with_grad also reduce-scattered; logits n x W n twice with
    local_loss, else W n x W n twice."""
    towers, N = 2 * (W - 1) * n * D * b, W * n
    return {
        "sent": towers,
        "sent_with_grad": 2 * towers,
        "held_local_loss": 2 * N * D * b + 2 * n * N * b,
        "held_global_loss": 2 * N * D * b + 2 * N * N * b,
    }


# The measurements.


@contextlib.contextmanager
def watched(backend: str) -> Iterator[tuple[list, dict[str, list[float]]]]:
    """The rings made inside, and the processor seconds of every hop's kernels."""
    rings: list[distributed.Ring] = []
    hops: dict[str, list[float]] = {"fwd": [], "bwd": []}
    module = backends.load(backend, "contrastive_loss")
    init, kernels = distributed.Ring.__init__, {k: getattr(module, k) for k in hops}

    def watch(self, *args):
        init(self, *args)
        rings.append(self)

    def timed(name: str, *args):
        start = time.thread_time()
        out = kernels[name](*args)
        hops[name].append(time.thread_time() - start)
        return out

    distributed.Ring.__init__ = watch
    for name in hops:
        setattr(module, name, functools.partial(timed, name))
    try:
        yield rings, hops
    finally:
        distributed.Ring.__init__ = init
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def worker(rank: int, world: int, folder: str, rows: int, width: int, repeats: int) -> None:
    """One rank: a small call, then `repeats` losses forward and backward; writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world)  # fmt: skip
    loss = functools.partial(
        fusedmm.contrastive_loss, logit_scale=20.0, normalize=True, group=dist.group.WORLD,
        backend="cpu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(rows, width, generator=generator).requires_grad_() for _ in range(2))
    loss(x[:64], y[:64]).backward()
    x.grad = y.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = measure._status("VmRSS")
    with watched("cpu") as (rings, hops):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            x.grad = y.grad = None
            loss(x, y).backward()
        dist.barrier()
        seconds = (time.perf_counter() - start) / repeats
    grown = measure._status("VmHWM") - before
    sent_once = rings[0].sent
    wire = time_hop(rings[0], rows * width)
    record = {
        "sent": sent_once,
        "seconds": seconds,
        "fwd": min(hops["fwd"]),
        "bwd": min(hops["bwd"]),
        "grown": grown,
        "wire": wire,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def time_hop(ring: distributed.Ring, elements: int) -> float:
    """Seconds in which a block of fp32 elements reaches the next rank, nothing else going on."""
    if ring.size == 1:
        return 0.0
    block = torch.zeros(ring.N[ring.rank], elements // ring.N[ring.rank])
    times = []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        ring.shift([block], 1, [0]).wait()
        times.append(time.perf_counter() - start)
    return min(times)


def measured(world: int, rows: int, width: int, repeats: int) -> dict[str, Any]:
    """One record of `world` ranks: bytes and slowest or largest of the ranks' figures."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (world, folder, rows, width, repeats), nprocs=world,
                           start_method="forkserver")  # fmt: skip
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]
    kernels = {k: sorted(r[k] for r in ranks)[world // 2] for k in ("fwd", "bwd")}
    largest = {k: max(r[k] for r in ranks) for k in ("seconds", "grown", "wire")}
    return {"ranks": world, "sent": [r["sent"] for r in ranks], **kernels, **largest}


def measure_all(rows: int, width: int, ranks: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Everything the page is made of."""
    multiprocessing.set_forkserver_preload(["fusedmm"])
    # A large array is returned to the system when freed; a heap's fragments are not the ring's.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    records = []
    for world in ranks:
        records.append(measured(world, rows, width, repeats))
        sys.stdout.write(f"{records[-1]}\n")
        sys.stdout.flush()
    return {
        "rows": rows, "width": width, "element": 4, "cores": os.cpu_count(),
        "machine": run.machine(), "commit": run._commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.ring", "records": records,
    }  # fmt: skip


def predicted(result: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """The model's figures for a record; rates are those of one rank alone, and of its own wire."""
    n, D, b, W = result["rows"], result["width"], result["element"], record["ranks"]
    alone = result["records"][0]
    crowd = max(1.0, W / result["cores"])
    wire = record["wire"] / (n * D * 4)  # seconds a byte
    passes = zip((alone["fwd"], alone["bwd"]), hop_bytes(n, D, b), strict=True)
    seconds = sum(W * max(hop * crowd, size * wire) if W > 1 else hop for hop, size in passes)
    return {
        "sent": sent(n, D, b, W), "fwd": alone["fwd"], "bwd": alone["bwd"],
        "grown": memory(n, D, b) + packed(n, D, b), "seconds": seconds,
    }  # fmt: skip


# The page.


def checks_table(result: dict[str, Any]) -> str:
    """Measured beside modelled, one row a number of ranks."""
    lines = [
        "| ranks | MB sent a rank, model | a hop's kernels ms: forward, model | backward, model "
        "| MiB beyond own rows, model | step s, model |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["records"]:
        p = predicted(result, r)
        held = f"{p['grown'] / 2**20:.0f}" if r["ranks"] > 2 else "-"
        low, high = min(r["sent"]), max(r["sent"])
        bytes_sent = f"{low / 1e6:.3f}" + ("" if low == high else f" to {high / 1e6:.3f}")
        cells = [
            str(r["ranks"]), f"{bytes_sent}, {p['sent'] / 1e6:.3f}",
            f"{1e3 * r['fwd']:.0f}, {1e3 * p['fwd']:.0f}",
            f"{1e3 * r['bwd']:.0f}, {1e3 * p['bwd']:.0f}",
            f"{r['grown'] / 2**20:.0f}, {held}",
            f"{r['seconds']:.2f}, {p['seconds']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in a unit that leaves three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


GPUS = (64, 256, 1024, 4096)
BATCHES = (2**16, 2**18, 2**20, 2**22)


def scale_table(D: int, b: int, rate: float, bandwidth: float, latency: float) -> str:
    """The model for many GPUs, in the given rates."""
    lines = [
        "| GPUs | global batch | rows a GPU | held a GPU: ring | open_clip, local_loss | global "
        "| sent a GPU: ring | open_clip with grad | without | hop ms fwd: compute, wire "
        "| bwd: compute, wire | hidden |",
        "|" + "---|" * 12,
    ]
    for W in GPUS:
        for batch in BATCHES:
            n = batch // W
            theirs = gathered(n, D, b, W)
            compute = [f / rate for f in flops(n, D)]
            wire = [latency + s / bandwidth for s in hop_bytes(n, D, b)]
            hidden = all(c >= w for c, w in zip(compute, wire, strict=True))
            hops = [f"{1e3 * c:.3g}, {1e3 * w:.3g}" for c, w in zip(compute, wire, strict=True)]
            cells = [
                str(W), f"{batch:,}", f"{n:,}", size(memory(n, D, b)),
                size(theirs["held_local_loss"]), size(theirs["held_global_loss"]),
                size(sent(n, D, b, W)), size(theirs["sent_with_grad"]), size(theirs["sent"]),
                *hops, "yes" if hidden else "no",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What the table of many GPUs assumes; nothing of it was measured here.
ASSUMED = {"D": 1024, "b": 2, "rate": 4e14, "bandwidth": 5e10, "latency": 1e-5}


def page(result: dict[str, Any]) -> str:
    """docs/ring.md."""
    m, a = result["machine"], ASSUMED
    rows = least_rows(a["b"], a["rate"], a["bandwidth"])
    return f"""# The ring over ranks: what it costs

Made by `{result["command"]}`; nothing here is typed by hand. `contrastive_loss(group=)` on W ranks,
n rows of each tower a rank, width D, b bytes an element. In W hops each rank meets every rank's y.

| a rank | model |
|---|---|
| bytes sent, forward and backward | (W - 1) n (D (2 b + 4) + {STATS}) |
| FLOP of a hop | 2 n n D forward, 6 n n D backward |
| bytes held beyond its own rows | n (D (5 b + 16, and 4 more for b < 4) + 216), for any W |
| the cpu kernels' packed blocks, on top | 4 n D b |
| compute hides the wire, forward | n >= b rate / (2 bandwidth), latency left out |
| compute hides the wire, backward | n >= (b + 4) rate / (6 bandwidth) |

## Checked on this machine

{m["cpu"]}, {m["cores"]} cores, {m["isa"]}, torch {m["torch"]}, commit {result["commit"]},
{result["date"]}. fp32, n = {result["rows"]}, D = {result["width"]}, one thread a rank, gloo. A
hop's kernels are timed in processor seconds, so that ranks that share a core do not count; the
model takes them from one rank alone. The step's model is W times the longer of compute and wire,
compute slowed by ranks a core, the wire measured alone.

{checks_table(result)}

## Carried on to many GPUs

**Assumed, not measured:** {a["rate"] / 1e12:.0f} TFLOP/s of the kernels, {a["bandwidth"] / 1e9:.0f}
GB/s from each GPU to the next, {1e6 * a["latency"]:.0f} us a hop. D = {a["D"]}, b = {a["b"]}
(bf16). At these rates the wire is hidden from {rows:,} rows a GPU on; below that a hop takes as
long as its transfer. A step has 2 W hops. What open_clip holds and sends follows from its
collectives: both towers of all ranks and two logit matrices; gradients and softmax left out, so
that is a lower bound.

{scale_table(**a)}
"""


def main(argv: list[str]) -> None:
    """Measures and writes, or only writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring", description=__doc__)
    parser.add_argument("--report", action="store_true", help="the page from the committed figures")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    if not args.report:
        result = measure_all(ROWS, WIDTH, RANKS, args.repeats)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
