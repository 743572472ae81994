"""Batches of varied drawings and names, a pure function of the step; and what judges two towers.

Shared by every recipe on OpenMoji: one sampler, one augmentation, one way to vary a name.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.train.config import LoopConfig
from fusedmm.train.data import OpenMoji
from fusedmm.train.loop import device
from fusedmm.train.sampling import Sampler, augment, may_flip, own_colour, step_seed, vary_caption


def name_tokenizer(data: OpenMoji, *, vocab_size: int, length: int) -> Tokenizer:
    """Byte-level BPE over all names of the training drawings."""
    names = [name for i in data.indices("train") for name in data.drawings[i].names]
    return Tokenizer.train(names, vocab_size=vocab_size, length=length)


class DrawingBatches:
    """Training drawings of a step, with one varied picture and one varied name each.

    Args:
        data: the set; batches come from its train split.
        tokenizer: of the names.
        loop: gives batch size and seed.
        power, group: see `Sampler`; word_drop: see `vary_caption`.
    """

    def __init__(
        self,
        data: OpenMoji,
        tokenizer: Tokenizer,
        loop: LoopConfig,
        *,
        power: float = 0.7,
        group: int = 1,
        word_drop: float = 0.15,
    ) -> None:
        self.data, self.tokenizer, self.seed, self.word_drop = data, tokenizer, loop.seed, word_drop
        self.train_rows = torch.tensor(data.indices("train"))
        self.sampler = Sampler(
            [data.drawings[i].base for i in self.train_rows],
            loop.batch_size,
            seed=loop.seed,
            power=power,
            group=group,
        )
        self.flips = torch.tensor([may_flip(d) for d in data.drawings])
        self.colours = [
            None
            if data.source or "skin tone" in d.caption or "flag" in d.caption
            else own_colour(image)
            for d, image in zip(data.drawings, data.images, strict=True)
        ]
        self._ids: dict[str, int] = {}

    def rows(self, step: int) -> Tensor:
        """Rows of the data set, [B]."""
        return self.train_rows[self.sampler.rows(step)]

    def draw(self, step: int) -> tuple[Tensor, Tensor, list[str]]:
        """Rows [B], varied pictures [B, 3, S, S] and varied names of this step, on the CPU."""
        rows = self.rows(step)
        seed = step_seed(self.seed, step, stream=3)
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        images = augment(self.data.pixels(rows), self.flips[rows], generator)
        texts = [
            vary_caption(self.data.drawings[i], rng, drop=self.word_drop, colour=self.colours[i])
            for i in rows.tolist()
        ]
        return rows, images, texts

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, S, S], tokens [B, L] and the id of each name [B], on the device."""
        _, images, texts = self.draw(step)
        ids = torch.tensor([self._ids.setdefault(t, len(self._ids)) for t in texts])
        place = device()
        return images.to(place), self.tokenizer.encode(texts).to(place), ids.to(place)


GROUP_WORDS = ("flag", "face", "hand", "woman", "man", "person", "button", "clock", "cat", "heart")


def zero_shot_by_word(
    data: OpenMoji, rows: list[int], images: Tensor, encode: Callable[[list[str]], Tensor]
) -> tuple[float, float, int] | None:
    """Drawings whose name holds exactly one of `GROUP_WORDS`, classified by those words.

    Args:
        rows: held-out rows; images: their unit embeddings [N, D]; encode: texts to embeddings.
    Returns: (accuracy, share of the commonest word, number of drawings), None without any.
    """
    found = [[w for w in GROUP_WORDS if w in data.drawings[i].caption.split()] for i in rows]
    at = torch.tensor([i for i, words in enumerate(found) if len(words) == 1])
    if not len(at):
        return None
    target = torch.tensor([GROUP_WORDS.index(found[i][0]) for i in at.tolist()])
    words = F.normalize(encode([f"a {w}" for w in GROUP_WORDS]).float().cpu(), dim=-1)
    guess = (images[at] @ words.T).argmax(dim=1)
    commonest = int(target.bincount().max()) / len(target)
    return float((guess == target).double().mean()), commonest, len(target)
