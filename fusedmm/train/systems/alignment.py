"""Recipe `alignment`: picture and text embeddings made apart, then aligned in closed form and deep.

Pictures: principal components of pixels and of their edges. Names: principal components of weighted
pieces. Neither has seen the other until Procrustes, CCA or deep CCA aligns them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.models.alignment import DeepCCA, DeepCCAConfig, cca, procrustes
from fusedmm.train.config import LoopConfig
from fusedmm.train.data import OpenMoji
from fusedmm.train.drawings import name_tokenizer
from fusedmm.train.loop import device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System
from fusedmm.train.systems.towers import nearest_names, recall_figure

IMAGE_SIZE = 32


@dataclass(frozen=True)
class AlignmentRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=60, batch_size=2048, lr=1e-3, warmup=10, compare_steps=0
        )
    )
    model: DeepCCAConfig = field(default_factory=DeepCCAConfig)
    limit: int | None = None
    ridge: float = 1.0


def picture_features(data: OpenMoji) -> Tensor:
    """Colours at 8 x 8 and edge energies in four directions at 8 x 8, [N, 448] fp64."""
    pixels = data.pixels(list(range(len(data))))
    gray = pixels.mean(dim=1, keepdim=True)
    kernels = torch.tensor(
        [[[-1, 0, 1]] * 3, [[-1] * 3, [0] * 3, [1] * 3], [[0, 1, 1], [-1, 0, 1], [-1, -1, 0]],
         [[1, 1, 0], [1, 0, -1], [0, -1, -1]]], dtype=torch.float32,
    )[:, None]  # fmt: skip
    edges = F.conv2d(gray, kernels, padding=1).abs()
    cells = [F.adaptive_avg_pool2d(t, 8).flatten(1) for t in (pixels, edges)]
    return torch.cat([cells[0], cells[1]], dim=1).double()


def name_features(data: OpenMoji, tokenizer: Tokenizer) -> Tensor:
    """Pieces of each name, rare ones weighing more (log N / count), [N, vocab_size] fp64."""
    tokens = tokenizer.encode([d.caption for d in data.drawings])
    counts = F.one_hot(tokens, tokenizer.vocab_size).sum(dim=1).double()
    counts[:, [tokenizer.pad, tokenizer.start, tokenizer.end]] = 0
    train = counts[data.indices("train")]
    weight = (len(train) / (1 + (train > 0).sum(dim=0))).log()
    return F.normalize(counts * weight, dim=1)


def principal(features: Tensor, train: list[int], dim: int) -> Tensor:
    """Scores on the first `dim` principal components of the training rows, [N, dim], each of unit
    variance over them."""
    centred = features - features[train].mean(dim=0)
    dim = min(dim, len(train) - 1, features.shape[1])
    _, _, vh = torch.linalg.svd(centred[train], full_matrices=False)
    scores = centred @ vh[:dim].T
    return scores / scores[train].std(dim=0).clamp(min=1e-6)


class Alignment(System):
    """Deep CCA in the loop, the closed forms beside it."""

    Recipe = AlignmentRecipe
    about = "separately made embeddings of drawings and names aligned: Procrustes, CCA, deep CCA"

    def __init__(
        self, recipe: AlignmentRecipe, sources: Sources, backend: str | None = None
    ) -> None:
        self.recipe = recipe
        self.data = sources.openmoji(IMAGE_SIZE, recipe.limit)
        self.tokenizer = name_tokenizer(self.data, vocab_size=2048, length=32)
        self.rows = self.data.indices("train")
        self.x = principal(picture_features(self.data), self.rows, recipe.model.dim_x)
        self.y = principal(name_features(self.data, self.tokenizer), self.rows, recipe.model.dim_y)
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, dim_x=self.x.shape[1], dim_y=self.y.shape[1])
        self.model = DeepCCA(config).to(device())

    def loss(self, step: int) -> dict[str, Tensor]:
        """Minus the mean canonical correlation of this step's pairs."""
        loop = self.recipe.loop
        g = torch.Generator().manual_seed(step_seed(loop.seed, step, stream=3))
        chosen = torch.randperm(len(self.rows), generator=g)[: loop.batch_size]
        rows = torch.tensor(self.rows)[chosen]
        x, y = (t[rows].float().to(device()) for t in (self.x, self.y))
        return {"loss": 1 + self.model.loss(x, y, ridge=self.recipe.ridge)}

    @torch.no_grad()
    def aligned(self, how: str) -> tuple[Tensor, Tensor]:
        """Both sets in the common space, all rows, fitted on the training rows."""
        x, y = self.x, self.y
        a, b = x[self.rows], y[self.rows]
        if how == "deep CCA":
            self.model.eval()
            x, y = (
                t.double().cpu() for t in self.model(x.float().to(device()), y.float().to(device()))
            )
            x, y = x - x[self.rows].mean(dim=0), y - y[self.rows].mean(dim=0)
            a, b = x[self.rows], y[self.rows]
        if how in ("CCA", "deep CCA"):
            p, q, rho = cca(a, b, self.recipe.model.dim_out, ridge=0.1)
            return x @ p * rho, y @ q * rho
        dim = min(x.shape[1], y.shape[1])
        if how == "Procrustes":
            return x[:, :dim] @ procrustes(a[:, :dim], b[:, :dim]), y[:, :dim]
        return x[:, :dim], y[:, :dim]

    def evaluate(self) -> list[Figure]:
        """Retrieval of held-out drawings by their names after each alignment."""
        test = self.data.indices("test")
        out = []
        for how in ("deep CCA", "CCA", "Procrustes", "not aligned"):
            x, y = self.aligned(how)
            out.append(recall_figure(f"text to image, {how}", y[test], x[test]))
        return sorted(out, key=lambda f: -f.value)

    def gallery(self) -> list[Picture]:
        """Held-out drawings with the held-out name nearest to each under CCA."""
        test = self.data.indices("test")
        x, y = self.aligned("CCA")
        return nearest_names(self.data, test, x[test], y[test])
