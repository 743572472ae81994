"""python -m benchmarks.run OP: checks, then times ours and its peers in turns; writes JSON.

What differs from fp64 by more than the tests allow is not timed. Results go to
benchmarks/results/<machine>/<op>.json and replace those of the same case, dtype, mode and threads.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import cases, measure, peers

RESULTS = Path(__file__).parent / "results"
_PERCENTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
QUIET = 0.05  # share of the cores; beyond it a time says little
_COPY_BYTES = 1 << 28  # far beyond the last-level cache


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    extension = importlib.import_module("fusedmm._C")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": extension.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _first_line(os.environ.get("CXX", "g++"), "--version"),
    }


def _cpu_model() -> str:
    fields = dict.fromkeys(("model name", "cpu family", "model", "stepping"), "")
    with open("/proc/cpuinfo") as f:
        for line in f:
            key, _, value = line.partition(":")
            if fields.get(key.strip()) == "":
                fields[key.strip()] = value.strip()
    numbers = "-".join(fields[k] for k in ("cpu family", "model", "stepping"))
    return f"{fields['model name'] or platform.processor()} ({numbers})"


def slug(info: dict[str, Any]) -> str:
    """Folder name of a machine."""
    text = f"{info['cpu']} {info['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _first_line(*command: str) -> str:
    try:
        out = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT).stdout
    except OSError:
        return "unknown"
    return out.splitlines()[0] if out else "unknown"


def _commit() -> str:
    dirty = _first_line("git", "status", "--porcelain", "--", "csrc", "fusedmm") != "unknown"
    return _first_line("git", "rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")


def peaks(threads: int) -> dict[str, float]:
    """FMA peaks in FLOP/s and copy bandwidth in bytes/s, on `threads` threads."""
    torch.set_num_threads(threads)
    extension = importlib.import_module("fusedmm._C")
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    times = measure.interleaved({"copy": lambda: target.copy_(source)}, 0.1)["copy"]
    return {
        "fp32": extension.fma_peak(False, threads),
        "bf16": extension.fma_peak(True, threads),
        "bytes": 2 * _COPY_BYTES / min(times),
    }


class Cell:
    """One case in one dtype, mode and number of threads."""

    def __init__(self, case: cases.BenchCase, dtype: str, mode: str, threads: int) -> None:
        self.case, self.dtype, self.mode, self.threads = case, dtype, mode, threads

    def key(self) -> dict[str, Any]:
        """What makes two records the same measurement."""
        return {
            "case": self.case.name,
            "dtype": self.dtype,
            "mode": self.mode,
            "threads": self.threads,
        }

    def each(self) -> int:
        """Calls in a turn: after others' code the first of a tiny one runs from cold caches, which
        its users' loops do not."""
        return 50 if self.case.group == "overhead" else 1

    def record(self, chosen: list[peers.Peer], seconds: float | None) -> dict[str, Any]:
        """Checks and, with seconds, times every peer; those left out carry their reason."""
        torch.set_num_threads(self.threads)
        torch._dynamo.reset()  # compiled code is made for a number of threads
        calls, skipped = {}, {}
        itemsize = cases.DTYPES[self.dtype].itemsize
        for peer in chosen:
            try:
                run = peer.make(self.case, self.mode, itemsize)
                wrong = measure.check(run, self.case, peer, self.mode, self.dtype)
            except peers.Skip as reason:
                skipped[peer.name] = str(reason)
                continue
            except Exception as error:  # a peer's failure is a result, not the end of the run
                if peer.name == "ours":
                    raise
                skipped[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if wrong:
                skipped[peer.name] = f"wrong: {wrong}"
                continue
            data = peer.lay_out(self.case.make(self.dtype))
            calls[peer.name] = measure.steps(run, data, self.mode)
        out = {**self.key(), "group": self.case.group, "shape": str(self.case.shape)}
        if calls and seconds is not None:
            extension = importlib.import_module("fusedmm._C")
            bf16 = self.dtype == "bf16"
            before = extension.fma_peak(bf16, self.threads)
            with measure.Others() as others:
                times = measure.interleaved(calls, seconds, self.each())
            out["others"] = others.share
            peak = max(before, extension.fma_peak(bf16, self.threads))
            out["times"] = {
                name: {p: measure.percentile(t, share) for p, share in _PERCENTILES.items()}
                | {"calls": len(t)}
                for name, t in times.items()
            }
            out |= self.derived(out["times"], peak)
        return {**out, "skipped": skipped}

    def derived(self, times: dict[str, dict[str, float]], peak: float) -> dict[str, Any]:
        """Best peer, ratio to it, needed FLOP/s and their share of the peak."""
        out: dict[str, Any] = {"flop": self.case.flop(self.mode), "fma_peak": peak}
        out["traffic"] = self.case.traffic(self.mode, self.dtype)
        others = {name: t["p50"] for name, t in times.items() if name != "ours"}
        if "ours" in times:
            out["flops"] = out["flop"] / times["ours"]["p50"]
            out["share_of_peak"] = out["flops"] / peak
            if others:
                out["best_peer"] = min(others, key=others.__getitem__)
                out["ratio"] = others[out["best_peer"]] / times["ours"]["p50"]
        return out

    def describe(self, record: dict[str, Any]) -> str:
        """The record in one line."""
        text = " ".join(str(v) for v in self.key().values())
        for name, t in record.get("times", {}).items():
            text += f"  {name} {1e3 * t['p50']:.3g} ms"
        if "ratio" in record:
            text += f"  ratio {record['ratio']:.2f}"
        if "flops" in record:
            text += f"  {record['flops'] / 1e9:.0f} GFLOP/s ({record['share_of_peak']:.0%})"
        if record.get("others", 0.0) > QUIET:
            text += f"  NOISY: {record['others']:.0%} of the cores were busy with other work"
        return text + "".join(f"\n    {k}: {v}" for k, v in record["skipped"].items())


def measure_memory(case: cases.BenchCase, dtype: str, mode: str, threads: int, chosen) -> dict:
    """Peak and saved bytes of every peer, each in a fresh process."""

    def one(peer: peers.Peer) -> dict:
        try:
            peer.make(case, mode, cases.DTYPES[dtype].itemsize)
        except peers.Skip as reason:
            return {"skip": str(reason)}
        return measure.memory(case, peer.name, dtype, mode, threads)

    with ThreadPoolExecutor(2) as pool:  # bytes do not depend on what runs beside
        by_peer = dict(zip([p.name for p in chosen], pool.map(one, chosen), strict=True))
    return {"case": case.name, "dtype": dtype, "mode": mode, "threads": threads, "peers": by_peer}


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """New records in place of old ones of the same case, dtype, mode and threads."""

    def key(r: dict) -> tuple:
        return r["case"], r["dtype"], r["mode"], r["threads"]

    fresh = {key(r) for r in new}
    return sorted([r for r in old if key(r) not in fresh] + new, key=key)


def save(op: str, info: dict, run: dict, records: list[dict], memory: list[dict]) -> Path:
    """Adds a run to the results of its machine."""
    path = RESULTS / slug(info) / f"{op}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    runs = kept.get("runs", [])
    if not runs or runs[-1] != run:  # a run saves after every case
        runs = [*runs, run]
    for r in (*records, *memory):
        r["run"] = len(runs) - 1
    result = {
        "op": op,
        "machine": info,
        "runs": runs,
        "records": merge(kept.get("records", []), records),
        "memory": merge(kept.get("memory", []), memory),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("op", choices=(*cases.OPS, "all"))
    parser.add_argument("--cases", type=names, help="names or groups (model, sweep, overhead)")
    parser.add_argument("--modes", type=names, default=["fwd", "fwdbwd"])
    parser.add_argument("--dtypes", type=names, default=list(cases.DTYPES))
    parser.add_argument("--threads", type=names, default=["1", str(os.cpu_count())])
    parser.add_argument("--peers", type=names, help="default: all that apply")
    parser.add_argument("--seconds", type=float, default=0.2, help="a peer and case")
    parser.add_argument("--quick", action="store_true", help="a few calls; nothing is saved")
    parser.add_argument("--what", choices=("time", "memory", "both", "check"), default="both")
    return parser.parse_args(argv)


def run_op(op: str, args: argparse.Namespace) -> None:
    """Measures one op and saves what it measured."""
    chosen = peers.select(op, args.peers)
    seconds = None if args.what == "check" else 0.0 if args.quick else args.seconds
    threads = sorted({int(t) for t in args.threads})
    keep = not args.quick and args.what != "check"
    run, ratios = describe_run(threads) if keep else {}, []
    for case in cases.select(op, args.cases):
        records, memory = [], []
        for dtype in args.dtypes:
            for mode in args.modes:
                for count in threads if args.what != "memory" else ():
                    cell = Cell(case, dtype, mode, count)
                    records.append(cell.record(chosen, seconds))
                    say(f"{op} " + cell.describe(records[-1]))
                if keep and args.what in ("memory", "both") and case.group != "overhead":
                    memory.append(measure_memory(case, dtype, mode, threads[-1], chosen))
                    say(f"{op} memory {case.name} {dtype} {mode} {memory[-1]['peers']}")
        if keep:
            save(op, machine(), run, records, memory)
        ratios += [r["ratio"] for r in records if "ratio" in r and r["group"] == "model"]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        say(f"{op}: geometric mean {mean:.2f}, worst {min(ratios):.2f}")


def describe_run(threads: list[int], module: str = "benchmarks.run") -> dict[str, Any]:
    """Commit, command, versions and the machine's ceilings at the start of a run."""
    return {
        **provenance(module),
        "peaks": {str(t): peaks(t) for t in threads},
        "versions": _versions(),
    }


def provenance(module: str) -> dict[str, str]:
    """Commit, date and command."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "open_clip_torch", "bidirectional-cross-attention"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Runs the asked ops."""
    args = arguments(argv)
    warnings.filterwarnings("ignore", module="torch")

    for op in cases.OPS if args.op == "all" else (args.op,):
        run_op(op, args)


if __name__ == "__main__":
    main(sys.argv[1:])
