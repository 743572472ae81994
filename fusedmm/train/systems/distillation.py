"""Recipe `distillation`: a small CLIP taught by the trained one, beside the same student alone.

Both students see the same batches. The teacher's embeddings of drawings and captions are computed
once, from the undistorted pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models.distillation import (
    DistillationConfig,
    Students,
    feature_lesson,
    similarity_lesson,
)
from fusedmm.train.clip import embed
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import DrawingBatches
from fusedmm.train.loop import device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import nearest_names, recall_figure


@dataclass(frozen=True)
class DistillationRecipe:
    """Everything that decides the numbers of this recipe, given the teacher."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=700, batch_size=96, lr=2e-3, compare_steps=0)
    )
    model: DistillationConfig = field(default_factory=DistillationConfig)
    limit: int | None = None
    similarity: float = 1.0
    features: float = 2.0


class Distillation(System):
    """Students of the CLIP in the runs folder."""

    Recipe = DistillationRecipe
    about = "a small CLIP taught by a larger one on similarity distributions and features"
    needs = ("clip",)

    def __init__(
        self, recipe: DistillationRecipe, sources: Sources, backend: str | None = None
    ) -> None:
        self.recipe = recipe
        teacher, self.tokenizer, config = sources.trained("clip")
        large = sources.openmoji(teacher.config.image_size, recipe.limit)
        self.teacher = embed(
            teacher.to(device()), self.tokenizer, large, list(range(len(large))),
            config["recipe"]["loop"]["precision"],
        )  # fmt: skip
        self.teacher_scale = float(teacher.logit_scale.detach().exp().clamp(max=100.0))
        self.teacher_size = sum(p.numel() for p in teacher.parameters())
        student = recipe.model.student
        self.data = sources.openmoji(student.image_size, recipe.limit)
        self.batches = DrawingBatches(self.data, self.tokenizer, recipe.loop)
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        sizes = DistillationConfig(
            replace(student, vocab_size=self.tokenizer.vocab_size), self.teacher[0].shape[1]
        )
        self.model = Students(sizes, loss_backend=backend).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """Contrastive loss of both students; the lessons of the taught one."""
        model, recipe = self.model, self.recipe
        images, tokens, ids = self.batches.batch(step)
        rows = self.batches.rows(step)
        teach_x, teach_y = (t[rows].to(device()) for t in self.teacher)
        alone = model.alone.loss(images, tokens, ids)
        taught = model.taught.loss(images, tokens, ids)
        x, y = model.taught.encode_image(images), model.taught.encode_text(tokens)
        features = (
            feature_lesson(model.image_lesson(x).float(), teach_x)
            + feature_lesson(model.text_lesson(y).float(), teach_y)
        ) / 2
        with torch.autocast(x.device.type, enabled=False):
            similarity = similarity_lesson(
                F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1),
                model.taught.logit_scale.exp().clamp(max=100.0),
                teach_x, teach_y, x.new_tensor(self.teacher_scale, dtype=torch.float32),
            )  # fmt: skip
        lessons = recipe.similarity * similarity + recipe.features * features
        return {
            "loss": alone + taught + lessons,
            "alone": alone,
            "taught": taught,
            "similarity": similarity,
            "features": features,
        }

    def evaluate(self) -> list[Figure]:
        """Text-to-image and image-to-text recall at 10 of teacher and students, held out."""
        rows, precision = self.data.indices("test"), self.recipe.loop.precision
        own = {
            "taught student": embed(self.model.taught, self.tokenizer, self.data, rows, precision),
            "student alone": embed(self.model.alone, self.tokenizer, self.data, rows, precision),
            "teacher": tuple(t[rows] for t in self.teacher),
        }
        out = []
        for name, (images, texts) in own.items():
            out.append(recall_figure(f"text to image, {name}", texts, images))
            out.append(recall_figure(f"image to text, {name}", images, texts))
        return out

    def gallery(self) -> list[Picture]:
        """Held-out drawings with the name that the taught student finds nearest."""
        rows = self.data.indices("test")
        images, texts = embed(
            self.model.taught, self.tokenizer, self.data, rows, self.recipe.loop.precision
        )
        return nearest_names(self.data, rows, images, texts)
