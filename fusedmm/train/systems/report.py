"""The report of one system: figures beside chance, loss curves, held-out examples, in one file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedmm.train.report import STYLE, card, curves, png, table, timing_table
from fusedmm.train.systems.base import Figure, Picture

# Larger pictures than the main report's, as wide as they are.
LARGER = """.row figure { width: auto; max-width: 260px; min-width: 112px; }
.row figure img { width: auto; height: 104px; image-rendering: pixelated; }"""


def outlined(image: Tensor, boxes: Sequence[tuple[tuple[float, ...], str]]) -> Tensor:
    """A copy of [3, H, W] with one-pixel frames at (x, y, w, h) in 0..1, colours "#rrggbb"."""
    out = image.clone()
    height, width = image.shape[1:]
    for (x, y, w, h), colour in boxes:
        rgb = torch.tensor(list(bytes.fromhex(colour[1:]))).view(3, 1) / 255
        x0, x1 = (int(min(max(v, 0.0), 1.0) * (width - 1)) for v in (x, x + w))
        y0, y1 = (int(min(max(v, 0.0), 1.0) * (height - 1)) for v in (y, y + h))
        out[:, [y0, y1], x0 : x1 + 1] = rgb[..., None]
        out[:, y0 : y1 + 1, [x0, x1]] = rgb[..., None]
    return out


def _example(picture: Picture) -> str:
    pixels = outlined(picture.image, picture.boxes)
    rgb = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    frame = {True: "right", False: "", None: ""}[picture.right]
    caption = html.escape(picture.caption)
    return (
        f'<figure class="{frame}"><img src="{png(rgb)}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def render_report(
    metrics: dict[str, Any], log: Sequence[dict[str, float]], gallery: Sequence[Picture]
) -> str:
    """The whole page."""
    figures = [Figure(**f) for f in metrics["figures"]]
    cards = "".join(
        card(f.shown(f.value), f"{html.escape(f.name)}; {f.chance_is}: {f.shown(f.chance)}")
        for f in figures[:4]
    )
    rows = [
        (
            f"{html.escape(f.name)} <small>({f.count})</small>",
            f.shown(f.value),
            f"{f.shown(f.chance)} <small>{html.escape(f.chance_is)}</small>",
        )
        for f in figures
    ]
    comparison, machine = metrics["comparison"], metrics["machine"]
    title = f"fusedmm: {metrics['recipe']}"
    timing = (
        f"<section><h2>Time and memory of a step</h2>"
        f"{timing_table({metrics['recipe']: comparison})}</section>"
        if comparison
        else ""
    )
    examples = "".join(map(_example, gallery))
    examples = (
        f'<section><h2>Held-out examples</h2><p class="soft">Taken at even distances, not chosen; '
        f'framed green where right.</p><div class="row">{examples}</div></section>'
        if gallery
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}
{LARGER}</style></head>
<body><main><h1>{title}</h1>
<p class="soft">{html.escape(metrics["about"])}. {metrics["parameters"]:,} trained parameters,
{metrics["steps"]} steps in {metrics["train_seconds"]:.0f} s.
{html.escape(str(machine["device"]))}, threads: {machine["threads"]}, torch
{html.escape(machine["torch"])}.</p>
<div class="cards">{cards}</div>
<section><h2>Held-out figures</h2>{table(("", "measured", "chance"), rows)}</section>
<section><h2>Loss</h2><img class="plot" alt="loss" src="{curves(log, comparison, "training")}">
</section>
{timing}{examples}
<footer>Made by <code>python -m fusedmm train {metrics["recipe"]}</code>.</footer>
</main></body></html>
"""
