"""VLMP: an instruction and an egocentric view go in, an action comes out.

Cells of the view and words meet in ViLBERT's co-attention blocks; the last action is one more word.
Left out: a memory beyond the last action.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.bert import TextEmbeddings, init_bert
from fusedmm.nn.co_attention import BertConnectionLayer


@dataclass(frozen=True)
class VLMPConfig:
    """Sizes. A view is `view` x `view` cells of three codes below `codes` each."""

    view: int = 7
    codes: int = 16
    actions: int = 7
    width: int = 64
    heads: int = 2
    layers: int = 3
    vocab_size: int = 512
    max_position: int = 12


class VLMP(nn.Module):
    """Policy from words and cells.

    Args:
        config: sizes.
        backend: a fusedmm backend name for the co-attention, None for the first that accepts, or
            "standard" for torch's.
    Source: BabyAI, arXiv:1810.08272; the encoder is ViLBERT's, arXiv:1908.02265.
    """

    def __init__(self, config: VLMPConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cells = nn.ModuleList(nn.Embedding(config.codes, width) for _ in range(3))
        self.words = TextEmbeddings(config.vocab_size, config.max_position, width)
        self.last = nn.Embedding(config.actions + 1, width)
        self.blocks = nn.ModuleList(
            BertConnectionLayer(
                width, 2 * width, width, 2 * width, width, config.heads, attention_backend=backend
            )
            for _ in range(config.layers)
        )
        self.head = nn.Sequential(
            nn.Linear(config.view**2 * (width // 4) + width, 2 * width), nn.GELU(),
            nn.Linear(2 * width, config.actions),
        )  # fmt: skip
        self.squeeze = nn.Linear(width, width // 4)
        init_bert(self)
        for table in (*self.cells, self.last):
            nn.init.normal_(table.weight, std=0.3)
        self.position = nn.Parameter(torch.randn(config.view**2, width) * 0.3)
        self.norm = nn.LayerNorm(width)

    def forward(self, view: Tensor, tokens: Tensor, keep: Tensor, last: Tensor) -> Tensor:
        """Logits over actions, [B, actions].

        Args:
            view: [B, view, view, 3] codes; tokens: [B, N] ids; keep: [B, N] bool.
            last: [B] action before, `actions` for none.
        """
        cells = sum(table(view[..., i].flatten(1)) for i, table in enumerate(self.cells))
        cells = self.norm(cells + self.position)
        words = torch.cat([self.last(last)[:, None], self.words(tokens)], dim=1)
        kept = F.pad(keep, (1, 0), value=True)
        for block in self.blocks:
            cells, words = block(cells, None, words, kept)
        seen = self.squeeze(cells).flatten(1)  # the place of a cell decides the action
        return self.head(torch.cat([seen, words[:, 0]], dim=-1))
