"""Whole training steps, ours against standard, for the recipes in `CASES`: one table, one plot.

Both sides start from the same weights and take turns on the same batches. `clip-4k` holds encodings
fixed and trains the projections alone, so that a batch of 4,096 is all loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedmm
from fusedmm.models.checkpoint import write_json
from fusedmm.models.clip import STANDARD, standard_contrastive_loss
from fusedmm.train import console
from fusedmm.train.clip import ClipRecipe, ClipTask, embed, train_tokenizer
from fusedmm.train.compare import backend_in_use, compare, relative_gap, rounded_standard
from fusedmm.train.config import LoopConfig
from fusedmm.train.loop import Task, device, resolve_precision
from fusedmm.train.recipes import machine
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems import Sources, load_system
from fusedmm.train.table import speed_up
from fusedmm.train.vilbert import ViLBERTRecipe, ViLBERTTask

Case = tuple[str, LoopConfig, Callable[[str | None], Task]]


class Projections(nn.Module):
    """A linear map per modality over encodings that stay as they are."""

    def __init__(self, dim: int, backend: str | None) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(14.3).log())
        self.backend = backend

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Symmetric InfoNCE of [B, D] encodings."""
        x, y, scale = self.image(x).float(), self.text(y).float(), self.logit_scale.exp()
        with torch.autocast(x.device.type, enabled=False):
            if self.backend == STANDARD:
                return standard_contrastive_loss(x, y, scale)
            return fusedmm.contrastive_loss(x, y, scale, normalize=True, backend=self.backend)


class CachedClip:
    """CLIP's loss at a batch of 4,096 on cached encodings of drawings, drawn with replacement."""

    def __init__(self, encodings: tuple[Tensor, Tensor], loop: LoopConfig, backend: str | None):
        self.loop = loop
        self.encodings = tuple(t.to(device()) for t in encodings)
        torch.manual_seed(step_seed(loop.seed, 0, stream=2))
        self.model = Projections(encodings[0].shape[1], backend).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """Loss of this step's rows."""
        g = torch.Generator().manual_seed(step_seed(self.loop.seed, step, stream=3))
        x, y = self.encodings
        rows = torch.randint(len(x), (self.loop.batch_size,), generator=g).to(device())
        return {"loss": self.model.loss(x[rows], y[rows])}


def _clip(sources: Sources, steps: int) -> Case:
    recipe = ClipRecipe()
    data = sources.openmoji(recipe.model.image_size)
    tokenizer = train_tokenizer(data, recipe.model)
    loop = dataclasses.replace(recipe.loop, compare_steps=steps)
    return "contrastive_loss", loop, lambda backend: ClipTask(recipe, data, tokenizer, backend)


def _clip_4k(sources: Sources, steps: int) -> Case:
    clip, tokenizer, config = sources.trained("clip")
    data = sources.openmoji(clip.config.image_size)
    pair = embed(clip.to(device()), tokenizer, data, data.indices("train"), "auto")
    loop = LoopConfig(steps=100, batch_size=4096, compare_steps=steps)
    return "contrastive_loss", loop, lambda backend: CachedClip(pair, loop, backend)


def _vilbert(sources: Sources, steps: int) -> Case:
    clip, tokenizer, _ = sources.trained("clip")
    recipe = ViLBERTRecipe(views=1)
    data = sources.openmoji(clip.config.image_size)
    first = ViLBERTTask(recipe, data, tokenizer, clip.to(device()))
    loop = dataclasses.replace(recipe.loop, compare_steps=steps)

    def make(backend: str | None) -> Task:
        return ViLBERTTask(recipe, data, tokenizer, clip, backend, cached=first.cached)

    return "co_attention", loop, make


def _system(name: str) -> Callable[[Sources, int], Case]:
    def case(sources: Sources, steps: int) -> Case:
        cls = load_system(name)
        recipe = cls.Recipe()
        loop = dataclasses.replace(recipe.loop, compare_steps=steps)
        return cls.op, loop, lambda backend: cls(recipe, sources, backend)

    return case


CASES: dict[str, Callable[[Sources, int], Case]] = {
    "vilbert": _vilbert,
    "clip": _clip,
    "clip-4k": _clip_4k,
    **{name: _system(name) for name in ("vlp", "grounding", "vlap")},
}


def end_to_end(sources: Sources, names: list[str], steps: int) -> dict[str, Any]:
    """Compare these cases; returns what docs/recipes/end_to_end.json holds."""
    out: dict[str, Any] = {}
    for name in names:
        op, loop, make = CASES[name](sources, steps)
        precision = resolve_precision(loop.precision)
        with console.meter(f"{name} against standard", steps) as meter:
            result = compare(
                make, loop, ours=backend_in_use(op), precision=precision, on_step=meter.update
            )
        rounded = rounded_standard(make, loop, precision, steps)
        noise = relative_gap(rounded, result.standard.losses)
        out[name] = {
            "op": op, "batch_size": loop.batch_size, **result.as_dict(),
            "rounded": rounded, "rounding_noise": noise,
        }  # fmt: skip
    return {"machine": machine(), "comparisons": out}


def plot(comparisons: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss curves of both sides, one panel a case; its title tells the ratio of time a step."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 5.6), layout="constrained")
    axes = figure.subplots(2, -(-len(comparisons) // 2)).flatten()
    for axis, (name, c) in zip(axes, comparisons.items(), strict=False):
        steps = range(1, len(c["ours"]["losses"]) + 1)
        axis.plot(
            steps, c["standard"]["losses"], color="#e07b39", lw=5, alpha=0.5, label="standard"
        )
        if "rounded" in c:
            label = "standard, rounded weights"
            axis.plot(steps, c["rounded"], color="#777777", lw=1, ls="--", label=label)
        axis.plot(steps, c["ours"]["losses"], color="#1b6ca8", lw=1.5, label="ours")
        title = f"{name}: {speed_up(c)[1]} times as fast"
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="step", ylabel="loss")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write(store: Path, result: dict[str, Any]) -> None:
    """end_to_end.json and end_to_end.png."""
    write_json(store / "end_to_end.json", result)
    plot(result["comparisons"], store / "end_to_end.png")
