"""Batches of questions on pictures: several questions share a picture, each wording is one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.train.easy_vqa import EasyVQA, Questions
from fusedmm.train.loop import device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Picture

QUESTION_LENGTH = 16


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
        pair = self.text * (1 + int(part.answer.max())) + part.answer
        self.weight = 1.0 / pair.bincount()[pair].double()

    def draw(self, seed: int, step: int, pictures: int, questions: int) -> Tensor:
        """Rows of this step: `pictures` of them with up to `questions` questions each.

        Rare answers to a wording are drawn as often as common ones, as far as a picture's questions
        allow: what the wording alone predicts would otherwise be learned long before the picture.
        """
        g = torch.Generator().manual_seed(step_seed(seed, step, stream=3))
        chosen = torch.randint(len(self.of_picture), (pictures,), generator=g).tolist()
        rows = [self.of_picture[p] for p in chosen]
        weights = torch.full((len(rows), max(map(len, rows))), 1e-30, dtype=torch.float64)
        for i, r in enumerate(rows):
            weights[i, : len(r)] = self.weight[r]
        # The largest of u^(1 / weight): weighted sampling without replacement.
        u = torch.rand(weights.shape, generator=g, dtype=torch.float64)
        order = (u.log() / weights).argsort(dim=1, descending=True)
        return torch.cat([r[order[i][: min(questions, len(r))]] for i, r in enumerate(rows)])

    def batch(self, rows: Tensor) -> Batch:
        """These questions, each picture and wording once, on the device."""
        pictures, picture = self.part.picture[rows].unique(return_inverse=True)
        texts, text = self.text[rows].unique(return_inverse=True)
        images = self.part.images[pictures].float() / 255
        columns = (images, self.tokens[texts], self.keep[texts], picture, text)
        return Batch(*(c.to(device()) for c in (*columns, self.part.answer[rows])))


def answered_gallery(
    answers: Sequence[str], part: Questions, predict: Callable[[Tensor], Tensor], count: int = 24
) -> list[Picture]:
    """Questions at even distances, each with its picture and the answer given."""
    rows = torch.arange(0, len(part), max(1, len(part) // count))[:count]
    said = zip(part.pixels(rows), rows.tolist(), predict(rows).tolist(), strict=True)
    return [
        Picture(image, f"{part.texts[row]} {answers[a]}", a == int(part.answer[row]))
        for image, row, a in said
    ]
