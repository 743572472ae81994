"""Recipe `vlap`: drawings, their names and the names spoken aloud meet in one space.

Two voices are heard in training; the third speaks the held-out names, so that neither the word nor
the voice is known. All three pairings are one batched contrastive call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models.vlap import VLAP, VLAPConfig
from fusedmm.train import console
from fusedmm.train.clip import embed
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import DrawingBatches, name_tokenizer
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.speech import VOICES, spoken
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import recall_figure, tower_gallery


@dataclass(frozen=True)
class VlapRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=700, batch_size=96, lr=1e-3, compare_steps=16)
    )
    model: VLAPConfig = field(default_factory=VLAPConfig)
    limit: int | None = None


class Vlap(System):
    """Three towers on OpenMoji and eSpeak NG."""

    Recipe = VlapRecipe
    about = "vision, language and audio towers; three pairings in one batched contrastive call"
    op = "contrastive_loss"

    def __init__(self, recipe: VlapRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        towers = recipe.model.clip
        self.data = sources.openmoji(towers.image_size, recipe.limit)
        self.tokenizer = name_tokenizer(
            self.data, vocab_size=towers.vocab_size, length=towers.context_length
        )
        self.batches = DrawingBatches(self.data, self.tokenizer, recipe.loop)
        captions = [d.caption for d in self.data.drawings]
        with console.meter("speak the names", len(VOICES) * len(captions)) as meter:
            self.mel = torch.stack(
                [
                    spoken(
                        sources.cache, captions, voice,
                        on_progress=lambda done, total, v=v: meter.update(v * total + done),
                    )
                    for v, voice in enumerate(VOICES)
                ]
            )  # fmt: skip
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, clip=replace(towers, vocab_size=self.tokenizer.vocab_size))
        self.model = VLAP(config, loss_backend=backend).to(device())

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, tokens, log-mel [B, mels, frames] and ids [B] of the drawings' names."""
        rows, images, texts = self.batches.draw(step)
        g = torch.Generator().manual_seed(step_seed(self.recipe.loop.seed, step, stream=5))
        voice = torch.randint(len(VOICES) - 1, (len(rows),), generator=g)
        mel = self.mel[voice, rows].float()
        shift = int(torch.randint(-4, 5, (1,), generator=g))
        columns = (images, self.tokenizer.encode(texts), mel.roll(shift, dims=-1), rows)
        return tuple(c.to(device()) for c in columns)

    def loss(self, step: int) -> dict[str, Tensor]:
        """Mean of the three contrastive losses."""
        loss = self.model.loss(*self.batch(step))
        return {"loss": loss, "logit_scale": self.model.logit_scale.exp()}

    @torch.no_grad()
    def heard(self, rows: list[int]) -> Tensor:
        """Unit embeddings of the names in the unheard voice, [len(rows), D]."""
        self.model.eval()
        with autocast(self.recipe.loop.precision):
            out = in_batches(
                lambda part: self.model.audio(self.mel[-1, part].float().to(device())),
                torch.tensor(rows),
            )
        return F.normalize(out, dim=-1)

    def evaluate(self) -> list[Figure]:
        """Retrieval among held-out drawings over each pairing, recall at 10."""
        rows = self.data.indices("test")
        images, texts = embed(
            self.model, self.tokenizer, self.data, rows, self.recipe.loop.precision
        )
        audio = self.heard(rows)
        return [
            recall_figure("speech to image", audio, images),
            recall_figure("text to image", texts, images),
            recall_figure("speech to text", audio, texts),
        ]

    def gallery(self) -> list[Picture]:
        """Drawings with the names nearest to them."""
        return tower_gallery(self)
