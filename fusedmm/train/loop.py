"""The one training loop: AdamW, warm-up and cosine, clipping, bf16, logs, exact resume.

All randomness of a step is seeded from (seed, step), so a checkpoint needs only weights, optimizer
and the step to go on exactly as if never stopped. Several processes average their
gradients, see fusedmm.train.parallel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusedmm.train import parallel
from fusedmm.train.config import LoopConfig
from fusedmm.train.sampling import step_seed

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


class Task(Protocol):
    """What the loop trains: a model, and the loss of a step as a pure function of step and seed."""

    model: nn.Module

    def loss(self, step: int) -> dict[str, Tensor]:
        """Scalars of this step; "loss" is the one that is minimised."""
        ...


class Interrupted(Exception):
    """Training stopped on request, with its state saved; `step` is the first one not done."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped before step {step}; the state is in {folder}")
        self.step = step


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """ "auto" is bf16 where the hardware multiplies it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(precision: str) -> torch.autocast:
    """bf16 autocast for this machine, or a context that does nothing."""
    enabled = resolve_precision(precision) == "bf16"
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=enabled)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then a cosine from lr to min_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW; vectors, scalars and embeddings of positions do not decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


class Stepper:
    """One optimizer step after another; the loop and the comparison share it."""

    def __init__(self, task: Task, config: LoopConfig) -> None:
        self.task = task
        self.config = config
        self.optimizer = make_optimizer(task.model, config)
        self.learned = [p for p in task.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.learned] if config.ema else []

    def averaged(self, values: dict[str, float]) -> dict[str, float]:
        """Average gradients and scalars over the processes, if there are several."""
        if parallel.world() == 1:
            return values
        for p in self.learned:  # what a batch did not touch counts as zero
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        numbers = torch.tensor(list(values.values()), device=device())
        parallel.average([*(p.grad for p in self.learned), numbers])
        return dict(zip(values, numbers.tolist(), strict=True))

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the running mean of the weights in their place, if one is kept."""
        for p, mean in zip(self.learned, self.average, strict=False):
            p.copy_(mean)

    def step(self, step: int) -> dict[str, float]:
        """Do step number `step`; returns its scalars and the gradient norm.

        Raises: FloatingPointError, the loss is not finite.
        """
        config = self.config
        self.task.model.train()
        torch.manual_seed(step_seed(config.seed, step * parallel.world() + parallel.rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        values: dict[str, float] = {}
        for part in range(config.accumulate):
            batch = (step * config.accumulate + part) * parallel.world() + parallel.rank()
            with autocast(config.precision):
                scalars = self.task.loss(batch)
            (scalars["loss"] / config.accumulate).backward()
            for name, value in scalars.items():
                values[name] = values.get(name, 0.0) + float(value.detach()) / config.accumulate
        values = self.averaged(values)
        norm = nn.utils.clip_grad_norm_(self.learned, config.grad_clip)
        if not (math.isfinite(values["loss"]) and math.isfinite(float(norm))):
            raise FloatingPointError(
                f"train: step {step}: expected a finite loss, got {values['loss']} "
                f"(gradient norm {float(norm)}); lower loop.lr or use loop.precision fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(self.average, self.learned, 1 - config.ema)
        return {**values, "grad_norm": float(norm)}


# Settings that decide nothing while they are off: a run from before they existed stays valid.
_OFF = {"accumulate": 1, "ema": 0.0}
_SILENT = ("tensorboard",)


def _deciding(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {
            name: _deciding(value)
            for name, value in settings.items()
            if name not in _SILENT and not (name in _OFF and value == _OFF[name])
        }
    return [_deciding(v) for v in settings] if isinstance(settings, (list, tuple)) else settings


def fingerprint(settings: Any) -> str:
    """A digest of everything that decides a run's numbers; other checkpoints are refused."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    settings = _deciding(settings)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Checkpoints:
    """Numbered checkpoints of one run; each folder appears under its name only when complete."""

    folder: Path
    key: str

    def save(self, step: int, stepper: Stepper) -> None:
        """Write the state before step number `step`."""
        target = self.folder / f"{step:07d}"
        if parallel.rank() or target.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(dir=self.folder, prefix=".writing-"))
        try:
            weights = {k: v.contiguous() for k, v in stepper.task.model.state_dict().items()}
            save_file(weights, tmp / "model.safetensors")
            state = {
                "step": step,
                "key": self.key,
                "optimizer": stepper.optimizer.state_dict(),
                "average": stepper.average,
                "rng": torch.get_rng_state(),
            }
            torch.save(state, tmp / "state.pt")
            for path in tmp.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            os.rename(tmp, target)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        for old in self.numbered()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def numbered(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit())

    def restore(self, stepper: Stepper) -> int:
        """Load the newest readable checkpoint; returns the step to go on with, 0 without one.

        Raises: ValueError, the checkpoint belongs to other settings.
        """
        for path in reversed(self.numbered()):
            try:
                weights = load_file(path / "model.safetensors")
                state = torch.load(path / "state.pt", weights_only=True)
                step, key, optimizer = state["step"], state["key"], state["optimizer"]
            except (
                SafetensorError,
                OSError,
                RuntimeError,
                KeyError,
                EOFError,
                ValueError,
            ) as error:
                log.warning("train: %s is damaged (%s); trying an older one", path, error)
                continue
            except Exception as error:  # torch.load raises pickle errors of many kinds
                log.warning("train: %s is damaged (%r); trying an older one", path, error)
                continue
            if key != self.key:
                raise ValueError(
                    f"train: {path}: expected a checkpoint of these settings ({self.key}), got one "
                    f"of others ({key}); pass --fresh to start over or choose another --name"
                )
            stepper.task.model.load_state_dict(weights)
            stepper.optimizer.load_state_dict(optimizer)
            with torch.no_grad():
                for mean, kept in zip(stepper.average, state.get("average", ()), strict=True):
                    mean.copy_(kept)
            torch.set_rng_state(state["rng"])
            return step
        return 0

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or SIGTERM) sets a flag that the loop reads between steps; a second is immediate."""
    asked = False

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for signum, previous in old.items():
            signal.signal(signum, previous)


def read_log(path: Path, before: int | None = None) -> list[dict[str, float]]:
    """Lines of a JSONL log, those of steps below `before`; a torn last line is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if before is None or row["step"] < before:
                rows.append(row)
    return rows


@contextlib.contextmanager
def scalar_writer(run_dir: Path, first: int, on: bool) -> Iterator[Callable[[dict], None]]:
    """A function that sends a row of the log to TensorBoard, or does nothing.

    Raises: ModuleNotFoundError, it is asked for and tensorboard is not installed.
    """
    if not on:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train: loop.tensorboard: tensorboard is not installed; pip install tensorboard"
        ) from error
    with SummaryWriter(run_dir / "tensorboard", purge_step=first) as writer:

        def write(row: dict) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        yield write


def train(
    task: Task,
    config: LoopConfig,
    run_dir: str | Path,
    *,
    key: str,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train to `config.steps`, going on from the last checkpoint in `run_dir` if there is one.

    Args:
        task: model and loss; its weights are trained in place.
        config: the loop's settings.
        run_dir: gets `log.jsonl` and `checkpoints/`.
        key: fingerprint of all settings; a checkpoint under another key is refused.
        on_step: called with (steps done, scalars of the last).
    Returns: one dict a step, those before a resume included.
    Raises: Interrupted, on Ctrl-C, after saving. ValueError, checkpoint of other settings.
        FloatingPointError, the loss is not finite.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stepper = Stepper(task, config)
    checkpoints = Checkpoints(run_dir / "checkpoints", key)
    first = checkpoints.restore(stepper)
    log_path = run_dir / "log.jsonl"
    rows = read_log(log_path, before=first)
    parallel.wait()
    if parallel.rank():
        log_path = Path(os.devnull)
    else:
        log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        stop_on_interrupt() as asked,
        open(log_path, "a", buffering=1) as file,
        scalar_writer(run_dir, first, config.tensorboard and not parallel.rank()) as write_scalars,
    ):
        for step in range(first, config.steps):
            start = time.perf_counter()
            row = {"step": step, **stepper.step(step)}
            row["seconds"] = round(time.perf_counter() - start, 6)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            write_scalars(row)
            if on_step is not None:
                on_step(step + 1, row)
            if parallel.agree(asked()):
                checkpoints.save(step + 1, stepper)
                raise Interrupted(step + 1, checkpoints.folder)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                checkpoints.save(step + 1, stepper)
    stepper.use_average()
    return rows
