"""Question answering with a joint encoder of choice: ViLBERT's, LXMERT's or UNITER's.

A convolutional grid gives the regions, heads give an answer and masked words. Left out: detectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.bert import TextEmbeddings, WordHead, init_bert
from fusedmm.models.layers import conv_stem
from fusedmm.models.lxmert import LxmertEncoder
from fusedmm.models.uniter import UniterEncoder
from fusedmm.models.vilbert import Encoder, ViLBERTConfig


@dataclass(frozen=True)
class VQAConfig:
    """Sizes, and the joint encoder: "vilbert", "lxmert" or "uniter"."""

    encoder: str = "vilbert"
    image_size: int = 64
    patch_size: int = 16
    width: int = 64
    heads: int = 2
    layers: int = 1
    vocab_size: int = 512
    max_position: int = 16
    classes: int = 13
    frames: int = 1

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(
                f"VQAConfig: encoder: expected one of {sorted(ENCODERS)}, got {self.encoder!r}"
            )


class VilbertEncoder(nn.Module):
    """ViLBERT's two streams with a co-attention block before each layer but the first of text.

    forward(text [B, N, d], image [B, M, d], keep [B, N]) -> both, same shapes.
    """

    def __init__(self, width: int, heads: int, layers: int, backend: str | None = None) -> None:
        super().__init__()
        config = ViLBERTConfig(
            hidden_size=width, v_hidden_size=width, bi_hidden_size=width,
            heads=heads, v_heads=heads, bi_heads=heads,
            layers=layers + 1, v_layers=layers,
            t_biattention_id=tuple(range(1, layers + 1)),
            v_biattention_id=tuple(range(layers)),
        )  # fmt: skip
        self.encoder = Encoder(config, backend)

    def forward(self, text: Tensor, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(text, image, keep)


ENCODERS = {"vilbert": VilbertEncoder, "lxmert": LxmertEncoder, "uniter": UniterEncoder}


class VQA(nn.Module):
    """Grid and words through a joint encoder; an answer from the product of both sides.

    Args:
        config: sizes and encoder.
        backend: a fusedmm backend name for cross-modal attention, None for the first that accepts,
            or "standard" for torch's.
    """

    def __init__(self, config: VQAConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        width, grid = config.width, config.image_size // config.patch_size
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position, width)
        self.encoder = ENCODERS[config.encoder](width, config.heads, config.layers, backend)
        self.t_pooler, self.v_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.answer = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(),
                                    nn.Linear(width, config.classes))  # fmt: skip
        self.word_head = WordHead(self.embeddings.word_embeddings)
        init_bert(self)
        self.stem = conv_stem(width, config.patch_size, batch_norm=True)
        # 0.5, not 0.02: cells must differ by place from the start (600 steps of `dialogue`, seed 1,
        # validation scenes: where, 94.8 % against 25.8 %).
        self.position = nn.Parameter(torch.randn(grid**2, width) * 0.5)
        self.time = nn.Parameter(torch.randn(config.frames, 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def encode(
        self, images: Tensor, tokens: Tensor, keep: Tensor, picture: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Words and regions that have seen each other.

        Args:
            images: [P, 3, S, S] in [0, 1], or [P, frames, 3, S, S].
            tokens: [Q, N] ids; keep: [Q, N] bool.
            picture: [Q] row of `images` that each question is about.
        Returns: (text [Q, N, width], image [Q, M, width]).
        """
        frames = images.view(-1, *images.shape[-3:])  # [P * frames, 3, S, S]
        regions = self.stem(frames * 2 - 1).flatten(2).transpose(1, 2) + self.position
        regions = regions.unflatten(0, (-1, self.config.frames)) + self.time
        regions = self.norm(regions.flatten(1, 2))[picture]  # [Q, frames * cells, width]
        return self.encoder(self.embeddings(tokens), regions, keep)

    def answer_logits(self, text: Tensor, image: Tensor) -> Tensor:
        """[Q, classes] from the first word, the maximum over regions and their product."""
        t, v = F.relu(self.t_pooler(text[:, 0])), self.v_pooler(image.amax(dim=1))
        return self.answer(torch.cat([t * v, t, v], dim=-1))

    def word_logits(self, text: Tensor) -> Tensor:
        """[..., width] -> [..., vocab_size]."""
        return self.word_head(text, self.embeddings.word_embeddings)
