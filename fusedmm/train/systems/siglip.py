"""Recipe `siglip`: CLIP's data and towers under the pairwise sigmoid loss; retrieval, zero-shot.

Drawings are 32 pixels a side, so that a run takes minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedmm.models import CLIP, CLIPConfig
from fusedmm.models.siglip import SigLIP
from fusedmm.train.clip import ClipRecipe, ClipTask, embed, train_tokenizer
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import zero_shot_by_word
from fusedmm.train.evaluate import retrieval
from fusedmm.train.loop import device
from fusedmm.train.systems.base import Figure, Picture, Sources, System


@dataclass(frozen=True)
class SiglipRecipe(ClipRecipe):
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1000, batch_size=128, lr=1e-3, compare_steps=16)
    )
    model: CLIPConfig = field(default_factory=lambda: CLIPConfig(image_size=32))


def two_tower_figures(system: System) -> list[Figure]:
    """Retrieval both ways among held-out drawings, and zero-shot classes, of CLIP-like models."""
    model, tokenizer, data = system.model, system.tokenizer, system.data
    rows = data.indices("test")
    images, texts = embed(model, tokenizer, data, rows, system.recipe.loop.precision)
    out = []
    for name, r in (
        ("text to image", retrieval(texts, images)),
        ("image to text", retrieval(images, texts)),
    ):
        out.append(
            Figure(f"{name}, R@10", r.recall[10], r.chance_recall[10], "random order", r.count)
        )

    @torch.no_grad()
    def encode(words: list[str]) -> Tensor:
        return model.encode_text(tokenizer.encode(words).to(device()))

    value, chance, count = zero_shot_by_word(data, rows, images, encode)
    return [*out, Figure("zero-shot by a word", value, chance, "commonest word", count)]


def nearest_gallery(system: System, count: int = 24) -> list[Picture]:
    """Held-out drawings at even distances, with the held-out name nearest to each."""
    data, rows = system.data, system.data.indices("test")
    images, texts = embed(system.model, system.tokenizer, data, rows, system.recipe.loop.precision)
    out = []
    for i in range(0, len(rows), max(1, len(rows) // count)):
        best = int((texts @ images[i]).argmax())
        said = data.drawings[rows[best]].caption
        out.append(Picture(data.pixels([rows[i]])[0], said, said == data.drawings[rows[i]].caption))
    return out[:count]


class SigLip(System):
    """SigLIP on OpenMoji."""

    Recipe = SiglipRecipe
    about = "two towers under the pairwise sigmoid loss on OpenMoji"
    op = "sigmoid_loss"
    Model: type[CLIP] = SigLIP

    def __init__(self, recipe: SiglipRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        self.data = sources.openmoji(recipe.model.image_size, recipe.limit)
        self.tokenizer = train_tokenizer(self.data, recipe.model)
        self.task = ClipTask(recipe, self.data, self.tokenizer, backend, self.Model)
        self.model = self.task.model

    def loss(self, step: int) -> dict[str, Tensor]:
        """Sigmoid loss of this step's batch."""
        return self.task.loss(step)

    def evaluate(self) -> list[Figure]:
        """Retrieval and zero-shot figures."""
        return two_tower_figures(self)

    def gallery(self) -> list[Picture]:
        """Drawings with the names nearest to them."""
        return nearest_gallery(self)
