"""Which rows a step sees and how they are varied, as a pure function of (seed, step).

A shuffled pass over weighted rows per epoch, affine and colour jitter on tensors, other names of
the same drawing. Because nothing here keeps state, a run resumed at step k draws what it would have
drawn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.train.data import Drawing

_ONE_SIDED = frozenset(
    "left right left-facing right-facing leftwards rightwards clockwise counterclockwise east west "
    "southeast southwest northeast northwest button letter letters symbols flag: keycap o'clock "
    "mark abcd latin input".split()
)
_TEMPLATES = ("{}", "{}", "{}", "a {}", "the {}", "a drawing of a {}", "an emoji of a {}")
# The drawings' own palette (OpenMoji's style guide), by the word one would use.
_PALETTE = {
    "red": ("ea5a47", "d22f27"),
    "orange": ("f1b31c", "e27022"),
    "yellow": ("fcea2b",),
    "green": ("b1cc33", "5c9e31"),
    "blue": ("92d3f5", "61b2e4", "1e50a0"),
    "purple": ("b399c8", "8967aa"),
    "pink": ("ffa7c0", "e67a94"),
    "brown": ("a57939", "6a462f"),
    None: ("ffffff", "000000", "3f3f3f", "9b9b9a", "d0cfce"),
}
# A colour is the drawing's own if it covers this much of the picture and of what is coloured.
_OF_PICTURE, _OF_COLOURED = 0.1, 0.6
_COLOUR_WORD = 0.15


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed of its own for each (seed, step, stream); splitmix64 of the three."""
    z = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB
    ) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift)) * factor % 2**64
    return (z ^ (z >> 31)) % 2**63


class Sampler:
    """Batches of rows without replacement within an epoch, variants of a base side by side.

    A base with n variants gives about n**power of them to an epoch (power 1: all of them), in runs
    of up to `group`: a batch then holds drawings that differ in tone or gender alone.

    Args:
        bases: the base of each row.
        batch_size: rows a batch; at most an epoch.
    """

    def __init__(
        self,
        bases: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        power: float = 1.0,
        group: int = 1,
    ) -> None:
        counts = Counter(bases)
        self.bases = list(bases)
        self.keep = torch.tensor([counts[b] ** (power - 1.0) for b in bases], dtype=torch.float64)
        self.size = max(1, round(float(self.keep.sum())))
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        if group < 1:
            raise ValueError(f"Sampler: group: expected at least 1, got {group}")
        if not 1 <= batch_size <= self.size:
            raise ValueError(
                f"Sampler: batch_size: expected 1..{self.size} (rows of an epoch), got {batch_size}"
            )
        self.batches = self.size // batch_size
        self._epoch: tuple[int, Tensor] | None = None

    def _order(self, epoch: int) -> Tensor:
        g = torch.Generator().manual_seed(step_seed(self.seed, epoch, stream=1))
        u = torch.rand(len(self.keep), generator=g, dtype=torch.float64)
        order = (u.log() / self.keep).argsort(descending=True)  # Efraimidis-Spirakis sampling
        runs: dict[tuple[str, int], list[int]] = {}
        seen: Counter[str] = Counter()
        for row in order[: self.size].tolist():
            base = self.bases[row]
            runs.setdefault((base, seen[base] // self.group), []).append(row)
            seen[base] += 1
        groups = list(runs.values())
        shuffled = torch.randperm(len(groups), generator=g).tolist()
        return torch.tensor([row for i in shuffled for row in groups[i]])

    def rows(self, step: int) -> Tensor:
        """[batch_size] positions into `bases` for this step."""
        epoch, batch = divmod(step, self.batches)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][batch * self.batch_size : (batch + 1) * self.batch_size]


def may_flip(drawing: Drawing) -> bool:
    """True where the mirror image still is what the names say."""
    words = " ".join(drawing.names).lower().split()
    return not _ONE_SIDED.intersection(words) and len(drawing.caption) > 2


def augment(images: Tensor, flips: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine (white outside), mirror where allowed, brightness, contrast, saturation.

    Args:
        images: [B, 3, S, S] float in [0, 1].
        flips: [B] bool, rows that may be mirrored.
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(b, generator=generator) * (high - low) + low

    angle = uniform(-15, 15) * math.pi / 180
    zoom = uniform(0.85, 1.2)
    mirror = torch.where(flips & (uniform(0, 1) < 0.5), -1.0, 1.0)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack([cos * mirror, -sin, uniform(-0.12, 0.12)], dim=1),
            torch.stack([sin * mirror, cos, uniform(-0.12, 0.12)], dim=1),
        ],
        dim=1,
    )  # [B, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images - 1, grid, align_corners=False) + 1  # padding 0 becomes white
    gray = out.mean(dim=1, keepdim=True)
    out = gray + (out - gray) * uniform(0.85, 1.15).view(b, 1, 1, 1)
    mean = out.mean(dim=(1, 2, 3), keepdim=True)
    out = mean + (out - mean) * uniform(0.9, 1.1).view(b, 1, 1, 1)
    return (out * uniform(0.93, 1.05).view(b, 1, 1, 1)).clamp(0, 1)


def own_colour(image: Tensor) -> str | None:
    """The colour word that fits most of a drawing, or None: [3, S, S] uint8."""
    words = [word for word, codes in _PALETTE.items() for _ in codes]
    codes = [bytes.fromhex(code) for codes in _PALETTE.values() for code in codes]
    palette = torch.tensor([list(code) for code in codes]).float()  # [P, 3]
    pixels = image[:, ::3, ::3].flatten(1).T.float()
    nearest = torch.cdist(pixels, palette).argmin(dim=1)
    share: Counter[str | None] = Counter()
    for word, count in zip(words, nearest.bincount(minlength=len(words)).tolist(), strict=True):
        share[word] += count
    del share[None]
    word, most = share.most_common(1)[0]
    enough = most >= _OF_PICTURE * len(nearest) and most >= _OF_COLOURED * share.total()
    return word if enough else None


def vary_caption(
    drawing: Drawing, rng: random.Random, *, drop: float = 0.1, colour: str | None = None
) -> str:
    """One of the drawing's names, sometimes in a template, without a word or with its colour."""
    name = drawing.caption if rng.random() < 0.6 else rng.choice(drawing.names)
    words = [w for w in name.split() if rng.random() >= drop] or name.split()
    if colour is not None and colour not in name.split() and rng.random() < _COLOUR_WORD:
        words.insert(0, colour)
    return rng.choice(_TEMPLATES).format(" ".join(words))


def mask_tokens(
    tokens: Tensor, tokenizer: Tokenizer, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's masking: of the chosen pieces 80 % become <mask>, 10 % another, 10 % stay.

    Args:
        tokens: [B, N] ids; each piece is chosen with `probability`, special tokens never.
    Returns: (tokens to show [B, N], what was chosen [B, N] with -100 elsewhere).
    """
    t = tokenizer
    special = (tokens == t.pad) | (tokens == t.start) | (tokens == t.end)
    u = torch.rand(tokens.shape, generator=generator)
    chosen = (u < probability) & ~special
    fate = torch.rand(tokens.shape, generator=generator)
    random_piece = torch.randint(t.first_piece, t.end, tokens.shape, generator=generator)
    masked = torch.where(chosen & (fate < 0.8), t.mask, tokens)
    masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_piece, masked)
    return masked, torch.where(chosen, tokens, -100)
