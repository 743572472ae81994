"""python -m benchmarks.gpu_times: times of ours and its peers on the GPU at hand, in turns.

    python -m benchmarks.gpu_times --what check --jobs 8    # compiles and checks all, in parallel
    python -m benchmarks.gpu_times                          # times them; writes the tables
    python -m benchmarks.gpu_times --table                  # only writes them

Every peer is first compared with fp64. `device` is the median time between two events on the
stream while the host is ahead, from cold caches; `call` is what a loop of calls takes each, host
included; `memory` is the growth of the allocated peak. Writes
benchmarks/results/<gpu>/gpu_times.json. Refuses to run on the virtual GPU: it has no times.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fusedmm import testing
from fusedmm.backends.native import extension
from fusedmm.testing import AttentionShape, PairShape

from . import cases, measure, peers, run

OURS = ("ours", "ours in Triton")
MODES = {"fwd": "forward", "fwdbwd": "forward + backward"}
_MAX_ROUNDS, _MIN_ROUNDS = 50, 5
_CALL_SECONDS = 0.02  # of the loop that measures a call with the host

# Batches that fill a GPU, and the models' own.
_ATTENTION = {
    "grounding-dino": AttentionShape(1, 4, 13294, 256, 256, 256),
    "grounding-dino-batch-8": AttentionShape(8, 4, 13294, 256, 256, 256),
    "lightglue": AttentionShape(1, 4, 2048, 2048, 64, 64),
    "lightglue-batch-32": AttentionShape(32, 4, 2048, 2048, 64, 64),
    "bixt-batch-64": AttentionShape(64, 6, 3136, 64, 32, 32),
    "vilbert-batch-256": AttentionShape(256, 8, 36, 36, 128, 128),
    "lxmert-batch-256": AttentionShape(256, 12, 36, 20, 64, 64),
    "image-text-64-batch-64": AttentionShape(64, 12, 1024, 64, 64, 64),
    "generic-batch-64": AttentionShape(64, 12, 1024, 256, 64, 64),
    "long-128": AttentionShape(4, 16, 4096, 4096, 128, 128),
    "long-256": AttentionShape(4, 8, 2048, 2048, 256, 256),
}
_LOSSES: dict[str, dict[str, tuple[PairShape, tuple]]] = {
    "contrastive_loss": {
        "clip-8k": (PairShape(8192, 8192, 512), cases.CLIP),
        "clip-32k": (PairShape(32768, 32768, 512), cases.CLIP),
        "clip-16k-256": (PairShape(16384, 16384, 256), cases.CLIP),
        "region-word": (PairShape(49, 32, 256, (64,)), (("positives", "repeated"),)),
    },
    "sigmoid_loss": {
        "siglip-8k": (PairShape(8192, 8192, 512), cases.SIGLIP),
        "siglip-32k": (PairShape(32768, 32768, 512), cases.SIGLIP),
        "siglip-16k-256": (PairShape(16384, 16384, 256), cases.SIGLIP),
        "region-word": (PairShape(49, 32, 256, (64,)), (("ids", 40),)),
    },
}


def select(op: str, names: list[str] | None) -> list[cases.BenchCase]:
    """Cases of an op whose names contain one of `names`; default all."""
    found = []
    if op in _LOSSES:
        for name, (shape, features) in _LOSSES[op].items():
            small = PairShape(2000, 2000, shape.D) if shape.M > 8192 else None
            found.append(cases.BenchCase(name, op, shape, "gpu", features, small, "cuda"))
    else:
        for name, shape in _ATTENTION.items():
            few = dataclasses.replace(shape, B=1) if shape.B > 1 else None
            found.append(cases.BenchCase(name, op, shape, "gpu", (), few, "cuda"))
    return [c for c in found if names is None or any(n in c.name for n in names)]


def gpu() -> dict[str, Any]:
    """What the numbers depend on besides the code, its ceilings measured."""
    properties = torch.cuda.get_device_properties(0)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = device_times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "driver": _driver(),
        "bf16_flops": 2.0 * n**3 / measure.percentile(times["product"], 0.5),
        "copy_bytes": 2.0 * source.numel() / measure.percentile(times["copy"], 0.5),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def device_times(
    calls: dict[str, Callable[[], Any]], seconds: float = 0.1
) -> dict[str, list[float]]:
    """Seconds on the device, in turns, each from cold caches and with the host ahead of it."""
    wait, own = {}, {}
    for name, call in calls.items():
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            wait[name] = 2.0 * (time.perf_counter() - start) + 5e-5
            torch.cuda.synchronize()
            own[name] = time.perf_counter() - start
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    cycles_a_second = 2e9  # more than any clock: the wait is at least as long as asked
    rounds = math.ceil(seconds * len(calls) / sum(own.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(min(max(rounds, _MIN_ROUNDS), _MAX_ROUNDS)):
        for name, call in calls.items():
            ahead = False
            while not ahead:
                flush.zero_()
                torch.cuda._sleep(int(wait[name] * cycles_a_second))
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                # Else the device waited for the host; a call that waits for the device is let be.
                ahead = not start.query() or wait[name] > 0.5
                wait[name] *= 1.0 if ahead else 2.0
                end.record()
                torch.cuda.synchronize()
            times[name].append(1e-3 * start.elapsed_time(end))
    return times


def call_time(call: Callable[[], Any]) -> float:
    """Seconds a call in a loop, with the host's part."""
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    times = max(3, math.ceil(_CALL_SECONDS / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def memory(call: Callable[[], Any]) -> int:
    """Bytes by which the allocated peak exceeds what was held before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def steps(attend: peers.Run, case: testing.Case, upstream: list[torch.Tensor]) -> Callable:
    """A call without arguments: the forward or, with `upstream` gradients, also the backward."""
    if not upstream:
        tensors = list(case.tensors.values())

        def forward() -> None:
            with torch.no_grad():
                attend(*tensors)

        return forward
    leaves = list(case.leaves().tensors.values())

    def both() -> None:
        torch.autograd.backward(attend(*leaves), upstream)
        for leaf in leaves:
            leaf.grad = None

    return both


def upstream_of(data: testing.Case, mode: str) -> list[torch.Tensor]:
    """Random gradients of the outputs; 1 of a loss."""
    if mode == "fwd":
        return []
    with torch.no_grad():
        outputs = testing.fused(data)
    g = torch.Generator("cuda").manual_seed(1)
    draw = functools.partial(torch.randn, device="cuda", generator=g)
    return [draw(o.shape).to(o) if o.dim() else torch.ones_like(o) for o in outputs]


def record(case: cases.BenchCase, data: testing.Case, dtype, mode, names, seconds) -> dict:
    """Checks every peer and, with seconds, times it on `data`; why others are left out."""
    torch._dynamo.reset()
    calls, skipped, upstream = {}, {}, upstream_of(data, mode)
    for peer in peers.select(case.op, names, "cuda"):
        try:
            attend = peer.make(case, mode, cases.DTYPES[dtype].itemsize)
            wrong = measure.check(attend, case, peer, mode, dtype)
            if wrong:
                raise peers.Skip(f"wrong: {wrong}")
            calls[peer.name] = steps(attend, peer.lay_out(data), upstream)
            calls[peer.name]()  # compiles for the full shape
        except peers.Skip as reason:
            skipped[peer.name] = str(reason)
        except Exception as error:  # a peer's failure is a result, not the end of the run
            if peer.name in OURS:
                raise
            skipped[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            calls.pop(peer.name, None)
    out = {"op": case.op, "case": case.name, "dtype": dtype, "mode": mode}
    out |= {"shape": str(case.shape), "flop": case.flop(mode), "skipped": skipped}
    if seconds is not None:
        times = device_times(calls, seconds)
        out["times"] = {
            name: {
                "device": measure.percentile(times[name], 0.5),
                "device_p20": measure.percentile(times[name], 0.2),
                "device_p80": measure.percentile(times[name], 0.8),
                "call": call_time(call),
                "memory": memory(call),
            }
            for name, call in calls.items()
        }
    return out


def describe(r: dict) -> str:
    """A record in one line, device times in ms and in brackets those of a call."""
    text = " ".join(r[k] for k in ("op", "case", "dtype", "mode"))
    for name, t in r.get("times", {}).items():
        text += f"  {name} {1e3 * t['device']:.3g} ({1e3 * t['call']:.3g})"
    return text + "".join(f"\n    {k}: {v}" for k, v in r["skipped"].items())


def best_peer(r: dict, kind: str = "device") -> str | None:
    """Name of the fastest that is not ours."""
    others = {n: t[kind] for n, t in r["times"].items() if n not in OURS}
    return min(others, key=others.__getitem__) if others else None


def markdown(result: dict) -> str:
    """The tables for people."""
    info = result["machine"]
    lines = [
        f"# Times on {info['gpu']}",
        "",
        f"Torch {info['torch']}, driver {info['driver']}; made by `benchmarks/gpu_times.py`, whose",
        "docstring says how. Ceilings, measured: a bf16 product "
        f"{info['bf16_flops'] / 1e12:.0f} TFLOP/s, a copy {info['copy_bytes'] / 1e12:.2f} TB/s, "
        "read and written. Runs: "
        + "; ".join(f"{i}, {_run(r)}" for i, r in enumerate(result["runs"]))
        + ".",
        "",
        "Times are medians on the device in ms, `call` a loop's with the host. Ratio = best peer",
        "over ours; below 1, in bold, ours is slower. TFLOP/s count the products that no schedule",
        "avoids (3 and 10 of bi_attention, 4 and 14 of co_attention, 1 and 4 of a loss).",
        "",
    ]
    for op in cases.OPS:
        records = [r for r in result["records"] if r["op"] == op]
        if not records:
            continue
        named = [p.name for p in peers.select(op, None, "cuda")]
        shown = [n for n in named if any(n in r["times"] for r in records)]
        lines += [f"## {op}", "", "| shape | dtype | mode | run | " + " | ".join(shown), ""]
        lines[-2] += " | best peer | ratio | call: ours | call: best | ratio | TFLOP/s | memory |"
        lines[-1] = "|---" * (len(shown) + 11) + "|"
        lines += [_row(r, shown) for r in records] + [""]
        skipped = {(n, why) for r in records for n, why in r["skipped"].items()}
        lines += [f"- not timed: {n}: {why}" for n, why in sorted(skipped)] + [""]
    return "\n".join(lines)


def _run(r: dict) -> str:
    compiled = f", kernels for {r['archs']}" if r.get("archs") else ""
    return f"{r['date']} at {r['commit']}{compiled}"


def _row(r: dict, shown: list[str]) -> str:
    times = r["times"]
    cells = [f"{1e3 * times[n]['device']:.3g}" if n in times else "-" for n in shown]
    best, best_call = best_peer(r), best_peer(r, "call")
    if "ours" in times and best:
        ours = times["ours"]
        cells += [best, _ratio(times[best]["device"] / ours["device"])]
        cells += [f"{1e3 * t:.3g}" for t in (ours["call"], times[best_call]["call"])]
        cells += [_ratio(times[best_call]["call"] / ours["call"])]
        cells += [f"{r['flop'] / ours['device'] / 1e12:.0f}"]
        cells += [f"{_mib(ours['memory'])} / {_mib(times[best]['memory'])} MiB"]
    else:
        cells += ["-"] * 7
    head = f"{r['case']} {r['shape']} | {r['dtype']} | {MODES[r['mode']]} | {r['run']}"
    return f"| {head} | " + " | ".join(cells) + " |"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def _mib(count: float) -> str:
    return f"{count / 2**20:.3g}" if count < 1000 * 2**20 else f"{count / 2**20:.0f}"


def place(r: dict) -> tuple:
    """A record's place in the tables; the same for the same measurement."""
    names = [*_ATTENTION, *_LOSSES["contrastive_loss"], *_LOSSES["sigmoid_loss"]]
    return (
        cases.OPS.index(r["op"]), names.index(r["case"]), r["dtype"], list(MODES).index(r["mode"])
    )  # fmt: skip


def merge(old: dict, new: dict) -> dict:
    """`new`, one run, and what it did not measure of `old`; no run without a record is kept."""
    shift = len(old.get("runs", []))
    records = {place(r): r for r in old.get("records", [])}
    records |= {place(r): r | {"run": shift + r["run"]} for r in new["records"]}
    runs = [*old.get("runs", []), *new["runs"]]
    kept = sorted({r["run"] for r in records.values()})
    ordered = [records[k] | {"run": kept.index(records[k]["run"])} for k in sorted(records)]
    return {"machine": new["machine"], "runs": [runs[i] for i in kept], "records": ordered}


def slug(name: str) -> str:
    """Folder name of a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    names = run.names
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_times", description=__doc__)
    parser.add_argument("--ops", type=names, default=list(cases.OPS))
    parser.add_argument("--cases", type=names, help="parts of names")
    parser.add_argument("--modes", type=names, default=list(MODES))
    parser.add_argument("--dtypes", type=names, default=["bf16"])
    parser.add_argument("--peers", type=names, help="default: all that apply")
    parser.add_argument("--seconds", type=float, default=0.1, help="a peer and case")
    parser.add_argument("--what", choices=("time", "check"), default="time")
    parser.add_argument("--jobs", type=int, default=1, help="processes of --what check")
    parser.add_argument("--out", default=str(run.RESULTS), help="folder of <gpu>/gpu_times.json")
    parser.add_argument("--table", action="store_true", help="write tables of what is there")
    return parser.parse_args(argv)


def in_parallel(args: argparse.Namespace, argv: list[str]) -> None:
    """A process a case: what they compile is on disk afterwards."""
    parts = [(op, c.name) for op in args.ops for c in select(op, args.cases)]

    def one(part: tuple[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_times", *argv, "--jobs", "1"]
        command += ["--ops", part[0], "--cases", part[1]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT)
        run.say(done.stdout.rstrip() + (done.stderr[-2000:] if done.returncode else ""))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, parts))


def main(argv: list[str]) -> None:
    """Runs the asked cells; saves after every case."""
    args = arguments(argv)
    warnings.filterwarnings("ignore", module="torch")

    if args.table:
        for path in Path(args.out).glob("*/gpu_times.json"):
            path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
        return
    if os.environ.get("VGPU_ACTIVE") == "1" or not torch.cuda.is_available():
        raise SystemExit("gpu_times: expected a real GPU")
    if args.what == "check" and args.jobs > 1:
        return in_parallel(args, argv)
    keep = args.what == "time"
    result, path = {}, Path()
    if keep:
        info = gpu()
        made = {**run.provenance("benchmarks.gpu_times"), "archs": extension.archs()}
        result = {"machine": info, "runs": [made]}
        path = Path(args.out) / slug(info["gpu"]) / "gpu_times.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if keep and path.exists() else {}
    records: list[dict] = []
    for op in args.ops:
        for case in select(op, args.cases):
            for dtype in args.dtypes:
                data = case.make(dtype)
                for mode in args.modes:
                    seconds = args.seconds if keep else None
                    found = record(case, data, dtype, mode, args.peers, seconds)
                    run.say(describe(found))
                    records.append(found | {"run": 0})
            if keep:
                merged = merge(old, result | {"records": records})
                path.write_text(json.dumps(merged, indent=1) + "\n")
                path.with_suffix(".md").write_text(markdown(merged))


if __name__ == "__main__":
    main(sys.argv[1:])
