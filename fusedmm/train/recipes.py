"""From settings to a finished run folder: train, compare with standard, evaluate, save; once.

A folder whose metrics.json bears the key of the same settings is reused as it is. Left out: the
report, which reads what is written here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedmm.models import load, save
from fusedmm.models.checkpoint import write_json
from fusedmm.train import console, parallel
from fusedmm.train.captions import load_captions
from fusedmm.train.clip import ClipRecipe, ClipTask, evaluate_clip, train_tokenizer
from fusedmm.train.compare import backend_in_use, compare
from fusedmm.train.config import LoopConfig
from fusedmm.train.data import OpenMoji
from fusedmm.train.loop import Checkpoints, Task, fingerprint, resolve_precision, train
from fusedmm.train.vilbert import (
    ViLBERTRecipe,
    ViLBERTTask,
    build_vilbert,
    evaluate_vilbert,
    recipe_settings,
)

log = logging.getLogger(__name__)

Metrics = dict[str, Any]


def load_data(cache_dir: Path, limit: int | None, size: int, own: Path | None = None) -> OpenMoji:
    """The drawings, or pictures with captions from `own`; a bar if they have to be made."""
    bar: list[tuple[Any, console.Meter]] = []

    def on_progress(done: int, total: int) -> None:
        if not bar:
            context = console.meter("render OpenMoji" if own is None else "decode pictures", total)
            bar.append((context, context.__enter__()))
        bar[0][1].update(done)

    try:
        if own is not None:
            return load_captions(own, cache_dir, size=size, limit=limit, on_progress=on_progress)
        return OpenMoji.load(cache_dir, size=size, limit=limit, on_progress=on_progress)
    finally:
        for context, _ in bar:
            context.__exit__(None, None, None)


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_metrics(run_dir: Path, key: str) -> Metrics | None:
    """The metrics of a finished run of these settings, None if there is none yet.

    Raises: ValueError, the folder holds a run of other settings.
    """
    path = run_dir / "metrics.json"
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text())
        found = metrics["key"]
    except (json.JSONDecodeError, KeyError):
        log.warning("%s is damaged; finishing the run again", path)
        return None
    if found != key:
        raise ValueError(
            f"train: {run_dir}: expected a run of these settings ({key}), got one of others "
            f"({found}); pass --fresh to start over or choose another --name"
        )
    return metrics


def train_with_bar(
    name: str, task: Task, loop: LoopConfig, run_dir: Path, key: str
) -> list[dict[str, float]]:
    """Train to the end, from the last checkpoint if there is one; one dict a step."""
    total = loop.steps
    done = Checkpoints(run_dir / "checkpoints", key).numbered()
    if done:
        console.say(f"{name}: going on from step {int(done[-1].name)} of {total}")
    with console.meter(f"train {name}", total) as meter:
        return train(
            task,
            loop,
            run_dir,
            key=key,
            on_step=lambda step, row: meter.update(step, f"loss {row['loss']:.3f}"),
        )


def compare_with_bar(
    name: str,
    op: str,
    make_task: Callable[[str | None], Task],
    loop: LoopConfig,
    run_dir: Path,
    key: str,
) -> dict[str, Any] | None:
    """The comparison, kept in comparison.json so that an interrupted job does not repeat it; None
    where no steps are to be compared."""
    if not loop.compare_steps:
        return None
    path = run_dir / "comparison.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept
    with console.meter(f"{name} against standard", loop.compare_steps) as meter:
        result = compare(
            make_task,
            loop,
            ours=backend_in_use(op),
            precision=resolve_precision(loop.precision),
            on_step=meter.update,
        )
    out = {"key": key, "op": op, **result.as_dict()}
    write_json(path, out)
    return out


def start_run(run_dir: Path, key: str, fresh: bool) -> Metrics | None:
    """The metrics of a run finished before, or None with the folder ready to go on or begin."""
    if fresh and run_dir.exists() and not parallel.rank():
        shutil.rmtree(run_dir)
    parallel.wait()
    metrics = read_metrics(run_dir, key)
    if metrics is not None:
        console.say(f"{run_dir}: finished before, used as it is")
    return metrics


def finish_run(run_dir: Path, metrics: Metrics) -> Metrics:
    """Write the metrics, which makes the run finished, and drop its checkpoints."""
    write_json(run_dir / "metrics.json", metrics)
    Checkpoints(run_dir / "checkpoints", metrics["key"]).clear()
    return metrics


def run_clip(recipe: ClipRecipe, data: OpenMoji, run_dir: Path, *, fresh: bool = False) -> Metrics:
    """Train and evaluate CLIP in `run_dir`, or return the metrics that are there.

    Raises: Interrupted, on Ctrl-C. ValueError, the folder holds a run of other settings.
    """
    key = fingerprint([dataclasses.asdict(recipe), data.source] if data.source else recipe)
    if (metrics := start_run(run_dir, key, fresh)) is not None:
        return metrics
    start = time.perf_counter()
    precision = recipe.loop.precision
    tokenizer = train_tokenizer(data, recipe.model)
    task = ClipTask(recipe, data, tokenizer)
    rows = train_with_bar("clip", task, recipe.loop, run_dir, key)
    if parallel.rank():
        return {}
    save(run_dir, task.model, tokenizer, recipe=dataclasses.asdict(recipe), key=key)
    comparison = compare_with_bar(
        "clip", "contrastive_loss",
        lambda backend: ClipTask(recipe, data, tokenizer, backend), recipe.loop, run_dir, key,
    )  # fmt: skip
    figures = evaluate_clip(task.model, tokenizer, data, "test", precision)
    return finish_run(
        run_dir,
        {
            "key": key,
            "recipe": "clip",
            "steps": recipe.loop.steps,
            "final_loss": rows[-1]["loss"],
            "train_seconds": sum(row["seconds"] for row in rows),
            "seconds": time.perf_counter() - start,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "retrieval": {name: r.as_dict() for name, r in figures.items()},
            "comparison": comparison,
            "machine": machine(),
        },
    )


def run_vilbert(
    recipe: ViLBERTRecipe,
    data: OpenMoji,
    clip_dir: Path,
    run_dir: Path,
    *,
    fresh: bool = False,
) -> Metrics:
    """Train and evaluate ViLBERT in `run_dir` on top of the CLIP in `clip_dir`.

    Raises: Interrupted, on Ctrl-C. FileNotFoundError, no CLIP there. ValueError, the folder holds a
        run of other settings.
    """
    clip, tokenizer, clip_config = load(clip_dir)
    settings = recipe_settings(recipe, clip_config["key"])
    key = fingerprint([settings, data.source] if data.source else settings)
    if (metrics := start_run(run_dir, key, fresh)) is not None:
        return metrics
    start = time.perf_counter()
    precision = recipe.loop.precision
    total = recipe.views * len(data.indices("train"))
    with console.meter("region features", total) as meter:
        task = ViLBERTTask(recipe, data, tokenizer, clip, on_progress=meter.update)
    rows = train_with_bar("vilbert", task, recipe.loop, run_dir, key)
    if parallel.rank():
        return {}
    save(run_dir, task.model, tokenizer, recipe=dataclasses.asdict(recipe), key=key)
    comparison = compare_with_bar(
        "vilbert",
        "co_attention",
        lambda backend: ViLBERTTask(recipe, data, tokenizer, clip, backend, cached=task.cached),
        recipe.loop,
        run_dir,
        key,
    )
    untrained = build_vilbert(recipe, clip, tokenizer)
    figures = {
        name: evaluate_vilbert(model, clip, tokenizer, data, "test", precision)
        for name, model in (("trained", task.model), ("untrained", untrained))
    }
    return finish_run(
        run_dir,
        {
            "key": key,
            "recipe": "vilbert",
            "steps": recipe.loop.steps,
            "final_loss": rows[-1]["loss"],
            "train_seconds": sum(row["seconds"] for row in rows),
            "seconds": time.perf_counter() - start,
            "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
            "matching": figures["trained"],
            "matching_untrained": figures["untrained"],
            "comparison": comparison,
            "machine": machine(),
        },
    )
