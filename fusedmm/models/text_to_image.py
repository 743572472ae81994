"""Text to image the DALL-E way: a discrete autoencoder, then a decoder over words and image tokens.

Tokens come from finite scalar quantisation, which needs no codebook to be kept alive. One causal
Transformer reads the caption and writes the tokens row by row. Left out: upsampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.layers import Transformer, conv_stem, init_transformer


@dataclass(frozen=True)
class TextToImageConfig:
    """Sizes. A picture is a grid of (image_size / patch_size)^2 tokens of prod(levels) kinds."""

    image_size: int = 32
    patch_size: int = 4
    channels: int = 64
    levels: tuple[int, ...] = (7, 7, 5)
    vocab_size: int = 1024
    text_length: int = 16
    width: int = 128
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or any(n < 3 or n % 2 == 0 for n in self.levels):
            raise ValueError(
                f"TextToImageConfig: levels: expected odd numbers from 3 on, got {self.levels}"
            )


class Quantiser(nn.Module):
    """Rounds each of a few channels to a handful of levels; gradients pass straight through.

        code = round(reach * tanh(z)) / reach,  reach = (levels - 1) / 2

    Source: FSQ, arXiv:2309.15505.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("reach", torch.tensor([(n - 1) / 2 for n in levels]), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.kinds = math.prod(levels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[..., len(levels)] -> (codes in -1..1, same shape; tokens [...] below `kinds`)."""
        soft = self.reach * torch.tanh(z.float())
        hard = soft + (soft.round() - soft).detach()
        tokens = ((soft.round() + self.reach).long() * self.basis).sum(dim=-1)
        return hard / self.reach, tokens

    def codes(self, tokens: Tensor) -> Tensor:
        """The codes of tokens: [...] -> [..., len(levels)]."""
        steps = tokens[..., None] // self.basis % self.levels
        return steps / self.reach - 1


class DiscreteAutoencoder(nn.Module):
    """Pictures to a grid of tokens and back."""

    def __init__(self, config: TextToImageConfig) -> None:
        super().__init__()
        c, depth = config.channels, config.patch_size.bit_length() - 1
        self.grid = config.image_size // config.patch_size
        self.encoder = nn.Sequential(
            conv_stem(c, config.patch_size, batch_norm=True), nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, len(config.levels), 1),
        )  # fmt: skip
        self.quantiser = Quantiser(config.levels)
        layers: list[nn.Module] = [nn.Conv2d(len(config.levels), c, 3, padding=1), nn.ReLU()]
        for i in range(depth):
            narrow = max(24, c >> i)
            layers += [
                nn.Conv2d(c if i == 0 else max(24, c >> (i - 1)), narrow, 3, padding=1),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
                nn.Upsample(scale_factor=2),
            ]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(narrow, 3, 3, padding=1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in [0, 1] -> codes [B, grid, grid, C], tokens [B, grid^2]."""
        codes, tokens = self.quantiser(self.encoder(images * 2 - 1).permute(0, 2, 3, 1))
        return codes, tokens.flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """[B, grid, grid, C] -> [B, 3, S, S] in [0, 1]."""
        return torch.sigmoid(self.decoder(codes.permute(0, 3, 1, 2)).float())

    def pictures(self, tokens: Tensor) -> Tensor:
        """[B, grid^2] -> [B, 3, S, S] in [0, 1]."""
        return self.decode(self.quantiser.codes(tokens).unflatten(1, (self.grid, self.grid)))


class TextToImage(nn.Module):
    """The autoencoder and the decoder over [caption, image tokens].

    Args:
        config: sizes.
    Source: DALL-E, arXiv:2102.12092.
    """

    def __init__(self, config: TextToImageConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = DiscreteAutoencoder(config)
        width, kinds = config.width, self.autoencoder.quantiser.kinds
        count = self.autoencoder.grid**2
        self.words = nn.Embedding(config.vocab_size, width)
        self.patches = nn.Embedding(kinds, width)
        self.position = nn.Parameter(torch.randn(config.text_length + count, width) * 0.02)
        self.transformer = Transformer(width, config.layers, config.heads, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, kinds)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.patches.weight, std=0.02)
        init_transformer(self.transformer)

    def next_logits(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Logits of image tokens 0..K from a caption and tokens 0..K-1: [B, N], [B, K] ->
        [B, K + 1, kinds]."""
        x = torch.cat([self.words(text), self.patches(tokens)], dim=1)
        x = self.norm(self.transformer(x + self.position[: x.shape[1]]))
        return self.head(x[:, text.shape[1] - 1 :])

    def loss(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Nats an image token: [B, text_length] ids, [B, grid^2] tokens."""
        logits = self.next_logits(text, tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def draw(
        self, text: Tensor, empty: Tensor, generator: torch.Generator, *,
        temperature: float = 0.8, guidance: float = 2.0,
    ) -> Tensor:  # fmt: skip
        """Sample pictures for captions, [B, 3, S, S] in [0, 1].

        Args:
            text: [B, text_length] ids; empty: [text_length] ids of the empty caption.
            generator: of the CPU.
            guidance: logits are pushed this far away from those of the empty caption; 1 is none.
        """
        b = len(text)
        both = torch.cat([text, empty.expand(b, -1)])
        tokens = torch.empty(b, 0, dtype=torch.long, device=text.device)
        for _ in range(self.autoencoder.grid**2):
            logits = self.next_logits(both, tokens.repeat(2, 1))[:, -1].float()
            own, none = logits.chunk(2)
            p = ((none + guidance * (own - none)) / temperature).softmax(dim=-1).cpu()
            word = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, word.to(text.device)], dim=1)
        return self.autoencoder.pictures(tokens)
