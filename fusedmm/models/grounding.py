"""A small open-vocabulary detector: words and grid cells fused both ways, a score and a box a cell.

The GLIP / Grounding DINO shape without its queries: `BiAttentionBlock`s (one shared score matrix,
both softmaxes) between a convolutional grid and the words. Left out: several scales, many boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.bert import BertLayer, TextEmbeddings, init_bert
from fusedmm.models.clip import STANDARD
from fusedmm.models.layers import ResidualBlock, conv_stem
from fusedmm.nn import BiAttentionBlock


@dataclass(frozen=True)
class GrounderConfig:
    """Sizes. The grid has (image_size / patch_size)^2 cells."""

    image_size: int = 64
    patch_size: int = 8
    width: int = 96
    heads: int = 4
    text_layers: int = 1
    fusion_layers: int = 2
    vocab_size: int = 1024
    max_position: int = 16


class Grounder(nn.Module):
    """Find what a phrase names: a score and a box for every cell.

    Args:
        config: sizes.
        backend: a fusedmm backend name for the fusion, None for the first that accepts, or
            "standard" for the eager equations.
    Source: GLIP, arXiv:2112.03857; Grounding DINO, arXiv:2303.05499; boxes as FCOS, 1904.01355.
    """

    def __init__(self, config: GrounderConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        width, heads, grid = config.width, config.heads, config.image_size // config.patch_size
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position, width)
        self.text = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in range(config.text_layers))
        self.score = nn.Linear(width, width)
        self.box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
        self.fusion = nn.ModuleList(
            BiAttentionBlock(
                width, width, width, heads, 0.0,
                init_values=0.5, backend=None if backend == STANDARD else backend,
            )
            for _ in range(config.fusion_layers)
        )  # fmt: skip
        for block in self.fusion:
            block.attn.exact_clamp = backend == STANDARD  # the original's equation, scores stored
        self.words_after = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in self.fusion)
        self.cells_after = nn.ModuleList(ResidualBlock(width, heads) for _ in self.fusion)
        self.norm = nn.LayerNorm(width)
        init_bert(self)
        for block in self.cells_after:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        self.stem = conv_stem(width, config.patch_size)
        self.position = nn.Parameter(torch.randn(grid**2, width) * 0.5)
        at = (torch.arange(grid) + 0.5) / grid
        centres = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).flatten(0, 1)
        self.register_buffer("centres", centres, persistent=False)  # [M, 2] x, y in 0..1

    def forward(
        self, images: Tensor, tokens: Tensor, keep: Tensor, scene: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Look for Q phrases in B scenes.

        Args:
            images: [B, 3, S, S] in [0, 1]; tokens: [Q, N] ids; keep: [Q, N] bool.
            scene: [Q] row of `images` in which each phrase is sought; each is encoded once.
        Returns: (scores [Q, M], boxes [Q, M, 4] as x0, y0, x1, y1 in 0..1).
        """
        cells = self.stem(images * 2 - 1).flatten(2).transpose(1, 2) + self.position
        cells = cells[scene]
        words = self.embeddings(tokens)
        for layer in self.text:
            words = layer(words, keep)
        layers = zip(self.fusion, self.words_after, self.cells_after, strict=True)
        for fuse, words_after, cells_after in layers:
            (cells, _), (words, _) = fuse(cells, words, None, ~keep)
            words, cells = words_after(words, keep), cells_after(cells)
        cells = self.norm(cells)
        phrase = (words * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True)
        scores = (self.score(cells) @ phrase[..., None])[..., 0] * cells.shape[-1] ** -0.5
        reach = F.softplus(self.box(cells).float() - 1.0)  # distances to the four sides
        boxes = torch.cat([self.centres - reach[..., :2], self.centres + reach[..., 2:]], dim=-1)
        return scores.float(), boxes


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (x0, y0, x1, y1), elementwise over [..., 4]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    area_a, area_b = ((t[..., 2:] - t[..., :2]).clamp(min=0).prod(dim=-1) for t in (a, b))
    return both / (area_a + area_b - both).clamp(min=1e-6)


def grounding_loss(
    scores: Tensor, boxes: Tensor, target: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor]:
    """(-log share of the softmax over cells that lies in the target box, 1 - IoU + L1 there).

    Args:
        scores: [Q, M]; boxes: [Q, M, 4]; target: [Q, 4]; centres: [M, 2].
    """
    inside = (centres > target[:, None, :2]) & (centres < target[:, None, 2:])
    inside = inside.all(dim=-1)  # [Q, M]
    nearest = ((target[:, None, :2] + target[:, None, 2:]) / 2 - centres).square().sum(-1)
    inside = inside.scatter(1, nearest.argmin(dim=1, keepdim=True), True)
    log_p = scores.log_softmax(dim=-1).masked_fill(~inside, float("-inf")).logsumexp(dim=-1)
    at, wanted = boxes[inside], target[:, None].expand_as(boxes)[inside]
    off = 1 - box_iou(at, wanted) + (at - wanted).abs().sum(dim=-1)
    return -log_p.mean(), off.mean()
