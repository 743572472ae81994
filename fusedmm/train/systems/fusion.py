"""Recipe `fusion`: nine ways to join a picture and a question, trained side by side on easy-VQA.

Every classifier sees the same batches and has encoders of its own; their losses are added, so one
run compares them all. Left out: pretrained backbones (`--model.backbone resnet18` starts empty).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.models.fusion import FusionConfig, FusionZoo
from fusedmm.train.config import LoopConfig
from fusedmm.train.easy_vqa import EasyVQA, Questions
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System

QUESTION_LENGTH = 16


@dataclass(frozen=True)
class FusionRecipe:
    """Everything that decides the numbers of this recipe; `batch_size` counts pictures."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, batch_size=32, lr=2e-3, compare_steps=0)
    )
    model: FusionConfig = field(default_factory=FusionConfig)
    questions: int = 4
    limit: int | None = None


def question_tokenizer(data: EasyVQA, vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the training questions; a row holds every question whole."""
    return Tokenizer.train(data.train.texts, vocab_size=vocab_size, length=QUESTION_LENGTH)


class Batch(NamedTuple):
    """Questions that share pictures and wordings; `answer` [Q], the others as in `FusionZoo`."""

    images: Tensor
    tokens: Tensor
    keep: Tensor
    picture: Tensor
    text: Tensor
    answer: Tensor


class Asked:
    """Questions of one split with their tokens, ready to be drawn."""

    def __init__(self, part: Questions, tokenizer: Tokenizer) -> None:
        self.part = part
        texts = list(dict.fromkeys(part.texts))
        place = {t: i for i, t in enumerate(texts)}
        self.text = torch.tensor([place[t] for t in part.texts])
        self.tokens = tokenizer.encode(texts)
        self.keep = self.tokens != tokenizer.pad
        order = part.picture.argsort(stable=True)
        counts = part.picture.bincount(minlength=len(part.images))
        self.of_picture = order.split(counts.tolist())

    def draw(self, seed: int, step: int, pictures: int, questions: int) -> Tensor:
        """Rows of this step: `pictures` of them with up to `questions` questions each."""
        g = torch.Generator().manual_seed(step_seed(seed, step, stream=3))
        chosen = torch.randint(len(self.of_picture), (pictures,), generator=g).tolist()
        rows = (self.of_picture[p] for p in chosen)
        return torch.cat([r[torch.randperm(len(r), generator=g)[:questions]] for r in rows])

    def batch(self, rows: Tensor) -> Batch:
        """These questions, each picture and wording once, on the device."""
        pictures, picture = self.part.picture[rows].unique(return_inverse=True)
        texts, text = self.text[rows].unique(return_inverse=True)
        images = self.part.images[pictures].float() / 255
        columns = (images, self.tokens[texts], self.keep[texts], picture, text)
        return Batch(*(c.to(device()) for c in (*columns, self.part.answer[rows])))


class Fusion(System):
    """The zoo on easy-VQA."""

    Recipe = FusionRecipe
    about = "nine fusions of a CNN and a GRU, from concatenation to co-attention, on easy-VQA"

    def __init__(self, recipe: FusionRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        self.data = sources.easy_vqa(recipe.limit)
        self.tokenizer = question_tokenizer(self.data, recipe.model.vocab_size)
        self.train, self.test = (
            Asked(part, self.tokenizer) for part in (self.data.train, self.data.test)
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
    def predictions(self, rows: Tensor) -> Tensor:
        """Answer of each kind to test questions, [kinds, len(rows)]."""
        self.model.eval()

        def answer(part: Tensor) -> Tensor:
            *inputs, _ = self.test.batch(part)
            return torch.stack([x.argmax(dim=-1) for x in self.model(*inputs).values()], dim=1)

        with autocast(self.recipe.loop.precision):
            return in_batches(answer, rows, size=512).T.long()

    def evaluate(self) -> list[Figure]:
        """Share of test questions answered right, best kind first."""
        said = self.predictions(torch.arange(len(self.test.part)))
        right = (said == self.test.part.answer).double().mean(dim=1)
        chance = self.data.blind_accuracy()
        figures = [
            Figure(f"easy-VQA, {kind}", float(value), chance, "question alone", said.shape[1])
            for kind, value in zip(self.model.zoo, right, strict=True)
        ]
        return sorted(figures, key=lambda f: -f.value)

    def gallery(self) -> list[Picture]:
        """Test questions at even distances, with what the first kind answers."""
        rows = torch.arange(0, len(self.test.part), len(self.test.part) // 24)[:24]
        said = self.predictions(rows)[0]
        pixels = self.test.part.pixels(rows)
        names, asked = self.data.answers, self.test.part
        return [
            Picture(image, f"{asked.texts[row]} {names[a]}", a == int(asked.answer[row]))
            for image, row, a in zip(pixels, rows.tolist(), said.tolist(), strict=True)
        ]
