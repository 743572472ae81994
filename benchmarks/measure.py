"""One measurement each: accuracy against fp64, interleaved times, peak memory, saved bytes.

The fp64 truth of a case is kept in .cache/, keyed by what computes it, so that a run spends its
time on timing.
"""

import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fusedmm import testing

from . import cases, peers

ROOT = Path(__file__).parents[1]
# Only ours is held to the bound of the tests; a peer that rounds more often is still timed.
PEER_SLACK = 64.0
MIN_ROUNDS = 3
LONG = 20.0  # seconds; a round that takes this long is timed once


def steps(run: peers.Run, case: testing.Case, mode: str) -> Callable[[], None]:
    """A call without arguments: the forward, or the forward and the backward."""
    if mode == "fwd":
        tensors = list(case.tensors.values())

        def forward() -> None:
            with torch.no_grad():
                run(*tensors)

        return forward
    leaves = list(case.leaves().tensors.values())
    g = torch.Generator().manual_seed(1)
    upstream: list[Tensor] = []

    def both() -> None:
        outputs = run(*leaves)
        if not upstream:
            upstream.extend(
                torch.randn(o.shape, generator=g).to(o) if o.dim() else torch.ones_like(o)
                for o in outputs
            )
        torch.autograd.backward(outputs, upstream)
        for leaf in leaves:
            leaf.grad = None

    return both


def truth(case: cases.BenchCase, dtype: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """fp64 outputs and gradients (kept as fp32), and the largest error allowed for each."""
    source = Path(testing.__file__).read_bytes() + repr((case, torch.__version__, dtype)).encode()
    path = ROOT / ".cache" / "benchmarks" / f"{hashlib.sha256(source).hexdigest()[:24]}.pt"
    if path.exists():
        return torch.load(path, mmap=True)
    data = case.make(dtype, full=False)
    exact = testing.truth(data)
    base = testing.values_and_grads(testing.eager, data)
    limits = {k: testing.bound(k, base[k], want, data) for k, want in exact.items()}
    kept = {k: want.float() for k, want in exact.items()}, limits
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kept, path)
    return kept


def check(run: peers.Run, case: cases.BenchCase, peer: peers.Peer, mode: str, dtype: str) -> str:
    """Why `run` must not be timed, or "" if it is right."""
    want, limits = truth(case, dtype)
    data = peer.lay_out(case.make(dtype, full=False))

    def call(c: testing.Case) -> tuple[Tensor, ...]:
        return run(*c.tensors.values())

    if mode == "fwd":
        with torch.no_grad():
            got = dict(zip(testing.output_names(data), call(data), strict=True))
    else:
        got = testing.values_and_grads(call, data)
    slack = 1.0 if peer.name == "ours" else PEER_SLACK
    for name, value in got.items():
        exact = want[name].to(value.device)
        error, limit = testing.max_error(value, exact), slack * limits[name]
        if not error <= limit:
            return f"{name}: max error {error:.3g}, allowed {limit:.3g}"
    return ""


def interleaved(
    calls: dict[str, Callable[[], None]], seconds: float, each: int = 1
) -> dict[str, list[float]]:
    """Times of each call in seconds, taken in turns of `each` for about `seconds` a call."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    rounds = MIN_ROUNDS if time.perf_counter() - start < LONG else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(calls)
        while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(each):
                    call()
                times[name].append((time.perf_counter() - start) / each)
    finally:
        gc.enable()
    return times


class Others:
    """Share of the machine's cores that other processes used inside the `with` block."""

    share = 0.0

    def __enter__(self) -> "Others":
        self.start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        busy, total, own = (b - a for a, b in zip(self.start, self._read(), strict=True))
        self.share = max(busy - own, 0.0) / total if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        with open("/proc/stat") as f:
            ticks = [int(word) for word in f.readline().split()[1:9]]
        own = os.times()
        rate = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / rate, sum(ticks) / rate, own.user + own.system


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the others do not exceed, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def saved_bytes(run: peers.Run, case: testing.Case) -> int:
    """Bytes of distinct storages kept for backward, the inputs' own left out."""
    leaves = list(case.leaves().tensors.values())
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = run(*leaves)
    del outputs
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(key))


def memory_here(case: cases.BenchCase, peer: peers.Peer, dtype: str, mode: str) -> dict[str, int]:
    """Growth of the resident peak over one call, after one on a tiny shape that loads the code.

    A compiled peer is called once on its own shape first: compiling is not what is measured.
    """
    tiny = next(c for c in cases.CASES[case.op] if c.group == "overhead")
    try:
        warm = peer.make(tiny, mode, 4)
        steps(warm, peer.lay_out(tiny.make(dtype)), mode)()
    except peers.Skip:
        pass
    data = peer.lay_out(case.make(dtype))
    call = steps(peer.make(case, mode, cases.DTYPES[dtype].itemsize), data, mode)
    if peer.name in ("compiled", "flex x2"):
        call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _status("VmRSS")
    call()
    result = {"peak_bytes": max(_status("VmHWM") - before, 0)}
    if mode == "fwdbwd":
        run = peer.make(case, mode, cases.DTYPES[dtype].itemsize)
        result["saved_bytes"] = saved_bytes(run, data)
    return result


def memory(case: cases.BenchCase, peer: str, dtype: str, mode: str, threads: int) -> dict:
    """memory_here in a fresh process; {"skip": reason} if it cannot run."""
    asked = json.dumps([case.op, case.name, peer, dtype, mode, threads])
    command = [sys.executable, "-m", "benchmarks.measure", asked]
    # A large array is returned to the system when freed, as in a long-lived process it may not be.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"skip": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    op, name, peer_name, dtype, mode, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = next(c for c in cases.CASES[op] if c.name == name)
    peer = next(p for p in peers.PEERS if p.name == peer_name)
    sys.stdout.write(json.dumps(memory_here(case, peer, dtype, mode)) + "\n")


if __name__ == "__main__":
    _main()
