"""VLAP: vision, language and audio towers in one space, all three pairings in one batched loss.

CLIP's two towers and a Transformer over log-mel frames; one `fusedmm.contrastive_loss` call takes
[3, B, D] against [3, B, D]. Left out: audio without speech.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fusedmm
from fusedmm.models.clip import CLIP, STANDARD, CLIPConfig, standard_contrastive_loss
from fusedmm.models.layers import Transformer, init_transformer


@dataclass(frozen=True)
class VLAPConfig:
    """Sizes; `clip` describes the picture and text towers."""

    clip: CLIPConfig = field(default_factory=lambda: CLIPConfig(image_size=32))
    mels: int = 40
    frames: int = 160
    audio_width: int = 128
    audio_layers: int = 2
    audio_heads: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.clip, dict):
            object.__setattr__(self, "clip", CLIPConfig(**self.clip))


class AudioTransformer(nn.Module):
    """Log-mel frames through two stride-2 convolutions and a Transformer; the mean is the sound."""

    def __init__(self, config: VLAPConfig) -> None:
        super().__init__()
        width = config.audio_width
        self.stem = nn.Sequential(
            nn.Conv1d(config.mels, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.GELU(),
        )
        self.positional_embedding = nn.Parameter(torch.randn(-(-config.frames // 4), width) * 0.02)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.audio_layers, config.audio_heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.clip.embed_dim) * width**-0.5)
        init_transformer(self.transformer)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, mels, frames], about zero mean and unit scale -> [B, embed_dim]."""
        x = self.stem(mel).transpose(1, 2)
        x = self.transformer(self.ln_pre(x + self.positional_embedding[: x.shape[1]]))
        return self.ln_post(x).mean(dim=1) @ self.proj


class VLAP(CLIP):
    """Pictures, names and spoken names in one space.

        loss = mean of InfoNCE over (image, text), (image, audio), (text, audio)

    Args:
        config: sizes of the three towers.
        loss_backend: as CLIP's; "standard" takes three eager losses.
    Source: AudioCLIP, arXiv:2106.13043.
    """

    def __init__(self, config: VLAPConfig, *, loss_backend: str | None = None) -> None:
        super().__init__(config.clip, loss_backend=loss_backend)
        self.config = config
        self.audio = AudioTransformer(config)

    def loss(self, images: Tensor, tokens: Tensor, mel: Tensor, ids: Tensor) -> Tensor:
        """All three pairings; rows with equal `ids` are each other's matches."""
        image, text, audio = (
            self.encode_image(images).float(),
            self.encode_text(tokens).float(),
            self.audio(mel).float(),
        )
        scale = self.logit_scale.exp().clamp(max=self.config.clip.max_logit_scale)
        x, y = torch.stack([image, image, text]), torch.stack([text, audio, audio])  # [3, B, D]
        with torch.autocast(x.device.type, enabled=False):
            if self.loss_backend == STANDARD:
                pairs = zip(x, y, strict=True)
                return sum(standard_contrastive_loss(a, b, scale, ids) for a, b in pairs) / 3
            ids = ids.expand(3, -1)
            return fusedmm.contrastive_loss(
                x, y, scale, ids_x=ids, ids_y=ids, normalize=True, backend=self.loss_backend
            )
