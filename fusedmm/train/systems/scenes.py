"""Canvases composed of drawings: four in quadrants, or two over time, one of which moves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.train.clip import one_per_base
from fusedmm.train.data import OpenMoji

QUADRANTS = 4


def nameable(data: OpenMoji, split: str, words: int = 2) -> Tensor:
    """Rows: one drawing a base with a name of up to `words` words, evenly mixed over the set."""
    rows = one_per_base(data, data.indices(split))
    short = [i for i in rows if len(data.drawings[i].caption.split()) <= words]
    g = torch.Generator().manual_seed(0)
    return torch.tensor(short)[torch.randperm(len(short), generator=g)]


class Scenes(NamedTuple):
    """Pictures [B, 3, S, S], which drawing is where [B, 4], and its box [B, 4, 4] in 0..1."""

    images: Tensor
    drawings: Tensor
    boxes: Tensor


def drawn_boxes(images: Tensor) -> Tensor:
    """The box (x0, y0, x1, y1) in 0..1 around what is not white: [N, 3, S, S] -> [N, 4]."""
    ink = (images < 0.97).any(dim=1)  # [N, S, S]
    size = images.shape[-1]
    out = []
    for axis in (1, 2):  # any over rows leaves columns: x first
        line = ink.any(dim=axis).float()
        first = line.argmax(dim=1)
        last = size - line.flip(1).argmax(dim=1)
        out.append((first, last))
    (x0, x1), (y0, y1) = out
    return torch.stack([x0, y0, x1, y1], dim=1).float() / size


def compose(images: Tensor, boxes: Tensor, rows: Tensor, size: int, g: torch.Generator) -> Scenes:
    """Place `rows` [B, 4] of the drawings in the quadrants of canvases of `size` pixels."""
    b = len(rows)
    n = b * QUADRANTS
    zoom = torch.rand(n, generator=g) * 0.4 + 0.6  # side of the drawing over side of the quadrant
    shift = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - zoom[:, None])  # of its centre, in -1..1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = -shift / zoom[:, None]
    half = size // 2
    grid = F.affine_grid(theta, [n, 3, half, half], align_corners=False)
    parts = F.grid_sample(images[rows.flatten()] - 1, grid, align_corners=False) + 1
    parts = parts.view(b, 2, 2, 3, half, half)
    canvas = parts.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, size, size)
    corner = (boxes[rows.flatten()].view(n, 2, 2) * 2 - 1) * zoom[:, None, None] + shift[:, None]
    corner = (corner + 1) / 4  # in the quadrant's half of the canvas
    origin = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]).repeat(b, 1)
    return Scenes(canvas, rows, (corner + origin[:, None]).view(b, QUADRANTS, 4))


def place(images: Tensor, centre: Tensor, zoom: float, size: int) -> Tensor:
    """Each picture on a white canvas: [N, 3, S, S], centres [N, 2] in -1..1 -> [N, 3, size, size].

    `zoom` is the side of the picture over that of the canvas.
    """
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = -centre / zoom
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def moving(
    images: Tensor, rows: Tensor, velocity: Tensor, size: int, frames: int, g: torch.Generator
) -> Tensor:
    """Two drawings over time, the first of which moves: [B, frames, 3, size, size].

    Args:
        images: all drawings; rows: [B, 2]; velocity: [B, 2] per frame, canvas -1..1.
    """
    b = len(rows)
    centre = torch.rand(b, 2, 2, generator=g) * 0.8 - 0.4
    moments = torch.arange(frames) - (frames - 1) / 2
    path = velocity[:, None] * moments[:, None]  # [B, frames, 2]
    first = centre[:, 0, None] * (velocity[:, None] == 0) + path  # free across its direction only
    second = centre[:, 1, None].expand(-1, frames, -1)
    out = torch.ones(b * frames, 3, size, size)
    for which, at in ((rows[:, 0], first), (rows[:, 1], second)):
        drawings = images[which].repeat_interleave(frames, dim=0)
        out = out * place(drawings, at.reshape(-1, 2), 0.4, size)
    return out.view(b, frames, 3, size, size)
