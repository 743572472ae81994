"""Recipe `clip`: contrastive pre-training on OpenMoji drawings and names, and retrieval figures.

Each step: a batch of drawings, one varied name and one varied picture each; equal names are
matches. Zero-shot classification is in fusedmm.train.drawings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusedmm.models import CLIP, CLIPConfig, Tokenizer
from fusedmm.train.config import LoopConfig
from fusedmm.train.data import OpenMoji
from fusedmm.train.drawings import DrawingBatches, name_tokenizer
from fusedmm.train.evaluate import Retrieval, in_batches, labelled, retrieval
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=800))
    model: CLIPConfig = field(default_factory=CLIPConfig)
    limit: int | None = None
    variant_power: float = 0.7
    variant_group: int = 1
    word_drop: float = 0.15


def train_tokenizer(data: OpenMoji, config: CLIPConfig) -> Tokenizer:
    """The tokenizer of a CLIP with that config."""
    return name_tokenizer(data, vocab_size=config.vocab_size, length=config.context_length)


def build_clip(
    recipe: ClipRecipe, tokenizer: Tokenizer, backend: str | None = None, cls: type[CLIP] = CLIP
) -> CLIP:
    """The model with the initial weights of the recipe's seed."""
    torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
    config = replace(recipe.model, vocab_size=tokenizer.vocab_size)
    return cls(config, loss_backend=backend).to(device())


class ClipTask:
    """The loss of a step as a function of its number."""

    def __init__(
        self,
        recipe: ClipRecipe,
        data: OpenMoji,
        tokenizer: Tokenizer,
        backend: str | None = None,
        cls: type[CLIP] = CLIP,
    ) -> None:
        self.recipe, self.data, self.tokenizer = recipe, data, tokenizer
        self.model = build_clip(recipe, tokenizer, backend, cls)
        self.batches = DrawingBatches(
            data,
            tokenizer,
            recipe.loop,
            power=recipe.variant_power,
            group=recipe.variant_group,
            word_drop=recipe.word_drop,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, S, S], tokens [B, L] and the id of each name [B], on the device."""
        return self.batches.batch(step)

    def loss(self, step: int) -> dict[str, Tensor]:
        """Symmetric InfoNCE of this step's batch; also the temperature's multiplier."""
        loss = self.model.loss(*self.batch(step))
        return {"loss": loss, "logit_scale": self.model.logit_scale.exp()}


@torch.no_grad()
def embed(
    model: CLIP, tokenizer: Tokenizer, data: OpenMoji, rows: list[int], precision: str
) -> tuple[Tensor, Tensor]:
    """Unit embeddings of drawings and their captions, [len(rows), embed_dim] each, on the CPU."""
    model.eval()
    place = device()
    tokens = tokenizer.encode([data.drawings[i].caption for i in rows])
    with autocast(precision):
        images = in_batches(
            lambda part: model.encode_image(data.pixels(part).to(place)), torch.tensor(rows)
        )
        texts = in_batches(lambda part: model.encode_text(part.to(place)), tokens)
    return (
        torch.nn.functional.normalize(images, dim=-1),
        torch.nn.functional.normalize(texts, dim=-1),
    )


def one_per_base(data: OpenMoji, rows: list[int]) -> list[int]:
    """The first drawing of each base: the split without tone and gender variants."""
    seen: dict[str, int] = {}
    for i in sorted(rows, key=lambda i: (len(data.drawings[i].emoji), i)):
        seen.setdefault(data.drawings[i].base, i)
    return sorted(seen.values())


def evaluate_clip(
    model: CLIP, tokenizer: Tokenizer, data: OpenMoji, split: str, precision: str
) -> dict[str, Retrieval]:
    """Retrieval both ways over a split, and over one drawing per base of it (the harder words)."""
    out = {}
    rows = data.indices(split)
    images, texts = embed(model, tokenizer, data, rows, precision)
    place = {row: i for i, row in enumerate(rows)}
    for name, part in (("all", rows), ("bases", one_per_base(data, rows))):
        at = torch.tensor([place[i] for i in part])
        out[f"text_to_image/{name}"] = retrieval(texts[at], images[at])
        out[f"image_to_text/{name}"] = retrieval(images[at], texts[at])
    return out


def evaluate_bases(
    model: CLIP, tokenizer: Tokenizer, data: OpenMoji, split: str, precision: str
) -> dict[str, dict[str, float]]:
    """Figures over a split where every drawing or caption of the same base is right."""
    rows = data.indices(split)
    images, texts = embed(model, tokenizer, data, rows, precision)
    return labelled(images, texts, [data.drawings[i].base for i in rows])
