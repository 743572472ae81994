"""Recipe `vilbert`: masked words and image-text matching, hard negatives from a trained CLIP.

Half of a batch is mismatched: another name for the drawing or another drawing for the name, mostly
ones the CLIP finds similar. Regions are the CLIP's frozen grid features. Left out: masked-region
modelling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import CLIP, Tokenizer, ViLBERT, ViLBERTConfig
from fusedmm.train.clip import embed
from fusedmm.train.config import LoopConfig
from fusedmm.train.data import OpenMoji
from fusedmm.train.evaluate import hardest_others, in_batches
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import Sampler, augment, mask_tokens, may_flip, step_seed


@dataclass(frozen=True)
class ViLBERTRecipe:
    """Everything that decides the numbers of this recipe, given the CLIP it starts from."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=350, batch_size=128, lr=1e-3, warmup=60)
    )
    model: ViLBERTConfig = field(default_factory=ViLBERTConfig)
    limit: int | None = None
    variant_power: float = 0.7
    mask_probability: float = 0.2
    views: int = 3
    hard_negatives: int = 16
    random_negatives: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise ValueError(
                f"mask_probability: expected between 0 and 1, got {self.mask_probability}"
            )
        for name in ("views", "hard_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def build_vilbert(
    recipe: ViLBERTRecipe, clip: CLIP, tokenizer: Tokenizer, backend: str | None = None
) -> ViLBERT:
    """The model with the recipe's initial weights: CLIP's words, and its picture tower, frozen."""
    torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
    config = replace(
        recipe.model,
        vocab_size=tokenizer.vocab_size,
        max_position=tokenizer.length,
        regions=clip.config,
    )
    model = ViLBERT(config, attention_backend=backend)
    model.region_encoder.load_state_dict(clip.visual.state_dict())
    words, known = model.embeddings.word_embeddings.weight, clip.token_embedding.weight
    if words.shape == known.shape:  # same tokenizer, same width: start from words that CLIP knows
        words.data.copy_(known)
    return model.to(device())


@torch.no_grad()
def similar_rows(
    clip: CLIP, tokenizer: Tokenizer, data: OpenMoji, rows: list[int], count: int, precision: str
) -> tuple[Tensor, Tensor]:
    """What a CLIP mistakes for what, as positions into `rows`.

    Returns: (names most like each drawing [N, count], drawings most like each name [N, count]),
        true matches (the same caption) left out.
    """
    images, texts = embed(clip, tokenizer, data, rows, precision)
    captions = [data.drawings[i].caption.lower() for i in rows]
    ids = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([ids[c] for c in captions])
    same = which[:, None] == which[None, :]
    count = min(count, len(rows) - 1)
    scores = images @ texts.T  # [drawing, name]
    return hardest_others(scores, same, count), hardest_others(scores.T, same, count)


