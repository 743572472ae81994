"""ViLBERT: a BERT over text and a BERT over image regions, joined by co-attention blocks.

Regions are the grid tokens of a frozen ViT held inside the model, standing in for the original's
detector. Heads: masked-language modelling and image-text matching. Left out: masked regions, fine-
tuning heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.bert import BertLayer, ImageEmbeddings, TextEmbeddings, init_bert
from fusedmm.models.clip import CLIPConfig, VisionTransformer
from fusedmm.nn.co_attention import BertConnectionLayer


@dataclass(frozen=True)
class ViLBERTConfig:
    """Sizes of both streams.

    Co-attention block i runs before text layer `t_biattention_id[i]` and picture layer
    `v_biattention_id[i]`, as in the original configs.
    """

    vocab_size: int = 1024
    max_position: int = 24
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    v_hidden_size: int = 128
    v_layers: int = 2
    v_heads: int = 4
    bi_hidden_size: int = 128
    bi_heads: int = 4
    t_biattention_id: tuple[int, ...] = (1, 2)
    v_biattention_id: tuple[int, ...] = (0, 1)
    dropout: float = 0.0
    regions: CLIPConfig = field(default_factory=CLIPConfig)

    def __post_init__(self) -> None:
        if isinstance(self.regions, dict):
            object.__setattr__(self, "regions", CLIPConfig(**self.regions))
        for name in ("t_biattention_id", "v_biattention_id"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        t, v = self.t_biattention_id, self.v_biattention_id
        if len(t) != len(v):
            raise ValueError(
                f"ViLBERTConfig: v_biattention_id: expected {len(t)} entries to match "
                f"t_biattention_id, got {len(v)}"
            )
        for name, ids, layers in (
            ("t_biattention_id", t, self.layers),
            ("v_biattention_id", v, self.v_layers),
        ):
            if list(ids) != sorted(ids) or any(not 0 <= i <= layers for i in ids):
                raise ValueError(
                    f"ViLBERTConfig: {name}: expected ascending layers in 0..{layers}, got {ids}"
                )


class Encoder(nn.Module):
    """Two stacks run side by side; co-attention block i runs before the layers its ids name."""

    def __init__(self, config: ViLBERTConfig, attention_backend: str | None) -> None:
        super().__init__()
        self.t_ids, self.v_ids = config.t_biattention_id, config.v_biattention_id
        t, v = config.hidden_size, config.v_hidden_size
        self.layer = nn.ModuleList(
            BertLayer(t, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.v_layer = nn.ModuleList(
            BertLayer(v, config.v_heads, config.dropout) for _ in range(config.v_layers)
        )
        self.c_layer = nn.ModuleList(
            BertConnectionLayer(
                v, 4 * v, t, 4 * t, config.bi_hidden_size, config.bi_heads,
                dropout=config.dropout, attention_backend=attention_backend,
            )
            for _ in self.t_ids
        )  # fmt: skip

    def forward(
        self, text: Tensor, image: Tensor, keep: Tensor, maps: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        t_done = v_done = 0
        for block, t_id, v_id in zip(self.c_layer, self.t_ids, self.v_ids, strict=True):
            for layer in self.layer[t_done:t_id]:
                text = layer(text, keep)
            for layer in self.v_layer[v_done:v_id]:
                image = layer(image)
            t_done, v_done = t_id, v_id
            if maps is not None:
                maps.append(block.biattention.attention_maps(image, None, text, keep)[0])
            image, text = block(image, None, text, keep)
        for layer in self.layer[t_done:]:
            text = layer(text, keep)
        for layer in self.v_layer[v_done:]:
            image = layer(image)
        return text, image


class Encoded(NamedTuple):
    """Both streams after the encoder: `text` [B, N, hidden], `image` [B, M, v_hidden]."""

    text: Tensor
    image: Tensor


class ViLBERT(nn.Module):
    """Two-stream encoder with co-attention, and its pre-training heads.

    Args:
        config: sizes.
        attention_backend: a fusedmm backend name, None for the first that accepts, or "standard":
            two `standard_attention` calls per block.
    Source: ViLBERT, arXiv:1908.02265.
    """

    def __init__(self, config: ViLBERTConfig, *, attention_backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.region_encoder = VisionTransformer(config.regions).requires_grad_(False)
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position, config.hidden_size)
        self.v_embeddings = ImageEmbeddings(config.regions.vision_width, config.v_hidden_size)
        self.encoder = Encoder(config, attention_backend)
        self.t_pooler = nn.Linear(config.hidden_size, config.bi_hidden_size)
        self.v_pooler = nn.Linear(config.v_hidden_size, config.bi_hidden_size)
        self.transform = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.LayerNorm(config.hidden_size, eps=1e-12),
        )
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.matching = nn.Linear(config.bi_hidden_size, 2)
        self.register_buffer("boxes", _grid_boxes(self.region_encoder.grid), persistent=False)
        init_bert(self, skip=("region_encoder",))

    @torch.no_grad()
    def regions(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> features [B, 1 + grid^2, width]; the first is the whole."""
        return self.region_encoder.tokens(images)

    def encode(
        self,
        regions: Tensor,
        tokens: Tensor,
        keep: Tensor,
        maps: list[Tensor] | None = None,
    ) -> Encoded:
        """Run both streams.

        Args:
            regions: [B, M, width] from `regions`.
            tokens: [B, N] ids; keep: [B, N] bool, False on padding.
            maps: if a list, each block appends where text looks in the image, [B, H, N, M].
        """
        text = self.embeddings(tokens)
        image = self.v_embeddings(regions, self.boxes)
        return Encoded(*self.encoder(text, image, keep, maps))

    def matching_logits(self, encoded: Encoded) -> Tensor:
        """[B, 2], column 1 is "these belong together": from the product of both first tokens."""
        t = F.relu(self.t_pooler(encoded.text[:, 0]))
        v = F.relu(self.v_pooler(encoded.image[:, 0]))
        return self.matching(t * v)

    def mlm_logits(self, text: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab_size], sharing the word embedding."""
        return F.linear(self.transform(text), self.embeddings.word_embeddings.weight, self.mlm_bias)


def _grid_boxes(grid: int) -> Tensor:
    """[1 + grid^2, 4] (x, y, width, height): the whole picture, then its cells row by row."""
    cell = 1.0 / grid
    ys, xs = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    cells = torch.stack([xs.flatten() * cell, ys.flatten() * cell], dim=1)
    cells = torch.cat([cells, torch.full_like(cells, cell)], dim=1)
    return torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), cells])
