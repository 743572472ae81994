"""Recipes `dialogue` and `video-qa`: questions on scenes that are composed anew at every step.

Dialogue: "where is the cat?", then "what is below it?", which only the turn before makes clear.
Video: which of two drawings moves, and which way. Both are answered by ViLBERT's encoder, on scenes
that training did not see.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.models.vqa import VQA, VQAConfig
from fusedmm.train.config import LoopConfig
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.scenes import QUADRANTS, compose, drawn_boxes, moving, nameable

PLACES = ("top left", "top right", "bottom left", "bottom right")
# Where the neighbour of each place is, by relation.
RELATIONS = {"beside": (1, 0, 3, 2), "across from": (3, 2, 1, 0), "over or under": (2, 3, 0, 1)}
WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEED = 0.35


@dataclass(frozen=True)
class DialogueRecipe:
    """Everything that decides the numbers of this recipe; `batch_size` counts scenes."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1500, batch_size=16, lr=5e-4, compare_steps=8)
    )
    model: VQAConfig = field(default_factory=lambda: VQAConfig(max_position=40))
    names: int = 24
    evaluated: int = 1000
    limit: int | None = None


@dataclass(frozen=True)
class VideoQaRecipe(DialogueRecipe):
    """The same for moving scenes."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=900, batch_size=48, lr=1.5e-3, compare_steps=8)
    )
    model: VQAConfig = field(
        default_factory=lambda: VQAConfig(image_size=40, patch_size=8, max_position=16, frames=4)
    )


class Asked(NamedTuple):
    """Scenes, and for each question its text, scene, answer and kind."""

    images: Tensor
    texts: list[str]
    scene: Tensor
    answer: Tensor
    kinds: list[str]


class SceneQuestions(System):
    """Questions on scenes made by `ask`."""

    Recipe = DialogueRecipe
    op = "co_attention"

    def __init__(self, recipe: DialogueRecipe, sources: Sources, backend: str | None = None):
        self.recipe = recipe
        data = sources.openmoji(32, recipe.limit)
        self.rows = nameable(data, "train", words=1)[: recipe.names]
        self.names = [data.drawings[i].caption.lower() for i in self.rows.tolist()]
        self.pixels = data.pixels(self.rows)
        self.boxes = drawn_boxes(self.pixels)
        self.answers = [*self.others(), *self.names]
        g = torch.Generator().manual_seed(0)
        texts = [text for _ in range(8) for text in self.ask(32, g).texts]
        self.tokenizer = Tokenizer.train(
            texts, vocab_size=recipe.model.vocab_size, length=recipe.model.max_position
        )
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(
            recipe.model, vocab_size=self.tokenizer.vocab_size, classes=len(self.answers)
        )
        self.model = VQA(config, backend=backend).to(device())

    @abstractmethod
    def others(self) -> list[str]:
        """The answers that are no names."""

    @abstractmethod
    def ask(self, count: int, g: torch.Generator) -> Asked:
        """`count` scenes with their questions."""

    def chosen(self, count: int, each: int, g: torch.Generator) -> Tensor:
        """`each` different drawings a scene, [count, each] positions into `names`."""
        n = len(self.names)
        return torch.stack([torch.randperm(n, generator=g)[:each] for _ in range(count)])

    def logits(self, asked: Asked, rows: Tensor, texts: list[str]) -> Tensor:
        """Answer logits of some questions, [len(rows), answers] fp32."""
        tokens = self.tokenizer.encode([texts[i] for i in rows.tolist()]).to(device())
        keep = tokens != self.tokenizer.pad
        needed, scene = asked.scene[rows].unique(return_inverse=True)
        images = asked.images[needed].to(device())
        encoded = self.model.encode(images, tokens, keep, scene.to(device()))
        return self.model.answer_logits(*encoded).float()

    def loss(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy of this step's answers."""
        loop = self.recipe.loop
        asked = self.ask(loop.batch_size, torch.Generator().manual_seed(step_seed(loop.seed, step)))
        logits = self.logits(asked, torch.arange(len(asked.answer)), asked.texts)
        return {"loss": F.cross_entropy(logits, asked.answer.to(logits.device))}

    def unseen(self, count: int) -> Asked:
        """Scenes of a stream that training does not draw from."""
        seed = step_seed(self.recipe.loop.seed, 0, stream=7)
        return self.ask(count, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def said(self, asked: Asked, texts: list[str]) -> Tensor:
        """The likeliest answer to each question, [Q]."""
        self.model.eval()
        with autocast(self.recipe.loop.precision):
            return in_batches(
                lambda rows: self.logits(asked, rows, texts).argmax(dim=-1),
                torch.arange(len(texts)),
            ).long()

    def figure(self, asked: Asked, said: Tensor, kind: str, note: str = "") -> Figure:
        """Share of right answers to questions of a kind, beside the commonest answer's."""
        at = torch.tensor([k == kind for k in asked.kinds])
        target = asked.answer[at]
        common = int(target.bincount().max()) / len(target)
        right = float((said[at] == target).double().mean())
        return Figure(f"{kind}{note}", right, common, "commonest answer", len(target))

    def gallery(self) -> list[Picture]:
        """Unseen scenes with the last question asked of each and the answer given."""
        asked = self.unseen(16)
        said = self.said(asked, asked.texts)
        out = []
        for s in range(16):
            i = int((asked.scene == s).nonzero()[-1])
            image = asked.images[s]
            image = image if image.dim() == 3 else torch.cat(list(image), dim=2)
            text = f"{asked.texts[i]} {self.answers[int(said[i])]}"
            out.append(Picture(image, text, bool(said[i] == asked.answer[i])))
        return out


class Dialogue(SceneQuestions):
    """Two turns about each of four drawings; the second needs the first.

    The same scene with another name has another answer: asked for one drawing a scene, the first
    turn is learned much later and with some seeds not at all.
    """

    about = "two-turn dialogue on scenes of four drawings: the question before says what `it` is"

    def others(self) -> list[str]:
        return list(PLACES)

    def ask(self, count: int, g: torch.Generator) -> Asked:
        rows = self.chosen(count, QUADRANTS, g)
        scenes = compose(self.pixels, self.boxes, rows, self.recipe.model.image_size, g)
        how = torch.randint(len(RELATIONS), (count, QUADRANTS), generator=g).tolist()
        texts, answer = [], []
        for drawings, relations in zip(rows.tolist(), how, strict=True):
            for p, r in enumerate(relations):
                relation, other = list(RELATIONS.items())[r]
                first = f"where is the {self.names[drawings[p]]} ?"
                texts += [first, f"{first} {PLACES[p]} . what is {relation} it ?"]
                answer += [p, len(PLACES) + drawings[other[p]]]
        scene = torch.arange(count).repeat_interleave(2 * QUADRANTS)
        kinds = ["first turn: where", "second turn: what is beside it"] * (count * QUADRANTS)
        return Asked(scenes.images, texts, scene, torch.tensor(answer), kinds)

    def evaluate(self) -> list[Figure]:
        """Both turns, and the second without the first."""
        asked = self.unseen(self.recipe.evaluated // QUADRANTS)
        said = self.said(asked, asked.texts)
        cut = [text.split(" . ")[-1] for text in asked.texts]
        first, second = dict.fromkeys(asked.kinds)
        return [
            self.figure(asked, said, second),
            self.figure(asked, self.said(asked, cut), second, ", history removed"),
            self.figure(asked, said, first),
        ]


class VideoQa(SceneQuestions):
    """What moves, and which way."""

    Recipe = VideoQaRecipe
    about = "four frames of two drawings, one of which moves: what, and which way"

    def others(self) -> list[str]:
        return [*WAYS, "nowhere"]

    def ask(self, count: int, g: torch.Generator) -> Asked:
        rows = self.chosen(count, 2, g)
        way = torch.randint(len(WAYS), (count,), generator=g)
        velocity = torch.tensor(list(WAYS.values()))[way] * SPEED
        model = self.recipe.model
        images = moving(self.pixels, rows, velocity, model.image_size, model.frames, g)
        still = (torch.rand(count, generator=g) < 0.2).tolist()
        texts, answer = [], []
        for (mover, other), w, s in zip(rows.tolist(), way.tolist(), still, strict=True):
            texts += [
                f"which way does the {self.names[other if s else mover]} go ?",
                "what moves ?",
            ]
            answer += [len(WAYS) if s else w, len(self.others()) + mover]
        scene = torch.arange(count).repeat_interleave(2)
        return Asked(
            images, texts, scene, torch.tensor(answer), ["which way", "what moves"] * count
        )

    def evaluate(self) -> list[Figure]:
        """Both kinds of question, and which way with the frames shuffled."""
        asked = self.unseen(self.recipe.evaluated)
        said = self.said(asked, asked.texts)
        g = torch.Generator().manual_seed(0)
        order = torch.rand(asked.images.shape[:2], generator=g).argsort(dim=1)
        mixed = asked.images[torch.arange(len(order))[:, None], order]
        shuffled = asked._replace(images=mixed)
        return [
            self.figure(asked, said, "which way"),
            self.figure(asked, said, "what moves"),
            self.figure(
                shuffled, self.said(shuffled, asked.texts), "which way", ", frames shuffled"
            ),
        ]
