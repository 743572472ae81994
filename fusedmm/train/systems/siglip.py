"""Recipe `siglip`: CLIP's data and towers under the pairwise sigmoid loss; retrieval, zero-shot.

Drawings are 32 pixels a side, so that a run takes minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fusedmm.models import CLIP, CLIPConfig
from fusedmm.models.siglip import SigLIP
from fusedmm.train.clip import ClipRecipe, ClipTask, train_tokenizer
from fusedmm.train.config import LoopConfig
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import tower_gallery, two_tower_figures


@dataclass(frozen=True)
class SiglipRecipe(ClipRecipe):
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1000, batch_size=128, lr=1e-3, compare_steps=16)
    )
    model: CLIPConfig = field(default_factory=lambda: CLIPConfig(image_size=32))


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
        return tower_gallery(self)
