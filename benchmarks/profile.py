"""python -m benchmarks.profile: where the time of the cpu kernels goes, sampled by Linux's perf.

A process calls a case of cases.py, mostly forward and backward, while perf samples it for some
seconds.
Products are the micro-kernel's samples; their rate is the FLOP they execute, raw products that a
loss keeps from forward to backward counted once, over the time that all threads spent in them,
beside the FMA peak of one thread in the same run.
"""

import argparse
import gc
import importlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fusedmm import testing
from fusedmm.ops import pairs

from . import cases, measure, peers, run

HERTZ = 2000
# Parts of the work by the function and library of a sample; the first that matches. Inlined code
# counts for the function around it.
PARTS = (
    ("waiting", r" in libgomp"),
    ("new memory", r" in \[kernel"),
    ("products", r"\bmicro<"),
    ("loops around them", r"\bgemm<"),
    ("packing", r"\b(pack\w*|transpose|read_row)\b"),
    ("softmax, ds, sums", r"fmm::| in libm"),
    ("torch, python", r""),
)
CASES = (
    ("bi_attention", "grounding-dino", "fp32", "fwdbwd"),
    ("bi_attention", "grounding-dino-4k", "bf16", "fwdbwd"),
    ("bi_attention", "lightglue", "fp32", "fwd"),
    ("bi_attention", "bixt", "fp32", "fwdbwd"),
    ("bi_attention", "vilbert", "fp32", "fwdbwd"),
    ("co_attention", "grounding-dino", "fp32", "fwdbwd"),
    ("co_attention", "grounding-dino-4k", "bf16", "fwdbwd"),
    ("co_attention", "generic", "fp32", "fwd"),
    ("co_attention", "generic", "bf16", "fwdbwd"),
    ("contrastive_loss", "clip-4k", "bf16", "fwdbwd"),
    ("contrastive_loss", "clip-8k", "bf16", "fwdbwd"),
    ("contrastive_loss", "region-word", "fp32", "fwdbwd"),
    ("sigmoid_loss", "siglip-8k", "fp32", "fwdbwd"),
)
THREADS = (1, 2)


def executed(case: cases.BenchCase, dtype: str, mode: str) -> float:
    """FLOP of the products of a call, those that stay from forward to backward counted once."""
    flop = case.flop(mode)
    if case.op not in testing.LOSSES or mode == "fwd":
        return flop
    s, of = case.shape, cases.DTYPES[dtype]
    asked = SimpleNamespace(G=math.prod(s.lead), M=s.M, N=s.N, D=s.D, dtype=of)
    floats = pairs.kept_dots("cpu", asked, torch.empty(0, requires_grad=True))
    tiles = asked.G * math.prod(-(-n // pairs.TILE) for n in (s.M, s.N))
    kept = floats / (pairs.dots_tile(of) * tiles)
    return flop * (4 - kept) / 4


def child(op: str, name: str, dtype: str, mode: str, threads: int) -> None:
    """Calls for as many seconds as stdin says; writes a line when calls are warm, one of their
    times and, when stdin has another line, one of the FMA peak."""
    torch.set_num_threads(threads)
    case = next(c for c in cases.CASES[op] if c.name == name)
    ours = peers.select(op, ["ours"])[0].make(case, mode, cases.DTYPES[dtype].itemsize)
    call = measure.steps(ours, case.make(dtype), mode)
    peak = importlib.import_module("fusedmm._C").fma_peak
    before = peak(dtype == "bf16", 1)
    for _ in range(2):
        call()
    gc.disable()  # as in measure.interleaved
    sys.stdout.write("warm\n")
    sys.stdout.flush()
    times, end = [], time.perf_counter() + float(sys.stdin.readline())
    while time.perf_counter() < end or not times:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    said = {"seconds": measure.percentile(times, 0.5), "calls": len(times)}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # until perf is gone
    sys.stdout.write(f"{max(before, peak(dtype == 'bf16', 1))}\n")


def sample(
    op: str, name: str, dtype: str, mode: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Shares of one case and the rate of its products."""
    asked = [op, name, dtype, mode, str(threads)]
    command = [sys.executable, "-m", "benchmarks.profile", "--child", *asked]
    pipe = subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        work = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=measure.ROOT)
        with work:
            work.stdout.readline()
            record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-o", data]
            perf = subprocess.Popen([*record, "-p", str(work.pid)], stderr=subprocess.DEVNULL)
            time.sleep(0.5)  # until perf is attached
            work.stdin.write(f"{seconds}\n")
            work.stdin.flush()
            said = json.loads(work.stdout.readline())
            perf.send_signal(signal.SIGINT)
            perf.wait()
            peak = float(work.communicate("\n")[0])
        report = ["perf", "report", "-i", data, "--stdio", "--no-children", "-F", "sample,dso,sym"]
        lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    counts = dict.fromkeys([part for part, _ in PARTS], 0)
    for line in lines.splitlines():
        found = re.match(r"\s*(\d+)\s+(\S+)\s+\[.\]\s+(.*)", line)
        if found:
            counts[part_of(f"{found[3]} in {found[2]}")] += int(found[1])
    total = sum(counts.values())
    if total == 0:
        raise RuntimeError("perf saw nothing; may this user profile? (kernel.perf_event_paranoid)")
    case = next(c for c in cases.CASES[op] if c.name == name)
    in_products = counts["products"] / HERTZ / said["calls"]
    return {
        "op": op, "case": name, "dtype": dtype, "mode": mode, "threads": threads, **said,
        "samples": total,
        "shares": {part: n / total for part, n in counts.items()},
        "products_of_peak": executed(case, dtype, mode) / in_products / peak,
    }  # fmt: skip


def part_of(sampled: str) -> str:
    """The part of the work that "function in library" stands for."""
    return next(part for part, pattern in PARTS if re.search(pattern, sampled))


def main(argv: list[str]) -> None:
    """Profiles the cases asked for and keeps the result beside those of benchmarks.run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(","),
        help="names; default all, and the result is kept",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="a case")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(*args.child[:4], int(args.child[4]))
        return
    known = {case[1] for case in CASES}
    if args.cases is not None and not known.issuperset(args.cases):
        parser.error(f"--cases: expected some of {sorted(known)}, got {args.cases}")
    if shutil.which("perf") is None:
        raise SystemExit("benchmarks.profile needs perf on PATH (Debian: linux-perf)")
    rows = []
    for case in CASES:
        for threads in THREADS if args.cases is None or case[1] in args.cases else ():
            rows.append(sample(*case, threads, args.seconds))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    if args.cases is not None:
        return
    info = run.machine()
    said = {"machine": info, **run.describe_run([], "benchmarks.profile"), "rows": rows}
    path = run.RESULTS / run.slug(info) / "profile.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
