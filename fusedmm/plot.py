"""Lays what an attention looked at over an image: heat maps and weighted links on its patches.

Takes the by-products of fusedmm.attention_maps, never an M x N map. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from . import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "inferno"


def overlay(
    image: Tensor,
    values: Tensor,
    *,
    low: float | None = None,
    high: float | None = None,
    side: int = 256,
) -> Tensor:
    """The image, greyed and tinted by one value per patch.

    Args:
        image: [3, height, width] uint8, or floating in [0, 1].
        values: [rows, cols] of the patch grid, any sizes.
        low, high: values drawn as untinted and as fully tinted; default the least and greatest.
        side: pixels of the shorter side.
    Returns: [height, width, 3] uint8.
    Raises: ValueError, bad shape. ModuleNotFoundError, no matplotlib.
    """
    image = _picture("overlay", image, side)
    check.ndim("overlay", "values", values, "rows, cols")
    values = values.detach().float().cpu()
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    size = tuple(image.shape[1:])
    heat = F.interpolate(values[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]
    heat = ((heat - low) / max(high - low, 1e-12)).clamp(0, 1)
    colour = torch.from_numpy(_matplotlib().colormaps[_COLOURS](0.15 + 0.75 * heat.numpy()))
    base = image.permute(1, 2, 0)
    grey = 0.55 * base.mean(2, keepdim=True) + 0.45 * base
    tint = 0.65 * heat[..., None]
    mixed = grey * (1 - tint) + colour[..., :3].float() * tint
    return (255 * mixed.clamp(0, 1)).to(torch.uint8)


def plot_attention(
    image: Tensor,
    grid: tuple[int, int],
    *,
    maps: Mapping[str, Tensor] | None = None,
    links: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Figure:
    """The image, beside it one panel per map and per token's links.

    Args:
        image: [3, height, width] uint8, or floating in [0, 1].
        grid: rows and columns of patches; patch i is row i // columns, column i % columns.
        maps: title -> [rows * columns], say attention_received or attention_entropy of the patches;
            drawn as heat with its scale.
        links: title -> (weights [n], patches [n]), a row of what attention_links returns; the
            patches are framed with their weights, and the rest of the image is darkened.
    Returns: matplotlib Figure; `.savefig(path)` writes it.
    Raises: ValueError, bad shape or patch. ModuleNotFoundError, no matplotlib.
    """
    op = "plot_attention"
    picture, (rows, cols) = _picture(op, image), grid
    maps, links = dict(maps or {}), dict(links or {})
    for title, values in maps.items():
        check.shape(op, f"maps[{title!r}]", values, (rows * cols,), "grid")
    for title, (weights, patches) in links.items():
        check.shape(op, f"links[{title!r}]", patches, tuple(weights.shape), "its weights")
        if patches.numel() and not 0 <= int(patches.min()) <= int(patches.max()) < rows * cols:
            got = f"{int(patches.min())} to {int(patches.max())}"
            raise check.bad(op, f"links[{title!r}]", f"patches in [0, {rows * cols})", got)
    _matplotlib()
    from matplotlib.figure import Figure

    across = min(1 + len(maps) + len(links), 4)
    down = -(-(1 + len(maps) + len(links)) // across)
    figure = Figure(figsize=(2.6 * across, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    panels[0].imshow(picture.permute(1, 2, 0).numpy())
    panels[0].set_title("image", fontsize=9)
    for panel, (title, values) in zip(panels[1:], maps.items(), strict=False):
        _heat(figure, panel, picture, title, values.detach().float().cpu().reshape(rows, cols))
    for panel, (title, (weights, patches)) in zip(
        panels[1 + len(maps) :], links.items(), strict=False
    ):
        _links(panel, picture, title, weights.tolist(), patches.tolist(), rows, cols)
    return figure


def _heat(figure, panel, picture: Tensor, title: str, values: Tensor) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panel.imshow(overlay(picture, values).numpy())
    panel.set_title(title, fontsize=9)
    scale = ScalarMappable(Normalize(values.min().item(), values.max().item()), _COLOURS)
    figure.colorbar(scale, ax=panel, fraction=0.045, pad=0.02).ax.tick_params(labelsize=6)


def _links(
    panel, picture: Tensor, title: str, weights: list, patches: list, rows: int, cols: int
) -> None:
    from matplotlib.patches import Rectangle

    height, width = picture.shape[1:]
    lit = torch.zeros(rows * cols)
    # Brightness says the weight among those shown; a weight of 0 leaves its patch dark.
    top = max(weights, default=0.0) or 1.0
    for weight, patch in zip(weights, patches, strict=True):
        lit[patch] = max(lit[patch].item(), weight / top)
    lit = F.interpolate(lit.reshape(1, 1, rows, cols), size=(height, width), mode="nearest")[0]
    panel.imshow((picture * (0.3 + 0.7 * lit)).permute(1, 2, 0).numpy())
    panel.set_title(title, fontsize=9)
    for weight, patch in zip(weights, patches, strict=True):
        x, y = patch % cols * width / cols, patch // cols * height / rows
        box = Rectangle(
            (x, y), width / cols, height / rows, fill=False, edgecolor="white", linewidth=0.8
        )
        panel.add_patch(box)
        panel.text(
            x + width / cols / 2, y + height / rows / 2, f"{100 * weight:.0f}%", fontsize=5,
            color="white", ha="center", va="center",
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 0.8, "linewidth": 0},
        )  # fmt: skip


def _picture(op: str, image: Tensor, side: int = 256) -> Tensor:
    """[3, height, width] fp32 in [0, 1], the shorter side of `side` pixels."""
    check.is_tensor(op, "image", image)
    if image.dim() != 3 or image.shape[0] != 3:
        raise check.bad(op, "image", "shape [3, height, width]", list(image.shape))
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    factor = side / min(image.shape[1:])
    size = tuple(round(n * factor) for n in image.shape[1:])
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def _matplotlib():
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: matplotlib is not installed; pip install 'fusedmm[plot]'"
        ) from error
    return matplotlib
