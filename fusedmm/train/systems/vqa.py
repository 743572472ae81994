"""Recipes `vilbert-vqa`, `lxmert`, `uniter`: three joint encoders answer questions on easy-VQA.

Each learns answers and masked words together, UNITER also word-region alignment. The accuracy
without the picture (every question shown another picture) tells how much the picture counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models.uniter import transport_distance
from fusedmm.models.vqa import VQA, VQAConfig
from fusedmm.train.config import LoopConfig
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import mask_tokens, step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.questions import Asked, Batch, answered_gallery, question_tokenizer


@dataclass(frozen=True)
class VqaRecipe:
    """Everything that decides the numbers of these recipes; `batch_size` counts pictures."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=3000, batch_size=24, lr=1e-3, compare_steps=8)
    )
    model: VQAConfig = field(default_factory=VQAConfig)
    questions: int = 4
    mask_probability: float = 0.15
    word_weight: float = 0.3
    alignment_weight: float = 0.0
    limit: int | None = None


@dataclass(frozen=True)
class LxmertRecipe(VqaRecipe):
    """`vilbert-vqa` with LXMERT's encoder."""

    model: VQAConfig = field(default_factory=lambda: VQAConfig(encoder="lxmert"))


@dataclass(frozen=True)
class UniterRecipe(VqaRecipe):
    """`vilbert-vqa` with UNITER's encoder and word-region alignment."""

    model: VQAConfig = field(default_factory=lambda: VQAConfig(encoder="uniter"))
    alignment_weight: float = 0.1


class VilbertVqa(System):
    """A joint encoder on easy-VQA."""

    Recipe = VqaRecipe
    about = "ViLBERT's two streams with co-attention answer questions on easy-VQA"
    op = "co_attention"

    def __init__(self, recipe: VqaRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        self.data = sources.easy_vqa(recipe.limit)
        self.tokenizer = question_tokenizer(self.data, recipe.model.vocab_size)
        self.train, self.val, self.test = (
            Asked(part, self.tokenizer) for part in (self.data.train, self.data.val, self.data.test)
        )
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(
            recipe.model,
            vocab_size=self.tokenizer.vocab_size,
            max_position=self.tokenizer.length,
            classes=len(self.data.answers),
        )
        self.model = VQA(config, backend=backend).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """Answers from the plain question, words from the masked one, alignment if asked for."""
        loop, recipe = self.recipe.loop, self.recipe
        batch = self.train.batch(
            self.train.draw(loop.seed, step, loop.batch_size, recipe.questions)
        )
        g = torch.Generator().manual_seed(step_seed(loop.seed, step, stream=5))
        tokens, keep = batch.tokens[batch.text], batch.keep[batch.text]
        # A quarter of the questions is shown masked; the answer is asked of the others only.
        some = len(tokens) // 4
        masked, words = mask_tokens(tokens[:some].cpu(), self.tokenizer, recipe.mask_probability, g)
        words = words.to(tokens.device)
        shown = torch.cat([masked.to(tokens.device), tokens[some:]])
        text, image = self.model.encode(batch.images, shown, keep, batch.picture)
        logits = self.model.answer_logits(text[some:], image[some:]).float()
        answer = F.cross_entropy(logits, batch.answer[some:])
        at = words >= 0
        said = self.model.word_logits(text[:some][at]).float()
        mlm = F.cross_entropy(said, words[at], reduction="sum") / at.sum().clamp(min=1)
        out = {"loss": answer + recipe.word_weight * mlm, "answer": answer, "mlm": mlm}
        if recipe.alignment_weight:
            out["alignment"] = transport_distance(text[some:], image[some:], keep[some:]).mean()
            out["loss"] = out["loss"] + recipe.alignment_weight * out["alignment"]
        return out

    @torch.no_grad()
    def predictions(self, asked: Asked, rows: Tensor, shift: int = 0) -> Tensor:
        """Answers to questions, [len(rows)], each shown its picture or one `shift` away."""
        self.model.eval()

        def answer(part: Tensor) -> Tensor:
            b: Batch = asked.batch(part)
            picture = (b.picture + shift) % len(b.images)
            tokens, keep = b.tokens[b.text], b.keep[b.text]
            return self.model.answer_logits(
                *self.model.encode(b.images, tokens, keep, picture)
            ).argmax(dim=-1)

        with autocast(self.recipe.loop.precision):
            return in_batches(answer, rows, size=512).long()

    def evaluate(self) -> list[Figure]:
        """Share of test questions answered right, with the picture and with another one, and of
        validation questions."""
        out = []
        for name, asked, shift in (
            ("easy-VQA", self.test, 0),
            ("easy-VQA, shown another picture", self.test, 7),
            ("easy-VQA, validation questions", self.val, 0),
        ):
            rows, target = torch.arange(len(asked.part)), asked.part.answer
            right = float((self.predictions(asked, rows, shift) == target).double().mean())
            blind = self.data.blind_accuracy(asked.part)
            out.append(Figure(name, right, blind, "question alone", len(rows)))
        return out

    def gallery(self) -> list[Picture]:
        """Test questions at even distances with the answers given."""
        return answered_gallery(
            self.data.answers, self.test.part, lambda rows: self.predictions(self.test, rows)
        )


class Lxmert(VilbertVqa):
    """LXMERT on easy-VQA."""

    Recipe = LxmertRecipe
    about = "LXMERT's cross-modality encoder answers questions on easy-VQA"


class Uniter(VilbertVqa):
    """UNITER on easy-VQA."""

    Recipe = UniterRecipe
    about = "UNITER's single stream with optimal-transport alignment answers questions on easy-VQA"
    op = None
