"""The report of a run: one HTML file that needs nothing else, its figures read from metrics.

Curves are SVG by matplotlib, drawings and attention overlays PNG, all inlined. Left out:
interaction.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm import plot
from fusedmm.models import CLIP, Tokenizer, ViLBERT
from fusedmm.train.clip import embed
from fusedmm.train.data import ATTRIBUTION, OpenMoji
from fusedmm.train.loop import autocast, device
from fusedmm.train.vilbert import region_features

OURS, STANDARD, RIGHT = "#1b6ca8", "#e07b39", "#2e8b57"
GALLERY = 12
MAPS = 6
FREE_QUERIES = (
    "a red fruit", "a smiling yellow face", "a woman who works with computers", "blue square",
    "a flag with stars", "an animal that lives in water",
)  # fmt: skip

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6875; --line: #dde3e9; --ours: #1b6ca8;
  --standard: #e07b39; --right: #2e8b57; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  color: var(--ink); background: #f4f6f8; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 0 0 6px; }
h3 { font-size: 16px; margin: 20px 0 6px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 22px 26px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 20px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.card b { display: block; font-size: 28px; line-height: 1.2; color: var(--ours); }
.card span { font-size: 13px; color: var(--soft); display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); } td, th { white-space: nowrap; }
td:first-child, .wrap th { white-space: normal; }
img.plot { width: 100%; display: block; }
.query { display: grid; grid-template-columns: 300px 1fr; align-items: center; gap: 16px;
  border-bottom: 1px solid var(--line); padding: 8px 0; }
.query:last-child { border-bottom: 0; }
.query q { font-weight: 600; quotes: "\\201C" "\\201D"; }
.row { display: flex; gap: 10px; flex-wrap: wrap; }
figure { margin: 0; text-align: center; width: 88px; }
figure img { width: 72px; height: 72px; padding: 3px; border: 3px solid transparent;
  border-radius: 9px; display: block; margin: 0 auto; background: #fff; }
figure.right img { border-color: var(--right); }
figure.missed img { border-color: var(--right); border-style: dashed; opacity: .75; }
figcaption { font-size: 11px; line-height: 1.25; color: var(--soft); overflow-wrap: anywhere; }
.maps { display: flex; gap: 12px; flex-wrap: wrap; margin: 8px 0 18px; }
.maps figure { width: 104px; } .maps figure img { width: 100px; height: 100px; padding: 0;
  border: 1px solid var(--line); border-radius: 6px; }
.maps figcaption { font-size: 13px; color: var(--ink); margin-top: 3px; }
footer { color: var(--soft); font-size: 13px; margin-top: 26px; }
@media (max-width: 760px) { .cards { grid-template-columns: 1fr 1fr; }
  .query { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True)
class Inputs:
    """All a report is made of: the data, both trained models, their metrics and logs."""

    title: str
    data: OpenMoji
    tokenizer: Tokenizer
    clip: CLIP
    vilbert: ViLBERT
    clip_metrics: dict[str, Any]
    vilbert_metrics: dict[str, Any]
    clip_log: Sequence[dict[str, float]]
    vilbert_log: Sequence[dict[str, float]]
    precision: str = "fp32"


def png(rgb: np.ndarray) -> str:
    """[H, W, 3] uint8 -> data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _picture(data: OpenMoji, row: int) -> str:
    return png(data.images[row].permute(1, 2, 0).numpy())


