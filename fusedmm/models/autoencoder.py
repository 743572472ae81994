"""Joint autoencoder: a convolutional and an LSTM autoencoder meet in one latent space Z.

Each modality is rebuilt from its own code, the codes of a pair are drawn together; a third encoder
takes both at once, the plain multimodal autoencoder on [x, y]. Left out: sampling from Z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedmm.models.layers import conv_stem


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes. Pictures shrink to a 4 x 4 grid before they become a code."""

    image_size: int = 32
    channels: int = 64
    width: int = 128
    latent: int = 128
    vocab_size: int = 1024
    length: int = 16
    temperature: float = 0.07

    def __post_init__(self) -> None:
        side = self.image_size // 4
        if self.image_size % 4 or side < 2 or side & (side - 1):
            raise ValueError(
                f"AutoencoderConfig: image_size: expected 4 times a power of 2, "
                f"got {self.image_size}"
            )


class Codes(NamedTuple):
    """Codes of the picture, the text, and both together, [B, latent] each."""

    image: Tensor
    text: Tensor
    both: Tensor


class ImageDecoder(nn.Module):
    """A code to a picture: [B, latent] -> [B, 3, S, S] in [0, 1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        wide = 2 * config.channels
        self.start = nn.Linear(config.latent, wide * 16)
        layers: list[nn.Module] = []
        for i in range((config.image_size // 4).bit_length() - 1):
            narrow = max(16, config.channels >> i)
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(wide, narrow, 3, padding=1),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
            ]
            wide = narrow
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, 3, 3, padding=1))

    def forward(self, code: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(self.start(code).unflatten(1, (-1, 4, 4))).float())


class TextEncoder(nn.Module):
    """Words through an LSTM, the state after the last one: [B, N], [B, N] bool -> [B, width]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.lstm = nn.LSTM(config.width, config.width, batch_first=True)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            states, _ = self.lstm(self.embedding(tokens))
        last = keep.sum(dim=1).clamp(min=1) - 1
        return states[torch.arange(len(states), device=states.device), last]


class TextDecoder(nn.Module):
    """A code starts an LSTM that writes the words: [B, latent], [B, N] -> [B, N, vocab_size]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.start = nn.Linear(config.latent, 2 * config.width)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.lstm = nn.LSTM(config.width + config.latent, config.width, batch_first=True)
        self.out = nn.Linear(config.width, config.vocab_size)

    def forward(self, code: Tensor, tokens: Tensor) -> Tensor:
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            h, c = self.start(code).chunk(2, dim=-1)
            words = self.embedding(tokens)
            beside = code[:, None].expand(-1, words.shape[1], -1)
            states, _ = self.lstm(
                torch.cat([words, beside], dim=-1), (h[None].contiguous(), c[None].contiguous())
            )
        return self.out(states)


class JointAutoencoder(nn.Module):
    """Encoders and decoders around Z.

    Args:
        config: sizes.
    Source: Multimodal Deep Learning (Ngiam et al., ICML 2011); arXiv:1804.02874 for the joint
        latent space.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        stem = conv_stem(config.channels, config.image_size // 4, batch_norm=True)
        self.image_encoder = nn.Sequential(
            stem, nn.Flatten(), nn.Linear(16 * config.channels, width)
        )
        self.text_encoder = TextEncoder(config)
        self.image_code = nn.Linear(width, config.latent)
        self.text_code = nn.Linear(width, config.latent)
        self.joint_code = nn.Sequential(nn.ReLU(), nn.Linear(2 * width, config.latent))
        self.image_decoder = ImageDecoder(config)
        self.text_decoder = TextDecoder(config)

    def encode(self, images: Tensor, tokens: Tensor, keep: Tensor) -> Codes:
        """[B, 3, S, S] in [0, 1], [B, N] ids, [B, N] bool -> the three codes."""
        x, y = self.image_encoder(images * 2 - 1), self.text_encoder(tokens, keep)
        return Codes(
            self.image_code(x).float(),
            self.text_code(y).float(),
            self.joint_code(torch.cat([x, y], dim=-1)).float(),
        )
