"""The main job: both recipes on OpenMoji, the tables in the terminal, the report beside the models.

    runs/<name>/clip, runs/<name>/vilbert, runs/<name>/metrics.json, runs/<name>/report.html

Finished parts are reused, an unfinished one goes on from its last checkpoint. Left out: other data.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusedmm.models import load
from fusedmm.models.checkpoint import atomic_path, write_json
from fusedmm.train import console
from fusedmm.train.clip import ClipRecipe
from fusedmm.train.loop import device, fingerprint, read_log
from fusedmm.train.recipes import Metrics, load_data, run_clip, run_vilbert
from fusedmm.train.report import DIRECTIONS, Inputs, render_report
from fusedmm.train.search import read_index, write_index
from fusedmm.train.vilbert import ViLBERTRecipe

CHANCE_LIFT = 10.0


@dataclass(frozen=True)
class Job:
    """The settings of the main job."""

    clip: ClipRecipe = field(default_factory=ClipRecipe)
    vilbert: ViLBERTRecipe = field(default_factory=ViLBERTRecipe)


def run(job: Job, *, root: Path, name: str, cache_dir: Path, fresh: bool = False) -> Metrics:
    """Do what of the job is not done yet and show the result.

    Returns: the metrics of both recipes.
    Raises: Interrupted, on Ctrl-C. ValueError, bad settings or a folder of other ones.
    """
    start = time.perf_counter()
    folder = root / name
    if job.clip.limit != job.vilbert.limit:
        raise ValueError(
            f"run: vilbert.limit: expected {job.clip.limit} to match clip.limit, "
            f"got {job.vilbert.limit}"
        )
    for part, recipe in (("clip", job.clip), ("vilbert", job.vilbert)):
        if not recipe.loop.compare_steps:
            raise ValueError(
                f"run: {part}.loop.compare_steps: expected at least 1 for the report, got 0"
            )
    data = load_data(cache_dir, job.clip.limit, job.clip.model.image_size)
    clip = run_clip(job.clip, data, folder / "clip", fresh=fresh)
    vilbert = run_vilbert(job.vilbert, data, folder / "clip", folder / "vilbert", fresh=fresh)
    metrics = {"key": fingerprint([clip["key"], vilbert["key"]]), "clip": clip, "vilbert": vilbert}
    report = folder / "report.html"
    if fresh or not _is_current(folder, metrics["key"], report):
        with console.meter("report", 1) as meter:
            write_report(data, folder, clip, vilbert, precision=job.clip.loop.precision)
            meter.update(1)
        write_json(folder / "metrics.json", metrics)
    show(clip, vilbert)
    console.say(f"report: {report}")
    console.say(f"models: fusedmm.models.load({str(folder / 'clip')!r}), {folder / 'vilbert'}")
    console.say('search: python -m fusedmm search "a red fruit"')
    console.say(f"done in {time.perf_counter() - start:.0f} s")
    return metrics


def _is_current(folder: Path, key: str, report: Path) -> bool:
    path = folder / "metrics.json"
    return report.exists() and path.exists() and f'"key": "{key}"' in path.read_text()


def write_report(
    data: Any, folder: Path, clip: Metrics, vilbert: Metrics, *, precision: str
) -> Path:
    """Write report.html of the two trained models in `folder` and the search index it shows."""
    clip_model, tokenizer, config = load(folder / "clip")
    vilbert_model = load(folder / "vilbert").model
    clip_model.to(device())
    vilbert_model.to(device())
    index = read_index(folder / "clip", config["key"], len(data))
    if index is None:
        index = write_index(folder / "clip", config["key"], clip_model, tokenizer, data)
    page = render_report(
        Inputs(
            title="fusedmm: CLIP and ViLBERT on OpenMoji",
            data=data,
            tokenizer=tokenizer,
            clip=clip_model,
            vilbert=vilbert_model,
            clip_metrics=clip,
            vilbert_metrics=vilbert,
            clip_log=read_log(folder / "clip" / "log.jsonl"),
            vilbert_log=read_log(folder / "vilbert" / "log.jsonl"),
            precision=precision,
        ),
        index,
    )
    path = folder / "report.html"
    with atomic_path(path) as tmp:
        tmp.write_text(page, encoding="utf-8")
    return path


def show_retrieval(retrieval: dict[str, dict[str, float]]) -> None:
    """CLIP's figures as a table, chance beside each."""
    rows = []
    for key, name in DIRECTIONS.items():
        r = retrieval[key]
        row = [f"{name} ({r['count']})"]
        for k in (1, 5, 10):
            row.append(f"{100 * r[f'recall_at_{k}']:.1f} / {100 * r[f'chance_recall_at_{k}']:.1f}")
        row.append(f"{r['recall_at_10'] / r['chance_recall_at_10']:.1f}x")
        row.append(f"{r['median_rank']:g} / {r['chance_median_rank']:g}")
        rows.append(row)
    header = ("CLIP, held out: found / chance", "R@1 %", "R@5 %", "R@10 %", "over chance",
              "median rank")  # fmt: skip
    console.table("Retrieval", header, rows)


