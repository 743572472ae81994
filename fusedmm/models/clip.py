"""CLIP: a ViT and a causal text Transformer meet in one space under a symmetric InfoNCE loss.

The loss is `fusedmm.contrastive_loss`; `loss_backend="standard"` takes the eager B x B one instead.
Parameter names are open_clip's. Left out: pretrained weights, ResNet towers, text without an end
token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedmm
from fusedmm.models.layers import Transformer, conv_stem, init_transformer

STANDARD = "standard"
STEMS = ("patch", "conv")
POOLS = ("mean", "token")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers. The defaults train in minutes on two CPU cores.

    `stem` "patch" and `pool` "token" (class, end token) are the original; a convolutional stem
    and the mean of all tokens learn more from a few thousand pictures.
    """

    image_size: int = 64
    patch_size: int = 8
    stem: str = "conv"
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    context_length: int = 24
    vocab_size: int = 1024
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    embed_dim: int = 128
    pool: str = "mean"
    init_temperature: float = 0.07
    max_logit_scale: float = 100.0

    def __post_init__(self) -> None:
        if self.stem not in STEMS:
            raise ValueError(f"CLIPConfig: stem: expected one of {STEMS}, got {self.stem!r}")
        if self.pool not in POOLS:
            raise ValueError(f"CLIPConfig: pool: expected one of {POOLS}, got {self.pool!r}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f"CLIPConfig: patch_size: expected a power of 2 for stem 'conv', "
                f"got {self.patch_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPConfig: patch_size: expected a divisor of image_size {self.image_size}, "
                f"got {self.patch_size}"
            )
        for name in ("vision", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(
                    f"CLIPConfig: {name}_heads: expected a divisor of {name}_width {width}, "
                    f"got {heads}"
                )


class VisionTransformer(nn.Module):
    """Patches and a class token through a Transformer; their mean or that token is the picture."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        grid = config.image_size // patch
        self.grid = grid
        self.pool = config.pool
        if config.stem == "conv":
            self.conv1 = conv_stem(width, patch)
        else:
            self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        init_transformer(self.transformer)

    def tokens(self, images: Tensor) -> Tensor:
        """All tokens after the last norm: [B, 3, S, S] in [0, 1] -> [B, 1 + grid^2, width]."""
        x = self.conv1(images * 2 - 1).flatten(2).transpose(1, 2)  # [B, grid^2, width]
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        return (x[:, 0] if self.pool == "token" else x.mean(dim=1)) @ self.proj


class CLIP(nn.Module):
    """Contrastive image-text model.

        loss = InfoNCE(exp(logit_scale) * encode_image(i) @ encode_text(t).T)

    Args:
        config: sizes.
        loss_backend: a fusedmm backend name, None for the first that accepts, or "standard" for
            the eager loss that stores the B x B logits.
    Source: CLIP, arXiv:2103.00020.
    """

    def __init__(self, config: CLIPConfig, *, loss_backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.loss_backend = loss_backend
        self.pool = config.pool
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.transformer = Transformer(width, config.text_layers, config.text_heads, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.init_temperature)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        init_transformer(self.transformer)

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> [B, embed_dim], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] token ids, each row ending in the highest id -> [B, embed_dim], not normalised.

        Attention is causal, so padding after the end token never reaches it.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = tokens.argmax(dim=-1, keepdim=True)
        at = torch.arange(tokens.shape[1], device=x.device)
        weight = (at == end if self.pool == "token" else at <= end).to(x.dtype)  # [B, L]
        pooled = (weight / weight.sum(dim=1, keepdim=True))[:, None] @ x
        return pooled[:, 0] @ self.text_projection

    def loss(self, images: Tensor, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Symmetric InfoNCE over the batch; rows with equal `ids` are each other's matches."""
        x, y = self.encode_image(images).float(), self.encode_text(tokens).float()
        scale = self.logit_scale.exp().clamp(max=self.config.max_logit_scale)
        with torch.autocast(x.device.type, enabled=False):  # logits need more than bf16's 8 bits
            if self.loss_backend == STANDARD:
                return standard_contrastive_loss(x, y, scale, ids)
            return fusedmm.contrastive_loss(
                x, y, scale, ids_x=ids, ids_y=ids, normalize=True, backend=self.loss_backend
            )


def standard_contrastive_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, ids: Tensor | None = None
) -> Tensor:
    """The loss as it is usually written: stores the logits, the targets and both softmaxes."""
    logits = logit_scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T  # [B, B]
    if ids is None:
        target = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    match = (ids[:, None] == ids[None, :]).to(logits.dtype)  # symmetric: rows serve both ways
    target = match / match.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