@torch.no_grad()
def region_features(
    model: ViLBERT,
    data: OpenMoji,
    rows: list[int],
    *,
    precision: str,
    views: int = 1,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Frozen features of `rows`, [views, len(rows), 1 + grid^2, width] bf16; view 0 is as drawn."""
    flips = torch.tensor([may_flip(data.drawings[i]) for i in rows])
    index = torch.tensor(rows)
    place = device()
    out = []
    with autocast(precision):
        for view in range(views):
            generator = torch.Generator().manual_seed(step_seed(seed, view, stream=4))
            parts = []
            for start in range(0, len(rows), 256):
                part = slice(start, start + 256)
                images = data.pixels(index[part])
                if view:
                    images = augment(images, flips[part], generator)
                parts.append(model.regions(images.to(place)).bfloat16())
                if on_progress is not None:
                    on_progress(view * len(rows) + min(start + 256, len(rows)))
            out.append(torch.cat(parts))
    return torch.stack(out)


class ViLBERTTask:
    """The loss of a step as a function of its number."""

    def __init__(
        self,
        recipe: ViLBERTRecipe,
        data: OpenMoji,
        tokenizer: Tokenizer,
        clip: CLIP,
        backend: str | None = None,
        *,
        cached: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.recipe, self.data, self.tokenizer = recipe, data, tokenizer
        self.model = build_vilbert(recipe, clip, tokenizer, backend)
        rows = data.indices("train")
        precision = recipe.loop.precision
        self.sampler = Sampler(
            [data.drawings[i].base for i in rows],
            recipe.loop.batch_size,
            seed=recipe.loop.seed,
            power=recipe.variant_power,
        )
        self.tokens = tokenizer.encode([data.drawings[i].caption for i in rows])
        if cached is None:
            features = region_features(
                self.model, data, rows, precision=precision, views=recipe.views,
                seed=recipe.loop.seed, on_progress=on_progress,
            )  # fmt: skip
            similar = similar_rows(clip, tokenizer, data, rows, recipe.hard_negatives, precision)
            cached = features, similar
        self.cached = cached
        self.features, (self.names_like, self.drawings_like) = cached

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Region features [B, M, width], masked tokens [B, N], targets [B, N] (-100: none) and
        whether the pair belongs together [B]."""
        recipe = self.recipe
        g = torch.Generator().manual_seed(step_seed(recipe.loop.seed, step, stream=3))
        rows = self.sampler.rows(step)
        b = len(rows)

        def coin(p: float) -> Tensor:
            return torch.rand(b, generator=g) < p

        def pick(like: Tensor) -> Tensor:
            hard = like[rows, torch.randint(like.shape[1], (b,), generator=g)]
            any_row = torch.randint(len(self.tokens), (b,), generator=g)
            return torch.where(coin(recipe.random_negatives), any_row, hard)

        other_name, other_drawing = pick(self.names_like), pick(self.drawings_like)
        match, swap_name = coin(0.5), coin(0.5)
        name_rows = torch.where(~match & swap_name, other_name, rows)
        drawing_rows = torch.where(~match & ~swap_name, other_drawing, rows)
        # A random negative may be the row itself or bear its name: then the pair belongs together.
        match = match | (self.tokens[name_rows] == self.tokens[drawing_rows]).all(dim=1)
        view = torch.randint(len(self.features), (b,), generator=g)
        tokens, target = mask_tokens(
            self.tokens[name_rows], self.tokenizer, recipe.mask_probability, g
        )
        target = target.masked_fill(~match[:, None], -100)
        place = device()
        features = (
            self.features[view, drawing_rows]
            if self.features.device.type == "cpu"
            else (self.features[view.to(place), drawing_rows.to(place)])
        )
        return features, tokens.to(place), target.to(place), match.to(place)

    def loss(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy of masked pieces on matched pairs plus that of matching on all pairs."""
        features, tokens, target, match = self.batch(step)
        encoded = self.model.encode(features.float(), tokens, tokens != self.tokenizer.pad)
        at = target >= 0
        logits = self.model.mlm_logits(encoded.text[at]).float()
        # A batch without a masked piece has no such loss; the sum over nothing keeps the graph.
        mlm = F.cross_entropy(logits, target[at], reduction="sum") / at.sum().clamp(min=1)
        itm = F.cross_entropy(self.model.matching_logits(encoded).float(), match.long())
        return {"loss": mlm + itm, "mlm": mlm, "itm": itm}


@torch.no_grad()
def matching_scores(
    model: ViLBERT, features: Tensor, tokens: Tensor, pad: int, precision: str
) -> Tensor:
    """log p(match) - log p(mismatch) of each (drawing, name) row, [N] on the CPU."""
    model.eval()
    place = device()

    def score(f: Tensor, t: Tensor) -> Tensor:
        t = t.to(place)
        logits = model.matching_logits(model.encode(f.to(place).float(), t, t != pad)).float()
        return logits[:, 1] - logits[:, 0]

    with autocast(precision):
        return in_batches(score, features, tokens)


@torch.no_grad()
def evaluate_vilbert(
    model: ViLBERT, clip: CLIP, tokenizer: Tokenizer, data: OpenMoji, split: str, precision: str
) -> dict[str, float]:
    """Held-out figures: matching accuracy against random and against hard names, masked pieces.

    Each drawing is shown once with its own name and once with another, so chance is one half. The
    other name is drawn at random, or is one of the ten the CLIP likes best for the drawing. Masked
    pieces: each piece of each name is hidden in turn; with the right drawing and with another one.
    """
    model.eval()
    rows = data.indices(split)
    n = len(rows)
    features = region_features(model, data, rows, precision=precision)[0]
    tokens = tokenizer.encode([data.drawings[i].caption for i in rows])
    names_like, _ = similar_rows(clip, tokenizer, data, rows, 10, precision)
    g = torch.Generator().manual_seed(0)
    shift = torch.randint(1, n, (n,), generator=g)
    random_name = (torch.arange(n) + shift) % n
    hard_name = names_like[torch.arange(n), torch.randint(names_like.shape[1], (n,), generator=g)]

    def score(which: Tensor) -> Tensor:
        return matching_scores(model, features, tokens[which], tokenizer.pad, precision)

    own = score(torch.arange(n)) > 0
    out = {"count": n, "chance": 0.5}
    for name, which in (("random", random_name), ("hard", hard_name)):
        other = score(which) > 0
        out[f"matching_accuracy_{name}"] = float(
            (own.float().mean() + 1 - other.float().mean()) / 2
        )

    place = device()
    at = [(i, j) for i in range(n) for j in range(1, int((tokens[i] != tokenizer.pad).sum()) - 1)]
    row, column = torch.tensor(at).T
    masked = tokens[row].clone()
    masked[torch.arange(len(row)), column] = tokenizer.mask
    target = tokens[row, column]
    other = (row + shift[row]) % n

    def guess(f: Tensor, t: Tensor, c: Tensor) -> Tensor:
        t = t.to(place)
        encoded = model.encode(f.to(place).float(), t, t != tokenizer.pad)
        hidden = encoded.text[torch.arange(len(t), device=place), c.to(place)]
        return model.mlm_logits(hidden).argmax(dim=-1)

    with autocast(precision):
        for name, seen in (("own_drawing", row), ("another_drawing", other)):
            right = in_batches(guess, features[seen], masked, column) == target
            out[f"masked_accuracy_{name}"] = float(right.double().mean())
    out["masked_accuracy_chance"] = float(target.bincount().max() / len(target))
    return out


def recipe_settings(recipe: ViLBERTRecipe, clip_key: str) -> dict:
    """What decides the numbers: the recipe and the CLIP it starts from."""
    return {"recipe": asdict(recipe), "clip": clip_key}
