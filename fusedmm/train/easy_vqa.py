"""easy-VQA: 5,000 drawings of one coloured shape, 48,248 questions, 13 answers, as tensors.

Pictures and questions come with the PyPI package `easy-vqa`, its test split kept; a tenth of its
training pictures is set apart, with their questions, to choose settings by.
Unreadable pictures are skipped with their questions, counted in `skipped`. Left out: a cache, since
decoding all pictures takes two seconds.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
_VAL_SHARE, _VAL_SEED = 0.1, 0


@dataclass(frozen=True)
class Questions:
    """One split: `texts[i]` is asked of `images[picture[i]]`, the answer is `answers[answer[i]]`.

    `images` [P, 3, 64, 64] uint8; `picture`, `answer` [Q] int64; `skipped` pictures were left out.
    """

    texts: tuple[str, ...]
    picture: Tensor
    answer: Tensor
    images: Tensor
    skipped: int

    def __len__(self) -> int:
        return len(self.texts)

    def pixels(self, rows: Tensor) -> Tensor:
        """The picture of each question, [len(rows), 3, 64, 64] float32 in [0, 1]."""
        return self.images[self.picture[rows]].float() / 255

    def of(self, pictures: Tensor) -> Questions:
        """Those of some pictures, [P] rows of `images`, in the same order."""
        place = torch.full((len(self.images),), -1)
        place[pictures] = torch.arange(len(pictures))
        rows = (place[self.picture] >= 0).nonzero()[:, 0]
        return Questions(
            tuple(self.texts[i] for i in rows.tolist()),
            place[self.picture[rows]],
            self.answer[rows],
            self.images[pictures],
            self.skipped,
        )


@dataclass(frozen=True)
class EasyVQA:
    """The three splits and the answers; no picture is in two of them."""

    train: Questions
    val: Questions
    test: Questions
    answers: tuple[str, ...]

    @classmethod
    def load(cls, limit: int | None = None) -> EasyVQA:
        """Decode the set, or the first `limit` pictures of train and test with their questions.

        Raises: ModuleNotFoundError, the packages of the `recipes` extra are missing.
        """
        try:
            import easy_vqa
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "easy_vqa: easy-vqa is not installed; pip install 'fusedmm[recipes]'"
            ) from error
        answers = tuple(easy_vqa.get_answers())
        ids = {a: i for i, a in enumerate(answers)}
        parts = []
        for split in SPLITS:
            texts, said, picture = getattr(easy_vqa, f"get_{split}_questions")()
            paths = getattr(easy_vqa, f"get_{split}_image_paths")()
            if limit is not None:
                paths = {key: path for key, path in paths.items() if key < limit}
            images, place = _decode(paths)
            rows = [i for i, p in enumerate(picture) if p in place]
            parts.append(
                Questions(
                    tuple(texts[i] for i in rows),
                    torch.tensor([place[picture[i]] for i in rows]),
                    torch.tensor([ids[said[i]] for i in rows]),
                    images,
                    len(paths) - len(place),
                )
            )
        given, test = parts
        order = torch.randperm(
            len(given.images), generator=torch.Generator().manual_seed(_VAL_SEED)
        )
        held = max(1, round(_VAL_SHARE * len(order)))
        return cls(
            given.of(order[held:].sort()[0]), given.of(order[:held].sort()[0]), test, answers
        )

    def blind_accuracy(self, part: Questions) -> float:
        """Share of a split's questions right by saying what the question was mostly answered with
        in training, the picture unseen: the chance level of this set."""
        said: dict[str, Counter[int]] = defaultdict(Counter)
        for text, answer in zip(self.train.texts, self.train.answer.tolist(), strict=True):
            said[text][answer] += 1
        usual = Counter(self.train.answer.tolist()).most_common(1)[0][0]
        guess = [said[t].most_common(1)[0][0] if t in said else usual for t in part.texts]
        return float((torch.tensor(guess) == part.answer).double().mean())


def _decode(paths: dict[int, str]) -> tuple[Tensor, dict[int, int]]:
    """Pictures that can be read as [P, 3, 64, 64] uint8, and the row of each id."""
    from PIL import Image

    arrays, place = [], {}
    for key, path in sorted(paths.items()):
        try:
            with Image.open(path) as picture:
                array = np.asarray(picture.convert("RGB"))
        except OSError as error:
            log.warning("easy_vqa: %s is damaged (%s); left out", path, error)
            continue
        place[key] = len(arrays)
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), place