def _svg(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each step."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curves(rows: Sequence[dict[str, float]], comparison: dict[str, Any] | None, what: str) -> str:
    """Left: the whole run. Right, where there is a comparison: its first steps, ours over standard.

    Returns: an SVG as a data URI.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    style = {
        "font.size": 11, "axes.spines.top": False, "svg.hashsalt": "fusedmm",
        "axes.spines.right": False, "svg.fonttype": "path",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.4, 3.5), layout="constrained")
        if comparison is None:
            axes = [figure.subplots()]
        else:
            axes = list(figure.subplots(1, 2, width_ratios=(1.25, 1)))
            _both_sides(axes[1], comparison)
        _whole_run(axes[0], rows, what)
        for axis in axes:
            axis.grid(color="#e6ebf0", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure)


def _whole_run(axis: Any, rows: Sequence[dict[str, float]], what: str) -> None:
    losses = [row["loss"] for row in rows]
    steps = np.arange(1, len(losses) + 1)
    axis.plot(steps, losses, color=OURS, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(losses, 20), color=OURS, linewidth=2, label="ours, mean of 20")
    parts = [n for n in rows[0] if n not in ("step", "loss", "grad_norm", "seconds", "logit_scale")]
    styles = (":", "--", "-.", (0, (1, 3)), (0, (5, 4)), (0, (3, 1, 1, 1)))
    for i, name in enumerate(parts):
        label = {"mlm": "masked words", "itm": "matching"}.get(name, name)
        part = _smooth([row[name] for row in rows], 20)
        axis.plot(steps, part, color="#5b6875", linewidth=1.3, ls=styles[i % 6], label=label)
    axis.set(xlabel="step", ylabel=f"{what} loss", title="whole run")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=9 if len(parts) > 3 else None)


def _both_sides(axis: Any, comparison: dict[str, Any]) -> None:
    ours, standard = comparison["ours"], comparison["standard"]
    steps = np.arange(1, len(ours["losses"]) + 1)
    axis.plot(steps, standard["losses"], color=STANDARD, linewidth=5, alpha=0.55, label="standard")
    label = f"ours ({ours['name']})"
    axis.plot(
        steps, ours["losses"], color=OURS, linewidth=1.6, marker="o", markersize=3, label=label
    )
    gap = comparison["largest_gap"]
    axis.set(xlabel="step", title=f"same seed, largest relative gap {gap:.1e}")
    axis.legend(frameon=False)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NARROW NO-BREAK SPACE}%"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table; cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


DIRECTIONS = {
    "text_to_image/all": "text \N{RIGHTWARDS ARROW} image, all drawings",
    "image_to_text/all": "image \N{RIGHTWARDS ARROW} text, all drawings",
    "text_to_image/bases": "text \N{RIGHTWARDS ARROW} image, one per base",
    "image_to_text/bases": "image \N{RIGHTWARDS ARROW} text, one per base",
}


def _retrieval_table(retrieval: dict[str, dict[str, float]]) -> str:
    rows = []
    for key, name in DIRECTIONS.items():
        r = retrieval[key]
        row = [f"{name} <small>({r['count']})</small>"]
        for k in (1, 5, 10):
            value, chance = r[f"recall_at_{k}"], r[f"chance_recall_at_{k}"]
            row.append(f"{_percent(value)} <small>/ {_percent(chance)}</small>")
        row.append(f"{r['recall_at_10'] / r['chance_recall_at_10']:.1f}\N{MULTIPLICATION SIGN}")
        row.append(f"{r['median_rank']:g} <small>/ {r['chance_median_rank']:g}</small>")
        rows.append(row)
    header = ("measured <small>/ chance</small>", "R@1", "R@5", "R@10", "R@10 over chance",
              "median rank")  # fmt: skip
    return table(header, rows)


def _matching_table(trained: dict[str, float], untrained: dict[str, float]) -> str:
    rows = [
        (
            f"matching, {label}",
            _percent(trained[f"matching_accuracy_{name}"]),
            _percent(untrained[f"matching_accuracy_{name}"]),
            _percent(trained["chance"]),
        )
        for name, label in (
            ("random", "against a random other name"),
            ("hard", "against one of the ten names CLIP confuses most with it"),
        )
    ]
    rows += [
        (
            f"masked piece named right, {label}",
            _percent(trained[f"masked_accuracy_{name}"]),
            _percent(untrained[f"masked_accuracy_{name}"]),
            f"{_percent(trained['masked_accuracy_chance'])} <small>most frequent piece</small>",
        )
        for name, label in (
            ("own_drawing", "seeing its drawing"),
            ("another_drawing", "seeing another drawing"),
        )
    ]
    return table(("held-out drawings", "trained", "untrained", "chance"), rows)


def timing_table(comparisons: dict[str, dict[str, Any]]) -> str:
    """Ours and standard by recipe: time, memory and how far the curves part."""
    rows = []
    for name, c in comparisons.items():
        ours, standard = c["ours"], c["standard"]
        rows.append(
            (
                f"{name} <small>({c['op']}, backend {html.escape(ours['name'])})</small>",
                f"{1e3 * ours['seconds']:.1f} ms",
                f"{1e3 * standard['seconds']:.1f} ms",
                f"{standard['seconds'] / ours['seconds']:.2f}\N{MULTIPLICATION SIGN}",
                f"{ours['peak_bytes'] / 2**20:.1f} MiB",
                f"{standard['peak_bytes'] / 2**20:.1f} MiB",
                f"{c['largest_gap']:.1e}",
            )
        )
    header = ("", "step, ours", "step, standard", "speed-up", "peak, ours", "peak, standard",
              "loss curves part by")  # fmt: skip
    return table(header, rows)


def _figure(data: OpenMoji, row: int, caption: str, kind: str = "") -> str:
    name = html.escape(data.drawings[row].caption)
    return (
        f'<figure class="{kind}"><img src="{_picture(data, row)}" alt="{name}" title="{name}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _spread(rows: list[int], data: OpenMoji, count: int) -> list[int]:
    """`count` of the rows, evenly spread over bases, shortest emoji of each: fixed, not picked."""
    first: dict[str, int] = {}
    for row in sorted(rows, key=lambda i: (len(data.drawings[i].emoji), i)):
        first.setdefault(data.drawings[row].base, row)
    bases = sorted(first.values())
    count = min(count, len(bases))
    return [bases[(2 * i + 1) * len(bases) // (2 * count)] for i in range(count)]


def _gallery(inputs: Inputs, rows: list[int], images: Tensor, texts: Tensor) -> str:
    """Held-out names, each with its five nearest held-out drawings; the right one framed."""
    data = inputs.data
    place = {row: i for i, row in enumerate(rows)}
    out = []
    for row in _spread(rows, data, GALLERY):
        scores = images @ texts[place[row]]
        order = scores.argsort(descending=True).tolist()
        rank = 1 + order.index(place[row])
        best = [rows[i] for i in order[:5]]
        cells = [
            _figure(data, b, data.drawings[b].caption, "right" if b == row else "") for b in best
        ]
        if row not in best:
            cells.append(_figure(data, row, f"right one, rank {rank}", "missed"))
        query = html.escape(data.drawings[row].caption)
        out.append(
            f'<div class="query"><div><q>{query}</q><br><span class="soft">rank {rank} of '
            f'{len(rows)}</span></div><div class="row">{"".join(cells)}</div></div>'
        )
    return "".join(out)


@torch.no_grad()
def _free_gallery(inputs: Inputs, index: Tensor) -> str:
    """Free words against every drawing, training ones included."""
    data, clip = inputs.data, inputs.clip
    tokens = inputs.tokenizer.encode(FREE_QUERIES).to(device())
    texts = F.normalize(clip.encode_text(tokens), dim=-1).float().cpu()
    out = []
    for query, text in zip(FREE_QUERIES, texts, strict=True):
        best = (index @ text).topk(min(6, len(data))).indices.tolist()
        cells = "".join(_figure(data, b, data.drawings[b].caption) for b in best)
        out.append(
            f'<div class="query"><q>{html.escape(query)}</q><div class="row">{cells}</div></div>'
        )
    return "".join(out)


def words_of(tokenizer: Tokenizer, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """Group the pieces of one row into words: (word, columns). Special tokens are left out."""
    words: list[tuple[str, list[int]]] = []
    for column, token in enumerate(tokens):
        if token < tokenizer.first_piece or token == tokenizer.end:
            continue
        piece = tokenizer.inner.id_to_token(token)
        if piece.startswith("\u0120") or not words:  # the byte-level mark of a leading space
            words.append(("", []))
        words[-1][1].append(column)
    return [(tokenizer.decode([tokens[c] for c in columns]), columns) for _, columns in words]


@torch.no_grad()
def attention_maps(inputs: Inputs, row: int) -> list[tuple[str, np.ndarray]]:
    """For each word of a caption, where the last co-attention block looks: [grid, grid], sum 1.

    The whole-picture region is left out; heads and the pieces of a word are averaged.
    """
    data, tokenizer, model = inputs.data, inputs.tokenizer, inputs.vilbert
    model.eval()
    features = region_features(model, data, [row], precision=inputs.precision)[0]
    tokens = tokenizer.encode([data.drawings[row].caption]).to(device())
    maps: list[Tensor] = []
    with autocast(inputs.precision):
        model.encode(features.float(), tokens, tokens != tokenizer.pad, maps)
    p = maps[-1][0].float().mean(dim=0)[:, 1:].cpu()  # [N, grid^2]
    grid = model.region_encoder.grid
    out = []
    for word, columns in words_of(tokenizer, tokens[0].tolist()):
        weights = p[columns].mean(dim=0)
        out.append((word, (weights / weights.sum()).view(grid, grid).numpy()))
    return out


def _maps(inputs: Inputs, rows: list[int]) -> str:
    """Held-out drawings of at least two words, with one overlay a word."""
    data = inputs.data
    several = [i for i in rows if len(data.drawings[i].caption.split()) >= 2]
    out = []
    for row in _spread(several or rows, data, MAPS):
        maps = attention_maps(inputs, row)
        low = min(float(m.min()) for _, m in maps)
        high = max(float(m.max()) for _, m in maps)
        name = html.escape(data.drawings[row].caption)
        cells = [
            f'<figure><img src="{_picture(data, row)}" alt="{name}">'
            f"<figcaption><b>{name}</b></figcaption></figure>"
        ]
        for word, weights in maps:
            heat = plot.overlay(
                data.images[row], torch.from_numpy(weights), low=low, high=high, side=128
            )
            src = png(heat.numpy())
            cells.append(
                f'<figure><img src="{src}" alt="attention of {html.escape(word)}">'
                f"<figcaption>{html.escape(word)}</figcaption></figure>"
            )
        out.append(f'<div class="maps">{"".join(cells)}</div>')
    return "".join(out)


def card(value: str, label: str) -> str:
    """One large number and what it is."""
    return f'<div class="card"><b>{value}</b><span>{label}</span></div>'


def render_report(inputs: Inputs, index: Tensor) -> str:
    """The whole page.

    Args:
        inputs: what was trained and measured.
        index: unit embeddings of every drawing, [N, embed_dim].
    """
    clip, vilbert = inputs.clip_metrics, inputs.vilbert_metrics
    rows = inputs.data.indices("test")
    images, texts = embed(inputs.clip, inputs.tokenizer, inputs.data, rows, inputs.precision)
    retrieval, matching = clip["retrieval"], vilbert["matching"]
    t2i, i2t = retrieval["text_to_image/all"], retrieval["image_to_text/all"]
    bases = {inputs.data.drawings[i].base for i in rows}
    train = inputs.data.indices("train")
    machine = clip["machine"]
    comparisons = {"CLIP": clip["comparison"], "ViLBERT": vilbert["comparison"]}

    times = "\N{MULTIPLICATION SIGN}"

    def lift(r: dict[str, float]) -> str:
        return f"{r['recall_at_10'] / r['chance_recall_at_10']:.1f}\N{MULTIPLICATION SIGN} chance"

    cards = "".join(
        (
            card(_percent(t2i["recall_at_10"]), f"CLIP text to image R@10, {lift(t2i)}"),
            card(_percent(i2t["recall_at_10"]), f"CLIP image to text R@10, {lift(i2t)}"),
            card(
                _percent(matching["matching_accuracy_random"]),
                f"ViLBERT matching, chance {_percent(matching['chance'])}",
            ),
            card(
                _percent(matching["matching_accuracy_hard"]),
                f"ViLBERT matching, hard negatives, chance {_percent(matching['chance'])}",
            ),
        )
    )
    clip_curve = curves(inputs.clip_log, clip["comparison"], "contrastive")
    vilbert_curve = curves(inputs.vilbert_log, vilbert["comparison"], "pre-training")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(inputs.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>
<h1>{html.escape(inputs.title)}</h1>
<p class="soft">Two models trained from scratch on {len(train)} drawings and their English names;
every figure is measured on {len(rows)} held-out drawings of {len(bases)} base emoji that training
never saw in any skin tone, gender or variant. Drawings: {ATTRIBUTION}.</p>
<div class="cards">{cards}</div>

<section><h2>CLIP: names to drawings and back</h2>
<p class="soft">{clip["parameters"]:,} parameters, {clip["steps"]} steps in
{clip["train_seconds"]:.0f} s. Small figures are what guessing would give.</p>
{_retrieval_table(retrieval)}</section>

<section><h2>ViLBERT: do these two belong together?</h2>
<p class="soft">{vilbert["parameters"]:,} trained parameters, {vilbert["steps"]} steps in
{vilbert["train_seconds"]:.0f} s, on frozen grid features of the CLIP above, with the negatives
that CLIP finds hardest.</p>
{_matching_table(matching, vilbert["matching_untrained"])}</section>

<section><h2>Loss curves: ours and standard</h2>
<p class="soft">Right-hand plots: the same weights and batches stepped in turn with fused and with
standard attention and loss.</p>
<h3>CLIP</h3><img class="plot" alt="CLIP loss curves" src="{clip_curve}">
<h3>ViLBERT</h3><img class="plot" alt="ViLBERT loss curves" src="{vilbert_curve}"></section>

<section><h2>Time and memory of a step</h2>
<p class="soft">Median of whole training steps (data, forward, backward, optimizer) taken in turn;
peak tensor memory above what stands between steps. Standard is the faster of
scaled_dot_product_attention and the plain equation, and the loss that stores its B{times}B logits.
{html.escape(str(machine["device"]))}, {machine["threads"]} threads,
{html.escape(str(clip["comparison"]["precision"]))}, torch {html.escape(machine["torch"])}.</p>
{timing_table(comparisons)}</section>

<section><h2>Gallery: held-out names and their five nearest drawings</h2>
<p class="soft">The right drawing is framed green; where it is not among the five it stands at the
end, dashed. Names are taken at even distances from the list, not chosen.</p>
{_gallery(inputs, rows, images, texts)}</section>

<section><h2>Free words against all drawings</h2>
<p class="soft">What <code>python -m fusedmm search</code> answers; training drawings included.</p>
{_free_gallery(inputs, index)}</section>

<section><h2>Co-attention: where each word looks</h2>
<p class="soft">Last co-attention block of ViLBERT, text to image, mean of heads, held-out
drawings. Bright is more; one scale per drawing.</p>
{_maps(inputs, rows)}</section>

<footer>Drawings: {ATTRIBUTION} (openmoji.org). Made by <code>python -m fusedmm run</code>.</footer>
</main></body></html>
"""