def show_bases(figures: dict[str, dict[str, float]]) -> None:
    """Figures where any row of the base is right, and zero-shot accuracy, as tables."""
    names = {"recall": "R", "precision": "P"}
    cuts = [(name, k) for name in names for k in (1, 5, 10)]
    header = ("any of the base", *(f"{names[name]}@{k} %" for name, k in cuts), "mAP %", "median")
    rows = []
    for way in ("text_to_image", "image_to_text"):
        r = figures[way]
        found = [f"{100 * r[f'{name}@{k}']:.1f}" for name, k in cuts]
        rows.append(
            (way.replace("_", " "), *found, f"{100 * r['map']:.1f}", f"{r['median_rank']:g}")
        )
    console.table("Retrieval by base", header, rows)
    r = figures["zero_shot"]
    found = [f"{100 * r[f'accuracy@{k}']:.1f} / {100 * r[f'chance@{k}']:.1f}" for k in (1, 5, 10)]
    header = ("class of a drawing: found / chance", "top 1 %", "top 5 %", "top 10 %")
    console.table("Zero-shot classification", header, [("base", *found)])


def show_matching(figures: dict[str, float]) -> None:
    """ViLBERT's figures as a table, chance beside each."""
    rows = [
        (label, f"{100 * figures[key]:.1f}", f"{100 * figures[chance]:.1f}")
        for label, key, chance in (
            ("matching, random other name", "matching_accuracy_random", "chance"),
            ("matching, name CLIP confuses", "matching_accuracy_hard", "chance"),
            ("masked piece, own drawing", "masked_accuracy_own_drawing", "masked_accuracy_chance"),
            ("masked piece, another drawing", "masked_accuracy_another_drawing",
             "masked_accuracy_chance"),
        )
    ]  # fmt: skip
    console.table("Matching and masked words", ("ViLBERT, held out", "right %", "chance %"), rows)


def show(clip: Metrics, vilbert: Metrics) -> None:
    """All tables of the job."""
    show_retrieval(clip["retrieval"])
    show_matching(vilbert["matching"])
    rows = []
    for name, metrics in (("CLIP", clip), ("ViLBERT", vilbert)):
        c = metrics["comparison"]
        ours, standard = c["ours"], c["standard"]
        rows.append(
            (
                f"{name} ({c['op']}, {ours['name']})",
                f"{1e3 * ours['seconds']:.1f} / {1e3 * standard['seconds']:.1f}",
                f"{ours['peak_bytes'] / 2**20:.1f} / {standard['peak_bytes'] / 2**20:.1f}",
                f"{c['largest_gap']:.1e}",
            )
        )
    header = ("ours / standard, a training step", "ms", "peak MiB", "loss curves part by")
    console.table("Against standard attention and loss", header, rows)
    lifts = [
        clip["retrieval"][f"{way}/all"]["recall_at_10"]
        / clip["retrieval"][f"{way}/all"]["chance_recall_at_10"]
        for way in ("text_to_image", "image_to_text")
    ]
    verdict = "reached" if min(lifts) >= CHANCE_LIFT else "MISSED"
    console.say(
        f"R@10 at least {CHANCE_LIFT:g} times chance both ways: {verdict} "
        f"({lifts[0]:.1f}x, {lifts[1]:.1f}x)"
    )


def settings(job: Job) -> dict[str, Any]:
    """All settings by name."""
    return asdict(job)
