"""Recipe `grounding`: find a named drawing on a canvas of four, composed anew at every step.

Held out twice: new scenes of drawings seen in training, and scenes of drawings never seen. Four
drawings stand in four quadrants at random places and sizes; boxes hug what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusedmm.models.grounding import Grounder, GrounderConfig, box_iou, grounding_loss
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import name_tokenizer
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.scenes import QUADRANTS, Scenes, compose, drawn_boxes, nameable

DRAWING_SIZE = 32


@dataclass(frozen=True)
class GroundingRecipe:
    """Everything that decides the numbers of this recipe; `batch_size` counts scenes."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=600, batch_size=48, lr=1e-3, compare_steps=16)
    )
    model: GrounderConfig = field(default_factory=GrounderConfig)
    names: int = 300
    phrases: int = 2
    evaluated: int = 1024
    limit: int | None = None


class Grounding(System):
    """The detector on composed scenes."""

    Recipe = GroundingRecipe
    about = "a detector with bidirectional fusion finds a named drawing among four on a canvas"
    op = "bi_attention"

    def __init__(
        self, recipe: GroundingRecipe, sources: Sources, backend: str | None = None
    ) -> None:
        self.recipe = recipe
        self.data = sources.openmoji(DRAWING_SIZE, recipe.limit)
        self.tokenizer = name_tokenizer(
            self.data, vocab_size=recipe.model.vocab_size, length=recipe.model.max_position
        )
        self.pixels = self.data.pixels(list(range(len(self.data))))
        self.boxes = drawn_boxes(self.pixels)
        self.tokens = self.tokenizer.encode([d.caption for d in self.data.drawings])
        self.known = nameable(self.data, "train")[: recipe.names]
        self.unknown = nameable(self.data, "test")
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, vocab_size=self.tokenizer.vocab_size)
        self.model = Grounder(config, backend=backend).to(device())

    def scenes(self, rows: Tensor, count: int, g: torch.Generator) -> tuple[Scenes, Tensor, Tensor]:
        """`count` canvases of four different rows; which scene [Q] and place [Q] is asked for."""
        chosen = torch.stack(
            [rows[torch.randperm(len(rows), generator=g)[:QUADRANTS]] for _ in range(count)]
        )
        size, phrases = self.recipe.model.image_size, self.recipe.phrases
        out = compose(self.pixels, self.boxes, chosen, size, g)
        place = torch.stack(
            [torch.randperm(QUADRANTS, generator=g)[:phrases] for _ in range(count)]
        )
        return out, torch.arange(count).repeat_interleave(phrases), place.flatten()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Canvases, tokens [Q, N], kept ones, scene [Q] and target boxes [Q, 4], on the device."""
        g = torch.Generator().manual_seed(step_seed(self.recipe.loop.seed, step, stream=3))
        return self.asked(*self.scenes(self.known, self.recipe.loop.batch_size, g))

    def asked(self, scenes: Scenes, scene: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """The model's inputs and the target."""
        tokens = self.tokens[scenes.drawings[scene, place]]
        columns = (scenes.images, tokens, tokens != self.tokenizer.pad, scene)
        return tuple(c.to(device()) for c in (*columns, scenes.boxes[scene, place]))

    def loss(self, step: int) -> dict[str, Tensor]:
        """Where, and how large."""
        *inputs, target = self.batch(step)
        scores, boxes = self.model(*inputs)
        where, box = grounding_loss(scores, boxes, target, self.model.centres)
        return {"loss": where + box, "where": where, "box": box}

    @torch.no_grad()
    def found(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Scenes, Tensor, Tensor]:
        """Best box [Q, 4] and its IoU [Q] in scenes of `rows` that training did not see."""
        self.model.eval()
        g = torch.Generator().manual_seed(step_seed(self.recipe.loop.seed, 0, stream=7))
        scenes, scene, place = self.scenes(rows, count, g)
        images, tokens, keep, scene, target = self.asked(scenes, scene, place)

        def best(part: Tensor, words: Tensor, kept: Tensor) -> Tensor:
            scores, boxes = self.model(images, words, kept, part)
            return boxes[torch.arange(len(part)), scores.argmax(dim=-1)]

        with autocast(self.recipe.loop.precision):
            boxes = in_batches(best, scene, tokens, keep)
        return boxes, box_iou(boxes, target.cpu()), scenes, scene.cpu(), place

    def evaluate(self) -> list[Figure]:
        """Share of phrases whose best box overlaps the right one by half, in unseen scenes."""
        out = []
        count = self.recipe.evaluated // self.recipe.phrases
        for name, rows in (("new scenes", self.known), ("drawings never seen", self.unknown)):
            _, iou, *_ = self.found(rows, count)
            hit = float((iou >= 0.5).double().mean())
            what = "one of the four, perfect box"
            out.append(Figure(f"IoU 0.5 recall, {name}", hit, 1 / QUADRANTS, what, len(iou)))
        return out

    def gallery(self) -> list[Picture]:
        """Scenes with the box found (green right, red wrong) and the right one (blue)."""
        boxes, iou, scenes, scene, place = self.found(self.known, 24)
        out = []
        for i in range(0, len(scene), self.recipe.phrases):
            s, p = int(scene[i]), int(place[i])
            right = bool(iou[i] >= 0.5)
            frames = tuple(
                ((float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])), colour)
                for b, colour in (
                    (scenes.boxes[s, p], "#1b6ca8"),
                    (boxes[i], "#2e8b57" if right else "#d22f27"),
                )
            )
            caption = self.data.drawings[int(scenes.drawings[s, p])].caption
            out.append(Picture(scenes.images[s], caption, right, frames))
        return out
