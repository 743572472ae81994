"""Recipe `autoencoder`: rebuild drawings and names from one latent space.

Losses: both reconstructions from their own code and from the code of [x, y], and consistency, which
is a contrastive loss between the codes of a pair. Judged by reconstruction and retrieval through Z.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedmm
from fusedmm.models.autoencoder import AutoencoderConfig, Codes, JointAutoencoder
from fusedmm.models.clip import STANDARD, standard_contrastive_loss
from fusedmm.train.config import LoopConfig
from fusedmm.train.drawings import DrawingBatches, name_tokenizer
from fusedmm.train.evaluate import in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import recall_figure


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=600, batch_size=64, lr=2e-3, compare_steps=16)
    )
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    limit: int | None = None
    image_weight: float = 20.0
    consistency: float = 0.5


class Autoencoder(System):
    """The joint autoencoder on OpenMoji."""

    Recipe = AutoencoderRecipe
    about = "a convolutional and an LSTM autoencoder that share a latent space, on OpenMoji"
    op = "contrastive_loss"

    def __init__(
        self, recipe: AutoencoderRecipe, sources: Sources, backend: str | None = None
    ) -> None:
        self.recipe, self.backend = recipe, backend
        self.data = sources.openmoji(recipe.model.image_size, recipe.limit)
        self.tokenizer = name_tokenizer(
            self.data, vocab_size=recipe.model.vocab_size, length=recipe.model.length
        )
        self.batches = DrawingBatches(self.data, self.tokenizer, recipe.loop, word_drop=0.0)
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, vocab_size=self.tokenizer.vocab_size)
        self.model = JointAutoencoder(config).to(device())

    def contrast(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Consistency of the codes of a pair, against those of the batch."""
        scale = 1 / self.recipe.model.temperature
        with torch.autocast(x.device.type, enabled=False):
            if self.backend == STANDARD:
                return standard_contrastive_loss(x, y, x.new_tensor(scale), ids)
            return fusedmm.contrastive_loss(
                x, y, scale, ids_x=ids, ids_y=ids, normalize=True, backend=self.backend
            )

    def rebuild(self, codes: Codes, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(mean squared error of pictures, nats a word), each over own code and joint code."""
        following = tokens[:, 1:].masked_fill(tokens[:, 1:] == self.tokenizer.pad, -100)
        picture = self.model.image_decoder(torch.cat([codes.image, codes.both]))
        words = self.model.text_decoder(
            torch.cat([codes.text, codes.both]), tokens[:, :-1].repeat(2, 1)
        )
        return (
            F.mse_loss(picture, images.repeat(2, 1, 1, 1)),
            F.cross_entropy(words.float().flatten(0, 1), following.repeat(2, 1).flatten()),
        )

    def loss(self, step: int) -> dict[str, Tensor]:
        """Reconstruction of both and consistency."""
        images, tokens, ids = self.batches.batch(step)
        codes = self.model.encode(images, tokens, tokens != self.tokenizer.pad)
        image, text = self.rebuild(codes, images, tokens)
        same = self.contrast(codes.image, codes.text, ids)
        total = self.recipe.image_weight * image + text + self.recipe.consistency * same
        return {"loss": total, "image": image, "text": text, "consistency": same}

    @torch.no_grad()
    def held_out(self) -> tuple[Tensor, Tensor, Codes]:
        """Pictures [N, 3, S, S], tokens [N, L] and codes of the test drawings."""
        self.model.eval()
        rows = self.data.indices("test")
        tokens = self.tokenizer.encode([self.data.drawings[i].caption for i in rows])
        images = self.data.pixels(rows)

        def encode(x: Tensor, t: Tensor) -> Tensor:
            x, t = x.to(device()), t.to(device())
            return torch.cat(self.model.encode(x, t, t != self.tokenizer.pad), dim=1)

        with autocast(self.recipe.loop.precision):
            codes = in_batches(encode, images, tokens)
        return images, tokens, Codes(*codes.chunk(3, dim=1))

    @torch.no_grad()
    def evaluate(self) -> list[Figure]:
        """Retrieval through Z, and what is lost in reconstruction from the joint code."""
        images, tokens, codes = self.held_out()
        n = len(images)
        out = [
            recall_figure("text to image through Z", codes.text, codes.image),
            recall_figure("image to text through Z", codes.image, codes.text),
        ]
        mean = self.data.pixels(self.data.indices("train")).mean(dim=0)
        base = float((images - mean).square().mean())
        with autocast(self.recipe.loop.precision):
            for name, code in (("picture", codes.image), ("picture and name", codes.both)):
                built = in_batches(lambda c: self.model.image_decoder(c.to(device())), code)
                error = float((built - images).square().mean())
                what = "mean training picture"
                out.append(
                    Figure(f"squared error of pictures from {name}", error, base, what, n, "",
                           lower_is_better=True)
                )  # fmt: skip
            target = tokens[:, 1:]
            kept = target != self.tokenizer.pad
            common = float(target[kept].bincount().max()) / int(kept.sum())
            for name, code in (("name", codes.text), ("picture", codes.image)):
                said = in_batches(
                    lambda c, t: self.model.text_decoder(c.to(device()), t.to(device())).argmax(
                        dim=-1
                    ),
                    code,
                    tokens[:, :-1],
                )
                right = float((said[kept] == target[kept]).double().mean())
                out.append(
                    Figure(f"next piece of names from {name}", right, common, "commonest piece",
                           int(kept.sum()))
                )  # fmt: skip
        return out

    @torch.no_grad()
    def gallery(self) -> list[Picture]:
        """Held-out drawings beside what was rebuilt from picture and name."""
        images, _, codes = self.held_out()
        step = max(1, len(images) // 12)
        with autocast(self.recipe.loop.precision):
            built = in_batches(
                lambda c: self.model.image_decoder(c.to(device())), codes.image[::step]
            )
        names = [self.data.drawings[i].caption for i in self.data.indices("test")[::step]]
        out = []
        for image, again, name in zip(images[::step], built, names, strict=True):
            out += [Picture(image, name), Picture(again, "rebuilt")]
        return out[:24]
