"""Classifiers of a picture and a question that differ only in how the two meet, side by side.

A convolutional grid and a GRU encode; nine fusions follow, from plain concatenation to attention in
both directions. `FusionZoo` holds any of them over shared encoders. Left out: pretrained text
encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedmm.models.layers import conv_stem
from fusedmm.nn import (
    AdditiveAttention,
    AttentionFusion,
    CoAttention,
    ConcatFusion,
    GatedFusion,
    MultimodalAttention,
)

CONV = "conv"


@dataclass(frozen=True)
class FusionConfig:
    """Sizes, and which fusions to hold. `backbone` is "conv" or the name of a timm model."""

    kinds: tuple[str, ...] = (
        "concat", "gated", "weighted", "additive", "cross", "co", "early", "late", "hybrid",
    )  # fmt: skip
    image_size: int = 64
    patch_size: int = 16
    width: int = 64
    vocab_size: int = 512
    classes: int = 13
    backbone: str = CONV

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not self.kinds or (unknown := sorted(set(self.kinds) - set(FUSIONS))):
            raise ValueError(
                f"FusionConfig: kinds: expected some of {sorted(FUSIONS)}, "
                f"got {unknown if self.kinds else 'none'}"
            )


class GridEncoder(nn.Module):
    """Pictures to a grid of tokens with positions: [B, 3, S, S] in [0, 1] -> [B, grid^2, width]."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        if config.backbone == CONV:
            self.features = conv_stem(config.width, config.patch_size, batch_norm=True)
        else:
            import timm

            body = timm.create_model(config.backbone, features_only=True, pretrained=False)
            self.features = _Last(body, config.width)
        with torch.no_grad():
            probe = self.features(torch.zeros(1, 3, config.image_size, config.image_size))
        self.position = nn.Parameter(torch.randn(probe[0, 0].numel(), config.width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images * 2 - 1).flatten(2).transpose(1, 2) + self.position


class _Last(nn.Module):
    """The last feature map of a timm backbone, projected to `width` channels."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.proj = nn.Conv2d(body.feature_info.channels()[-1], width, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.body(images)[-1])


class GRUEncoder(nn.Module):
    """Words through a GRU: a state per word, and the state after the last one."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] ids, [B, N] bool with padding at the end -> [B, N, width], [B, width]."""
        with torch.autocast(tokens.device.type, enabled=False):
            words, _ = self.gru(self.embedding(tokens))
        last = keep.sum(dim=1).clamp(min=1) - 1
        return words, words[torch.arange(len(words), device=words.device), last]


class Meeting(nn.Module):
    """What every fusion gets and gives.

    forward(grid [B, M, d], words [B, N, d], keep [B, N], question [B, d]) -> [B, classes]
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                  nn.Linear(width, classes))  # fmt: skip


class Pooled(Meeting):
    """The maximum over the grid meets the question in one of the classic fusion layers."""

    def __init__(self, width: int, classes: int, layer: type[nn.Module]) -> None:
        super().__init__(width, classes)
        self.fuse = layer(width, width, width)

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        return self.head(self.fuse(grid.amax(dim=1), question))


class Additive(Meeting):
    """The question looks at the grid by additive attention; what it saw is concatenated to it.

    Source: Show, Ask, Attend, and Answer, arXiv:1704.03162.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.attention = AdditiveAttention(width, width, width)
        self.fuse = ConcatFusion(width, width, width)

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        seen = self.attention(question[:, None], grid, grid)[:, 0]
        return self.head(self.fuse(seen, question))


class Cross(Meeting):
    """Each cell asks the words (`MultimodalAttention`); cells and what they heard are mixed."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.attention = MultimodalAttention(width)
        self.fuse = ConcatFusion(width, width, width)
        self.out = ConcatFusion(width, width, width)

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        heard = self.attention(grid, words, keep)
        cells = self.fuse(grid, heard).amax(dim=1)
        return self.head(self.out(cells, question))


class Co(Meeting):
    """Words and cells look at each other in one `fusedmm.co_attention` call."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.attention = CoAttention(width, width, width)
        self.words = ConcatFusion(width, width, width)
        self.cells = ConcatFusion(width, width, width)
        self.fuse = ConcatFusion(width, width, width)

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        saw, heard = self.attention(words, grid, mask_x=keep)
        w = self.words(words, saw).masked_fill(~keep[..., None], float("-inf"))
        return self.head(self.fuse(self.cells(grid, heard).amax(dim=1), w.amax(dim=1)))


class Early(Meeting):
    """The question is joined to every cell before anything else is computed."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.fuse = ConcatFusion(width, width, width)
        self.mix = nn.Sequential(nn.ReLU(), nn.Linear(width, width))

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        joined = self.fuse(grid, question[:, None].expand(-1, grid.shape[1], -1))
        return self.head(self.mix(joined).amax(dim=1))


class Late(Meeting):
    """Each modality votes on its own; the logits are added."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.vote = nn.Sequential(nn.ReLU(), nn.Linear(width, classes))

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        return self.head(grid.amax(dim=1)) + self.vote(question)


class Hybrid(nn.Module):
    """Early and late fusion together: their logits are added."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.early, self.late = Early(width, classes), Late(width, classes)

    def forward(self, grid: Tensor, words: Tensor, keep: Tensor, question: Tensor) -> Tensor:
        return self.early(grid, words, keep, question) + self.late(grid, words, keep, question)


FUSIONS = {
    "concat": lambda w, c: Pooled(w, c, ConcatFusion),
    "gated": lambda w, c: Pooled(w, c, GatedFusion),
    "weighted": lambda w, c: Pooled(w, c, AttentionFusion),
    "additive": Additive,
    "cross": Cross,
    "co": Co,
    "early": Early,
    "late": Late,
    "hybrid": Hybrid,
}


class FusionZoo(nn.Module):
    """Shared encoders, one fusion with its own head per kind of `config.kinds`.

    Args:
        config: sizes and kinds.
    Source: the taxonomy of arXiv:1705.09406, section 6.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.image = GridEncoder(config)
        self.text = GRUEncoder(config.vocab_size, config.width)
        self.zoo = nn.ModuleDict(
            {k: FUSIONS[k](config.width, config.classes) for k in config.kinds}
        )

    def forward(
        self, images: Tensor, tokens: Tensor, keep: Tensor, picture: Tensor, text: Tensor
    ) -> dict[str, Tensor]:
        """Logits of each kind, [Q, classes], for Q questions that share pictures and wordings.

        Args:
            images: [P, 3, S, S] in [0, 1]; tokens: [T, N] ids; keep: [T, N] bool.
            picture, text: [Q] rows of `images` and of `tokens`, each encoded once.
        """
        grid = self.image(images)[picture]
        words, question = self.text(tokens, keep)
        inputs = (grid, words[text], keep[text], question[text])
        return {kind: meeting(*inputs) for kind, meeting in self.zoo.items()}
