"""Recipe `vlp`: contrastive, matching, masked words and captioning together on OpenMoji.

Mismatched pairs of the matching loss are drawn from the batch, the likelier the more similar the
towers find them. Captions of held-out drawings are scored by BLEU and ROUGE.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import CLIPConfig
from fusedmm.models.vlp import VLP, VLPConfig
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import DrawingBatches, name_tokenizer
from fusedmm.train.evaluate import in_batches, text_overlap
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import mask_tokens, step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import recall_figure


@dataclass(frozen=True)
class VlpRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=600, batch_size=64, lr=1e-3, compare_steps=16)
    )
    model: VLPConfig = field(
        default_factory=lambda: VLPConfig(vision=CLIPConfig(image_size=32, vision_layers=2))
    )
    limit: int | None = None
    mask_probability: float = 0.25


class Vlp(System):
    """The model on OpenMoji."""

    Recipe = VlpRecipe
    about = "two towers, a co-attention fusion encoder and a captioning decoder on OpenMoji"
    op = "co_attention"

    def __init__(self, recipe: VlpRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        self.data = sources.openmoji(recipe.model.vision.image_size, recipe.limit)
        self.tokenizer = name_tokenizer(
            self.data, vocab_size=recipe.model.vocab_size, length=recipe.model.max_position
        )
        self.batches = DrawingBatches(self.data, self.tokenizer, recipe.loop, word_drop=0.0)
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, vocab_size=self.tokenizer.vocab_size)
        self.model = VLP(config, backend=backend).to(device())

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Varied pictures and names, ids [B] of the names, plain captions [B, N]."""
        images, tokens, ids = self.batches.batch(step)
        captions = [self.data.drawings[i].caption for i in self.batches.rows(step).tolist()]
        return images, tokens, ids, self.tokenizer.encode(captions).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """The four losses, each in nats."""
        model, pad = self.model, self.tokenizer.pad
        images, tokens, ids, captions = self.batch(step)
        keep = tokens != pad
        g = torch.Generator().manual_seed(step_seed(self.recipe.loop.seed, step, stream=5))
        image, x = model.encode_image(images)
        text, y = model.encode_text(tokens, keep)
        itc = model.contrastive(x, y, ids)

        other_text, other_image = self.mismatches(x, y, ids, g)
        b = len(ids)
        logits = model.matching_logits(
            torch.cat([image, image, image[other_image]]),
            torch.cat([text, text[other_text], text]),
            torch.cat([keep, keep[other_text], keep]),
        )
        target = torch.zeros(3 * b, dtype=torch.long, device=logits.device)
        target[:b] = 1
        weight = torch.tensor([1.0, 2.0], device=logits.device)  # two mismatches to a match
        itm = F.cross_entropy(logits.float(), target, weight)

        masked, words = mask_tokens(tokens.cpu(), self.tokenizer, self.recipe.mask_probability, g)
        words = words.to(tokens.device)
        at = words >= 0
        hidden, _ = model.encode_text(masked.to(tokens.device), keep)
        said = model.word_logits(image, hidden, keep, at).float()
        mlm = F.cross_entropy(said, words[at], reduction="sum") / at.sum().clamp(min=1)

        following = captions[:, 1:].masked_fill(captions[:, 1:] == pad, -100)
        spoken = model.caption_logits(image, captions[:, :-1]).float()
        lm = F.cross_entropy(spoken.flatten(0, 1), following.flatten())
        return {"loss": itc + itm + mlm + lm, "itc": itc, "itm": itm, "mlm": mlm, "captions": lm}

    def mismatches(
        self, x: Tensor, y: Tensor, ids: Tensor, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """For each picture another name and for each name another picture, [B] each, drawn by
        similarity; never one with the same id."""
        with torch.no_grad():
            s = (F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T).cpu() * 5
            s = s.masked_fill((ids[:, None] == ids[None, :]).cpu(), float("-inf"))
            return tuple(
                torch.multinomial(p.softmax(dim=-1), 1, generator=g)[:, 0].to(x.device)
                for p in (s, s.T)
            )

    @torch.no_grad()
    def captions(self, rows: list[int]) -> list[str]:
        """Greedy captions of drawings."""
        self.model.eval()
        t = self.tokenizer

        def write(part: Tensor) -> Tensor:
            return self.model.caption(self.data.pixels(part).to(device()), t.start, t.end)

        with autocast(self.recipe.loop.precision):
            ids = in_batches(write, torch.tensor(rows)).long()
        return [t.decode(row.tolist()) for row in ids]

    @torch.no_grad()
    def evaluate(self) -> list[Figure]:
        """Retrieval, matching against a random other name, and captions, on held-out drawings."""
        rows = self.data.indices("test")
        names = [self.data.drawings[i].caption for i in rows]
        tokens = self.tokenizer.encode(names)
        model, pad, n = self.model.eval(), self.tokenizer.pad, len(rows)
        g = torch.Generator().manual_seed(0)
        other = (torch.arange(n) + torch.randint(1, n, (n,), generator=g)) % n

        def picture(part: Tensor) -> Tensor:
            return model.encode_image(self.data.pixels(part).to(device()))[1]

        def name(part: Tensor) -> Tensor:
            part = part.to(device())
            return model.encode_text(part, part != pad)[1]

        def matches(which: Tensor, part: Tensor) -> Tensor:
            part = part.to(device())
            image, _ = model.encode_image(self.data.pixels(which).to(device()))
            text, _ = model.encode_text(part, part != pad)
            return model.matching_logits(image, text, part != pad).argmax(dim=-1)

        index = torch.tensor(rows)
        with autocast(self.recipe.loop.precision):
            recall = recall_figure(
                "text to image", in_batches(name, tokens), in_batches(picture, index)
            )
            own = in_batches(matches, index, tokens).mean()
            wrong = in_batches(matches, index, tokens[other]).mean()
        written = self.captions(rows)
        shuffled = [names[i] for i in other.tolist()]
        bleu, rouge = text_overlap(written, names)
        bleu_chance, rouge_chance = text_overlap(written, shuffled)
        what = "captions of other drawings"
        return [
            recall,
            Figure("matching", float(own + 1 - wrong) / 2, 0.5, "coin", 2 * n),
            Figure("caption BLEU-4", bleu, bleu_chance, what, n, ""),
            Figure("caption ROUGE-L", rouge, rouge_chance, what, n, ""),
        ]

    def gallery(self) -> list[Picture]:
        """Drawings at even distances with their written captions."""
        rows = self.data.indices("test")
        rows = rows[:: max(1, len(rows) // 24)][:24]
        return [
            Picture(self.data.pixels([i])[0], text, text == self.data.drawings[i].caption.lower())
            for i, text in zip(rows, self.captions(rows), strict=True)
        ]
