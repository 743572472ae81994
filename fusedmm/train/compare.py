"""The same model twice, ours and standard, stepped in turn: losses, time per step, peak memory.

Taking turns gives both the same machine weather; the first steps warm caches and are not timed.
Left out: compiled models, whose compilation would outlast a run of this size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from fusedmm import problem
from fusedmm.dispatch import select
from fusedmm.train.config import LoopConfig
from fusedmm.train.loop import Stepper, Task

WARMUP_STEPS = 3
STANDARD = "standard"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: loss of each step, median seconds a step, peak bytes of a step; seconds of
    each timed step."""

    name: str
    losses: list[float]
    seconds: float
    peak_bytes: int
    times: list[float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both sides, and how far their loss curves part."""

    ours: Side
    standard: Side
    threads: int
    precision: str

    @property
    def largest_gap(self) -> float:
        """The largest |loss(ours) - loss(standard)| / loss(standard) over all steps."""
        return relative_gap(self.ours.losses, self.standard.losses)

    @property
    def speed_up(self) -> dict[str, float]:
        """Median over steps of seconds(standard) / seconds(ours), the two taken one after the other
        on the same batch, and the order statistics that hold the true median 95 times of 100."""
        pairs = zip(self.ours.times, self.standard.times, strict=True)
        ratios = sorted(standard / ours for ours, standard in pairs) or [float("nan")]
        n = len(ratios)
        low = max(int(n / 2 - 0.98 * n**0.5), 0)
        return {
            "median": statistics.median(ratios),
            "low": ratios[low],
            "high": ratios[n - 1 - low],
        }

    def as_dict(self) -> dict:
        """For metrics.json."""
        derived = {"largest_gap": self.largest_gap, "speed_up": self.speed_up}
        return {**dataclasses.asdict(self), **derived}


def relative_gap(losses: list[float], others: list[float]) -> float:
    """The largest |loss - other| / other over all steps."""
    pairs = zip(losses, others, strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def backend_in_use(op: str) -> str:
    """The backend a plain fp32 call of `op` lands on here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if op == "co_attention":
        t = torch.zeros(1, 1, 2, 32, device=device)
        asked = problem.co_attention(t, t, t, t, t, t, None, None, None, None, None, 0.0)
    elif op == "bi_attention":
        t = torch.zeros(1, 1, 2, 32, device=device)
        asked = problem.bi_attention(t, t, t, t, None, None, None, None, None, 0.0)
    else:
        t = torch.zeros(2, 32, device=device)
        asked = problem.pair_loss(op, t, t, 1.0, None, None, None, True, square=True)
    return select(op, asked, None)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Kineto reports the absence of a GPU on file descriptor 2, whatever the log level."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most tensor memory allocated at once during the call, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare(
    make_task: Callable[[str | None], Task],
    config: LoopConfig,
    *,
    ours: str,
    precision: str,
    on_step: Callable[[int], None] | None = None,
) -> Comparison:
    """Train two copies for `config.compare_steps` steps from the same seed, turn by turn.

    Args:
        make_task: takes None (ours) or "standard", builds the task with the same initial weights.
        ours: name to show for our side, e.g. the backend in use.
        on_step: called with the number of steps both sides have done.
    """
    steppers = [Stepper(make_task(backend), config) for backend in (None, STANDARD)]
    losses: list[list[float]] = [[], []]
    seconds: list[list[float]] = [[], []]
    peaks = [0, 0]

    def turn(i: int, step: int) -> None:
        losses[i].append(steppers[i].step(step)["loss"])

    for step in range(config.compare_steps):
        order = (0, 1) if step % 2 == 0 else (1, 0)
        for i in order:
            # The last warm-up step is the one whose memory is watched: profiling slows it down.
            if step == min(WARMUP_STEPS, config.compare_steps) - 1:
                peaks[i] = peak_bytes(partial(turn, i, step))
                continue
            start = time.perf_counter()
            turn(i, step)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if step >= WARMUP_STEPS or config.compare_steps <= WARMUP_STEPS:
                seconds[i].append(time.perf_counter() - start)
        if on_step is not None:
            on_step(step + 1)
    sides = [
        Side(name, losses[i], statistics.median(seconds[i] or [float("nan")]), peaks[i], seconds[i])
        for i, name in enumerate((ours, STANDARD))
    ]
    return Comparison(*sides, threads=torch.get_num_threads(), precision=precision)


def rounded_standard(
    make_task: Callable[[str | None], Task], config: LoopConfig, precision: str, steps: int
) -> list[float]:
    """Losses of a standard run that differs from another by rounding alone.

    Same seed and batches; its initial weights are rounded to bf16, which its products do anyway, or
    in fp32 are off by one unit in the last place.
    """
    stepper = Stepper(make_task(STANDARD), config)
    with torch.no_grad():
        for p in stepper.learned:
            p.copy_(p.bfloat16() if precision == "bf16" else p * (1 + 2**-23))
    return [stepper.step(i)["loss"] for i in range(steps)]
