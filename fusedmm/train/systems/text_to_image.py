"""Recipe `text-to-image`: discrete tokens of drawings first, then a decoder that writes them.

The first steps train the autoencoder, the rest the decoder. A trained CLIP judges: how much better
a drawing fits the caption it was made for than another drawing's caption.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models.text_to_image import TextToImage as Model
from fusedmm.models.text_to_image import TextToImageConfig
from fusedmm.train.clip import one_per_base
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import DrawingBatches, name_tokenizer
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System


@dataclass(frozen=True)
class TextToImageRecipe:
    """Everything that decides the numbers of this recipe, given the CLIP that judges."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=2500, batch_size=48, lr=1.5e-3, compare_steps=0)
    )
    model: TextToImageConfig = field(default_factory=TextToImageConfig)
    limit: int | None = None
    tokeniser_steps: int = 500
    drop_caption: float = 0.1
    evaluated: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.tokeniser_steps < self.loop.steps:
            raise ValueError(
                f"tokeniser_steps: expected 1..{self.loop.steps - 1} to fit loop.steps, "
                f"got {self.tokeniser_steps}"
            )


class TextToImage(System):
    """Discrete autoencoder and decoder on OpenMoji."""

    Recipe = TextToImageRecipe
    about = "discrete image tokens and a decoder that writes them from a caption, on OpenMoji"
    needs = ("clip",)

    def __init__(
        self, recipe: TextToImageRecipe, sources: Sources, backend: str | None = None
    ) -> None:
        self.recipe = recipe
        self.judge, self.judge_tokenizer, _ = sources.trained("clip")
        self.judge.to(device())
        self.data = sources.openmoji(recipe.model.image_size, recipe.limit)
        self.tokenizer = name_tokenizer(
            self.data, vocab_size=recipe.model.vocab_size, length=recipe.model.text_length
        )
        self.batches = DrawingBatches(self.data, self.tokenizer, recipe.loop, word_drop=0.05)
        self.empty = self.tokenizer.encode([""])[0]
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, vocab_size=self.tokenizer.vocab_size)
        self.model = Model(config).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """Reconstruction in the first steps, then nats an image token."""
        model, recipe = self.model, self.recipe
        images, tokens, _ = self.batches.batch(step)
        if step < recipe.tokeniser_steps:
            codes, _ = model.autoencoder.encode(images)
            error = (model.autoencoder.decode(codes) - images).square().mean()
            return {"loss": 10 * error}
        model.autoencoder.eval()
        with torch.no_grad():
            drawn = model.autoencoder.encode(images)[1]
        g = torch.Generator().manual_seed(step_seed(recipe.loop.seed, step, stream=5))
        dropped = torch.rand(len(tokens), generator=g) < recipe.drop_caption
        tokens = torch.where(dropped.to(device())[:, None], self.empty.to(device()), tokens)
        return {"loss": model.loss(tokens, drawn)}

    @torch.no_grad()
    def drawn(self, rows: list[int]) -> Tensor:
        """A picture for each caption, [len(rows), 3, S, S]."""
        self.model.eval()
        text = self.tokenizer.encode([self.data.drawings[i].caption for i in rows])
        g = torch.Generator().manual_seed(step_seed(self.recipe.loop.seed, 0, stream=7))
        with autocast(self.recipe.loop.precision):
            return in_batches(
                lambda t: self.model.draw(t.to(device()), self.empty.to(device()), g), text
            )

    @torch.no_grad()
    def fits(self, pictures: Tensor, rows: list[int]) -> Tensor:
        """Cosine of each picture [N] with each caption [N] by the judge, [N, N]."""
        size = self.judge.config.image_size
        large = F.interpolate(pictures, size=(size, size), mode="bilinear").clamp(0, 1)
        tokens = self.judge_tokenizer.encode([self.data.drawings[i].caption for i in rows])
        self.judge.eval()
        x = in_batches(lambda p: self.judge.encode_image(p.to(device())), large)
        y = in_batches(lambda t: self.judge.encode_text(t.to(device())), tokens)
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T

    def fit_figures(self, name: str, pictures: Tensor, rows: list[int]) -> list[Figure]:
        """How much better pictures fit their own caption than those of the other rows."""
        s, n = self.fits(pictures, rows), len(rows)
        others, own = ~torch.eye(n, dtype=torch.bool), s.diagonal()
        wins = float((own[:, None] > s)[others].double().mean())
        other = float(s[others].mean())
        return [
            Figure(f"own caption fits better, {name}", wins, 0.5, "coin", n * (n - 1)),
            Figure(f"CLIP score, {name}", float(own.mean()), other, "other captions", n, ""),
        ]

    @torch.no_grad()
    def evaluate(self) -> list[Figure]:
        """CLIP score against other captions, for names held out and seen; reconstruction."""
        out = []
        for name, split in (("held-out names", "test"), ("training names", "train")):
            rows = one_per_base(self.data, self.data.indices(split))
            rows = rows[:: max(1, len(rows) // self.recipe.evaluated)][: self.recipe.evaluated]
            out += self.fit_figures(name, self.drawn(rows), rows)
            if split == "test":  # as far as the judge itself can tell
                out += self.fit_figures(f"{name}, the real drawings", self.data.pixels(rows), rows)
        rows = self.data.indices("test")
        images = self.data.pixels(rows)
        auto = self.model.autoencoder

        def rebuilt(x: Tensor) -> Tensor:
            return auto.decode(auto.encode(x.to(device()))[0])

        with autocast(self.recipe.loop.precision):
            error = float((in_batches(rebuilt, images) - images).square().mean())
        mean = self.data.pixels(self.data.indices("train")).mean(dim=0)
        base = float((images - mean).square().mean())
        what = "mean training picture"
        return [*out, Figure("squared error through tokens", error, base, what, len(rows), "",
                             lower_is_better=True)]  # fmt: skip

    def gallery(self) -> list[Picture]:
        """What is drawn for 12 training names, then for 12 held-out ones."""
        rows = []
        for split in ("train", "test"):
            bases = one_per_base(self.data, self.data.indices(split))
            rows += bases[:: max(1, len(bases) // 12)][:12]
        pictures = self.drawn(rows)
        return [
            Picture(p, self.data.drawings[i].caption) for p, i in zip(pictures, rows, strict=True)
        ]
