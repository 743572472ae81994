"""Two small CLIPs side by side, one of them taught by a larger: what distillation adds.

The teacher's similarity distributions and its features are the lessons. The teacher itself is not
part of the model: its embeddings come from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.clip import CLIP, CLIPConfig


@dataclass(frozen=True)
class DistillationConfig:
    """Sizes of each student, and the width of the teacher's embeddings."""

    student: CLIPConfig = field(
        default_factory=lambda: CLIPConfig(
            image_size=32, vision_width=64, vision_layers=2, vision_heads=2, text_width=64,
            text_layers=1, text_heads=2, embed_dim=64,
        )
    )  # fmt: skip
    teacher_dim: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.student, dict):
            object.__setattr__(self, "student", CLIPConfig(**self.student))


class Students(nn.Module):
    """`taught` and `alone`: two students with the same initial weights.

    Args:
        config: sizes.
        loss_backend: as CLIP's.
    Source: TinyCLIP, arXiv:2309.12314; CLIP-KD, arXiv:2307.12732.
    """

    def __init__(self, config: DistillationConfig, *, loss_backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.taught = CLIP(config.student, loss_backend=loss_backend)
        self.alone = CLIP(config.student, loss_backend=loss_backend)
        self.alone.load_state_dict(self.taught.state_dict())
        width = config.student.embed_dim
        self.image_lesson = nn.Linear(width, config.teacher_dim)
        self.text_lesson = nn.Linear(width, config.teacher_dim)


def similarity_lesson(
    x: Tensor, y: Tensor, scale: Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: Tensor
) -> Tensor:
    """KL(teacher || student) of both softmaxes over the batch, mean of the directions, in nats.

    Args:
        x, y, teacher_x, teacher_y: [B, D] unit rows; scale, teacher_scale: multipliers.
    """
    s, t = scale * x @ y.T, teacher_scale * teacher_x @ teacher_y.T  # [B, B]
    return (
        sum(
            F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean")
            for a, b in ((s, t), (s.T, t.T))
        )
        / 2
    )


def feature_lesson(x: Tensor, teacher_x: Tensor) -> Tensor:
    """Mean of 1 - cosine between rows that should agree."""
    return 1 - F.cosine_similarity(x, teacher_x, dim=-1).mean()
