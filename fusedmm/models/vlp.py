"""VLP: two towers, a fusion encoder of co-attention blocks and a captioning decoder in one model.

The ALBEF / BLIP shape: a contrastive loss aligns the towers, matching and masked words train the
fusion, and a causal decoder looking at the picture writes captions. Left out: momentum teachers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedmm
from fusedmm.models.bert import (
    BertDecoderLayer,
    BertLayer,
    TextEmbeddings,
    WordHead,
    init_bert,
)
from fusedmm.models.clip import STANDARD, CLIPConfig, VisionTransformer, standard_contrastive_loss
from fusedmm.nn.co_attention import BertConnectionLayer


@dataclass(frozen=True)
class VLPConfig:
    """Sizes. `vision` describes the picture tower; only its vision fields and embed_dim count."""

    vision: CLIPConfig = field(default_factory=lambda: CLIPConfig(image_size=32))
    vocab_size: int = 1024
    max_position: int = 24
    hidden_size: int = 128
    heads: int = 4
    text_layers: int = 2
    fusion_layers: int = 2
    decoder_layers: int = 2
    init_temperature: float = 0.07

    def __post_init__(self) -> None:
        if isinstance(self.vision, dict):
            object.__setattr__(self, "vision", CLIPConfig(**self.vision))


class VLP(nn.Module):
    """Vision-language pre-training in one model.

    Args:
        config: sizes.
        backend: a fusedmm backend name for loss and co-attention, None for the first that accepts,
            or "standard" for the usual ones.
    Source: ALBEF, arXiv:2107.07651; BLIP, arXiv:2201.12086.
    """

    def __init__(self, config: VLPConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        width, heads = config.hidden_size, config.heads
        v_width, joint = config.vision.vision_width, config.vision.embed_dim
        self.visual = VisionTransformer(config.vision)
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position, width)
        self.text = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in range(config.text_layers))
        self.text_projection = nn.Linear(width, joint, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.init_temperature)))
        self.fusion = nn.ModuleList(
            BertConnectionLayer(
                v_width, 4 * v_width, width, 4 * width, width, heads, attention_backend=backend
            )
            for _ in range(config.fusion_layers)
        )
        self.t_pooler = nn.Linear(width, width)
        self.v_pooler = nn.Linear(v_width, width)
        self.matching = nn.Linear(width, 2)
        self.word_head = WordHead(self.embeddings.word_embeddings)
        self.visual_context = nn.Linear(v_width, width)
        self.decoder = nn.ModuleList(
            BertDecoderLayer(width, heads) for _ in range(config.decoder_layers)
        )
        self.next_word = WordHead(self.embeddings.word_embeddings)
        init_bert(self, skip=("visual.",))

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in [0, 1] -> tokens [B, M, v_width], embedding [B, embed_dim]."""
        tokens = self.visual.tokens(images)
        return tokens, tokens.mean(dim=1) @ self.visual.proj

    def encode_text(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] ids, [B, N] bool -> states [B, N, width], embedding [B, embed_dim]."""
        x = self.embeddings(tokens)
        for layer in self.text:
            x = layer(x, keep)
        mean = (x * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True)
        return x, self.text_projection(mean)

    def fuse(self, image: Tensor, text: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the co-attention blocks: [B, M, v_width], [B, N, width]."""
        for block in self.fusion:
            image, text = block(image, None, text, keep)
        return image, text

    def matching_logits(self, image: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        """Column 1 of [B, 2] is "these belong together"; streams as the towers leave them."""
        image, text = self.fuse(image, text, keep)
        v, t = F.relu(self.v_pooler(image.mean(dim=1))), F.relu(self.t_pooler(text[:, 0]))
        return self.matching(v * t)

    def word_logits(self, image: Tensor, text: Tensor, keep: Tensor, at: Tensor) -> Tensor:
        """Words at the True places of `at` [B, N], read from the fused text: [K, vocab_size]."""
        _, text = self.fuse(image, text, keep)
        return self.word_head(text[at], self.embeddings.word_embeddings)

    def caption_logits(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Next-word logits at every place of `tokens` [B, N]: [B, N, vocab_size]."""
        context = self.visual_context(image)
        x = self.embeddings(tokens)
        for layer in self.decoder:
            x = layer(x, context)
        return self.next_word(x, self.embeddings.word_embeddings)

    @torch.no_grad()
    def caption(self, images: Tensor, start: int, end: int) -> Tensor:
        """Greedy captions, [B, max_position] ids from `start` on; `end` fills what follows it."""
        image, _ = self.encode_image(images)
        out = torch.full((len(images), 1), start, device=images.device)
        done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        while out.shape[1] < self.config.max_position and not bool(done.all()):
            word = self.caption_logits(image, out)[:, -1].argmax(dim=-1)
            word = torch.where(done, end, word)
            done = done | (word == end)
            out = torch.cat([out, word[:, None]], dim=1)
        return F.pad(out, (0, self.config.max_position - out.shape[1]), value=end)

    def contrastive(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Symmetric InfoNCE of both embeddings; equal `ids` are matches."""
        scale = self.logit_scale.exp().clamp(max=100.0)
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.float(), y.float()
            if self.backend == STANDARD:
                return standard_contrastive_loss(x, y, scale, ids)
            return fusedmm.contrastive_loss(
                x, y, scale, ids_x=ids, ids_y=ids, normalize=True, backend=self.backend
            )
