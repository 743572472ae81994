"""Recipe `fusion`: nine ways to join a picture and a question, trained side by side on easy-VQA.

All share one CNN and one GRU, so that the table compares the fusions alone; their losses are
added. `--model.kinds cross` trains one of them. Left out: pretrained backbones
(`--model.backbone resnet18` starts empty).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models.fusion import FusionConfig, FusionZoo
from fusedmm.train.config import LoopConfig
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.questions import Asked, Batch, answered_gallery, question_tokenizer


@dataclass(frozen=True)
class FusionRecipe:
    """Everything that decides the numbers of this recipe; `batch_size` counts pictures."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1500, batch_size=32, lr=2e-3, compare_steps=0)
    )
    model: FusionConfig = field(default_factory=FusionConfig)
    questions: int = 4
    limit: int | None = None


class Fusion(System):
    """The zoo on easy-VQA."""

    Recipe = FusionRecipe
    about = "CNN, GRU and nine fusions, from concatenation to co-attention, on easy-VQA"

    def __init__(self, recipe: FusionRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        self.data = sources.easy_vqa(recipe.limit)
        self.tokenizer = question_tokenizer(self.data, recipe.model.vocab_size)
        self.train, self.val, self.test = (
            Asked(part, self.tokenizer) for part in (self.data.train, self.data.val, self.data.test)
        )
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(
            recipe.model, vocab_size=self.tokenizer.vocab_size, classes=len(self.data.answers)
        )
        self.model = FusionZoo(config).to(device())

    def batch(self, step: int) -> Batch:
        """Training questions of this step."""
        loop = self.recipe.loop
        return self.train.batch(
            self.train.draw(loop.seed, step, loop.batch_size, self.recipe.questions)
        )

    def loss(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy of each kind and their sum."""
        *inputs, answers = self.batch(step)
        parts = {
            kind: F.cross_entropy(logits.float(), answers)
            for kind, logits in self.model(*inputs).items()
        }
        return {"loss": sum(parts.values()), **parts}

    @torch.no_grad()
    def predictions(self, asked: Asked, rows: Tensor) -> Tensor:
        """Answer of each kind to questions, [kinds, len(rows)]."""
        self.model.eval()

        def answer(part: Tensor) -> Tensor:
            *inputs, _ = asked.batch(part)
            return torch.stack([x.argmax(dim=-1) for x in self.model(*inputs).values()], dim=1)

        with autocast(self.recipe.loop.precision):
            return in_batches(answer, rows, size=512).T.long()

    def evaluate(self) -> list[Figure]:
        """Share of test questions answered right, then of validation questions, which decide the
        order of the kinds."""
        kinds, order, out = list(self.model.zoo), None, []
        for asked, note in ((self.val, ", validation questions"), (self.test, "")):
            said = self.predictions(asked, torch.arange(len(asked.part)))
            right = (said == asked.part.answer).double().mean(dim=1)
            order = right.argsort(descending=True).tolist() if order is None else order
            chance = self.data.blind_accuracy(asked.part)
            out = [
                Figure(f"easy-VQA, {kinds[k]}{note}", float(right[k]), chance, "question alone",
                       said.shape[1])
                for k in order
            ] + out  # fmt: skip
        return out

    def gallery(self) -> list[Picture]:
        """Test questions at even distances, with what the first kind answers."""
        return answered_gallery(
            self.data.answers,
            self.test.part,
            lambda rows: self.predictions(self.test, rows)[0],
        )
