"""From a system's name and settings to a finished folder: train, compare, judge, save, report.

    runs/<name>/model.safetensors, metrics.json, log.jsonl, report.html

A finished folder is reused, an unfinished one goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fusedmm.models import save
from fusedmm.models.checkpoint import atomic_path
from fusedmm.train import console, parallel
from fusedmm.train.loop import fingerprint
from fusedmm.train.recipes import (
    Metrics,
    compare_with_bar,
    finish_run,
    machine,
    start_run,
    train_with_bar,
)
from fusedmm.train.systems import load_system
from fusedmm.train.systems.base import Figure, Sources
from fusedmm.train.systems.report import render_report


def settings_key(name: str, recipe: Any, sources: Sources) -> str:
    """A digest of all that decides the numbers: the recipe and the models it starts from."""
    needs = {need: sources.trained(need).config["key"] for need in load_system(name).needs}
    settings = {"name": name, "recipe": dataclasses.asdict(recipe), "needs": needs}
    return fingerprint(settings | ({"own": str(sources.own)} if sources.own else {}))


def run_system(
    name: str, recipe: Any, sources: Sources, run_dir: Path, *, fresh: bool = False
) -> Metrics:
    """Train and judge the system in `run_dir`, or return the metrics that are there.

    Under torchrun all processes train, and the first one does the rest; the others return {}.

    Raises: Interrupted, on Ctrl-C. FileNotFoundError, a model it starts from is missing.
        ValueError, the folder holds a run of other settings.
    """
    cls = load_system(name)
    key = settings_key(name, recipe, sources)
    if (metrics := start_run(run_dir, key, fresh)) is not None:
        return metrics
    start = time.perf_counter()
    system = cls(recipe, sources)
    rows = train_with_bar(name, system, recipe.loop, run_dir, key)
    if parallel.rank():
        return {}
    save(run_dir, system.model, system.tokenizer, recipe=dataclasses.asdict(recipe), key=key)
    comparison = None
    if cls.op is not None:
        comparison = compare_with_bar(
            name, cls.op, lambda backend: cls(recipe, sources, backend), recipe.loop, run_dir, key
        )
    figures = system.evaluate()
    learned = sum(p.numel() for p in system.model.parameters() if p.requires_grad)
    metrics = {
        "key": key,
        "recipe": name,
        "about": cls.about,
        "default": recipe == cls.Recipe() and sources.own is None,
        "needs": list(cls.needs),
        "steps": recipe.loop.steps,
        "final_loss": rows[-1]["loss"],
        "train_seconds": sum(row["seconds"] for row in rows),
        "seconds": time.perf_counter() - start,
        "parameters": learned,
        "figures": [figure.as_dict() for figure in figures],
        "comparison": comparison,
        "machine": machine(),
    }
    with atomic_path(run_dir / "report.html") as tmp:
        tmp.write_text(render_report(metrics, rows, system.gallery()), encoding="utf-8")
    return finish_run(run_dir, metrics)


def show(metrics: Metrics) -> None:
    """The figures as a table, chance beside each."""
    rows = []
    for figure in (Figure(**f) for f in metrics["figures"]):
        rows.append(
            (
                f"{figure.name} ({figure.count})",
                figure.shown(figure.value),
                f"{figure.shown(figure.chance)} ({figure.chance_is})",
            )
        )
    console.table(metrics["recipe"], ("held out", "measured", "chance"), rows)
