"""docs/recipes.md from finished runs: one row a recipe, all figures, ours against standard.

Every run of default settings found in the runs folder is copied to docs/recipes/NAME.json, and the
page is written from those copies alone. Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedmm.models.checkpoint import atomic_path, write_json
from fusedmm.train.config import from_dict
from fusedmm.train.evaluate import Figure

PAIRS = (("text to image", "text_to_image/all"), ("image to text", "image_to_text/all"))
MATCHES = (
    ("matching, random other name", "matching_accuracy_random", "chance", "coin"),
    ("matching, name CLIP confuses", "matching_accuracy_hard", "chance", "coin"),
    ("masked piece, own drawing", "masked_accuracy_own_drawing", "masked_accuracy_chance",
     "commonest piece"),
)  # fmt: skip
ABOUT = {
    "clip": "two towers under symmetric InfoNCE on OpenMoji",
    "vilbert": "two streams with co-attention: masked words and matching on OpenMoji",
}


def figures_of(metrics: dict[str, Any]) -> list[Figure]:
    """The figures of any run, the one that stands for it first."""
    if "figures" in metrics:
        return [Figure(**f) for f in metrics["figures"]]
    if "retrieval" in metrics:
        rows = ((name, metrics["retrieval"][key]) for name, key in PAIRS)
        return [
            Figure(f"{name}, R@10", r["recall_at_10"], r["chance_recall_at_10"], "random order",
                   r["count"])
            for name, r in rows
        ]  # fmt: skip
    m = metrics["matching"]
    return [
        Figure(name, m[key], m[chance], what, m["count"]) for name, key, chance, what in MATCHES
    ]


def is_default(folder: Path, name: str, settings: Callable[[str], type]) -> bool:
    """True where the run in `folder` has the recipe's own settings; how many steps were compared
    with standard decides no figure."""
    given = json.loads((folder / "config.json").read_text())["recipe"]
    cls = settings(name)

    def plain(recipe: Any) -> Any:
        loop = dataclasses.replace(recipe.loop, compare_steps=0)
        return dataclasses.replace(recipe, loop=loop)

    return plain(from_dict(cls, given)) == plain(cls())


def collect(
    runs: Path, store: Path, recipes: list[str], settings: Callable[[str], type]
) -> list[str]:
    """Copy the metrics of finished default runs into `store`; returns the names copied."""
    out = []
    for name in recipes:
        path = runs / name / "metrics.json"
        if path.exists() and is_default(path.parent, name, settings):
            metrics = json.loads(path.read_text())
            kept = {k: v for k, v in metrics.items() if k not in ("key", "matching_untrained")}
            write_json(store / f"{name}.json", kept)
            out.append(name)
    return out


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def command_of(metrics: dict[str, Any]) -> str:
    """What trains this recipe anew, with the ones it starts from."""
    needs = metrics.get("needs", ["clip"] if metrics["recipe"] == "vilbert" else [])
    return ", then ".join(
        f"`python -m fusedmm train {name}`" for name in [*needs, metrics["recipe"]]
    )


def recipe_table(all_metrics: dict[str, dict[str, Any]]) -> str:
    """One row a recipe: its first figure beside chance, time, command."""
    rows = []
    for name, metrics in all_metrics.items():
        f = figures_of(metrics)[0]
        rows.append([
            name, metrics.get("about") or ABOUT[name], f.name, f"**{f.shown(f.value)}**",
            f"{f.shown(f.chance)} ({f.chance_is})", f"{metrics['steps']}",
            f"{metrics['train_seconds']:.0f} s", command_of(metrics),
        ])  # fmt: skip
    header = ["recipe", "what it is", "held-out figure", "measured", "chance", "steps",
              "training", "command"]  # fmt: skip
    return _markdown(header, rows)


def figure_table(all_metrics: dict[str, dict[str, Any]]) -> str:
    """Every figure of every recipe."""
    rows = [
        [name, f.name, f"{f.shown(f.value)}", f"{f.shown(f.chance)} ({f.chance_is})", str(f.count)]
        for name, metrics in all_metrics.items()
        for f in figures_of(metrics)
    ]
    return _markdown(["recipe", "figure", "measured", "chance", "of"], rows)


def speed_up(comparison: dict[str, Any]) -> tuple[float, str]:
    """The ratio and its text: of pairs of steps with their 95 % interval, or of the two medians
    where a run kept no times of single steps."""
    pairs = comparison.get("speed_up")
    if pairs is None:
        ratio = comparison["standard"]["seconds"] / comparison["ours"]["seconds"]
        return ratio, f"{ratio:.2f}"
    return pairs["median"], f"{pairs['median']:.2f} ({pairs['low']:.2f}-{pairs['high']:.2f})"


def comparison_table(comparisons: dict[str, dict[str, Any]]) -> str:
    """Ours and standard, a step; the last row is the geometric mean of the ratios. How far a
    standard run parts from itself by rounding is there where it was measured."""
    rows, ratios = [], []
    noise = any("rounding_noise" in c for c in comparisons.values())
    for name, c in comparisons.items():
        ours, standard = c["ours"], c["standard"]
        ratio, text = speed_up(c)
        ratios.append(ratio)
        rows.append([
            name, c["op"], f"{1e3 * ours['seconds']:.1f}", f"{1e3 * standard['seconds']:.1f}",
            text, f"{ours['peak_bytes'] / 2**20:.1f}",
            f"{standard['peak_bytes'] / 2**20:.1f}", f"{c['largest_gap']:.1e}",
        ])  # fmt: skip
        if noise:
            rows[-1].append(f"{c['rounding_noise']:.1e}" if "rounding_noise" in c else "")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    rows.append(["geometric mean", "", "", "", f"**{mean:.2f}**", *[""] * (3 + noise)])
    header = ["recipe", "op", "ours, ms a step", "standard, ms", "speed-up", "ours, peak MiB",
              "standard, peak MiB", "loss curves part by"]  # fmt: skip
    return _markdown(header + ["standard's by rounding"] * noise, rows)


def machine_line(metrics: dict[str, Any]) -> str:
    """What it was measured on."""
    m = metrics["machine"]
    return f"{m['device']}, {m['cpu_capability']}, threads: {m['threads']}, torch {m['torch']}"


def fill(page: Path, parts: dict[str, str]) -> None:
    """Replace what stands between `<!-- recipes:NAME -->` and its closing mark.

    Raises: ValueError, the page lacks a mark.
    """
    text = page.read_text()
    for name, part in parts.items():
        pattern = re.compile(
            rf"(<!-- recipes:{name} -->\n).*?(<!-- /recipes:{name} -->)", re.DOTALL
        )
        if not pattern.search(text):
            raise ValueError(f"table: {page}: expected the mark recipes:{name}, got none")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
    with atomic_path(page) as tmp:
        tmp.write_text(text)


def write_page(page: Path, store: Path, recipes: list[str]) -> None:
    """Fill docs/recipes.md from the copies in `store`."""
    all_metrics = {
        name: json.loads((store / f"{name}.json").read_text())
        for name in recipes
        if (store / f"{name}.json").exists()
    }
    machines = sorted({machine_line(m) for m in all_metrics.values()})
    parts = {
        "table": recipe_table(all_metrics),
        "machine": "\n".join(f"- {line}" for line in machines),
        "figures": figure_table(all_metrics),
    }
    compared = {n: m["comparison"] for n, m in all_metrics.items() if m.get("comparison")}
    if compared:
        parts["compared"] = comparison_table(compared)
    end_to_end = store / "end_to_end.json"
    if end_to_end.exists():
        kept = json.loads(end_to_end.read_text())
        parts["end_to_end"] = (
            f"{machine_line(kept)}\n\n{comparison_table(kept['comparisons'])}\n\n"
            "![loss curves and ratios](recipes/end_to_end.png)"
        )
    fill(page, parts)
