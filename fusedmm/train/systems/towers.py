"""What recipes with a picture and a text tower share: retrieval figures and the gallery."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.train.clip import embed
from fusedmm.train.data import OpenMoji
from fusedmm.train.drawings import zero_shot_by_word
from fusedmm.train.evaluate import retrieval
from fusedmm.train.loop import device
from fusedmm.train.systems.base import Figure, Picture, System


def recall_figure(name: str, queries: Tensor, items: Tensor) -> Figure:
    """Recall at 10 of item i by query i, beside that of a random order."""
    r = retrieval(queries, items)
    return Figure(f"{name}, R@10", r.recall[10], r.chance_recall[10], "random order", r.count)


def two_tower_figures(system: System) -> list[Figure]:
    """Retrieval both ways among held-out drawings, and zero-shot classes, of CLIP-like models."""
    model, tokenizer, data = system.model, system.tokenizer, system.data
    rows = data.indices("test")
    images, texts = embed(model, tokenizer, data, rows, system.recipe.loop.precision)

    @torch.no_grad()
    def encode(words: list[str]) -> Tensor:
        return model.encode_text(tokenizer.encode(words).to(device()))

    out = [
        recall_figure("text to image", texts, images),
        recall_figure("image to text", images, texts),
    ]
    if (found := zero_shot_by_word(data, rows, images, encode)) is not None:
        value, chance, count = found
        out.append(Figure("zero-shot by a word", value, chance, "commonest word", count))
    return out


def nearest_names(
    data: OpenMoji, rows: list[int], images: Tensor, texts: Tensor, count: int = 24
) -> list[Picture]:
    """Drawings at even distances, each with the name nearest to it among those of `rows`.

    Args:
        rows: held-out rows; images, texts: their embeddings, [len(rows), D] each.
    """
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    out = []
    for i in range(0, len(rows), max(1, len(rows) // count)):
        said = data.drawings[rows[int((texts @ images[i]).argmax())]].caption
        out.append(Picture(data.pixels([rows[i]])[0], said, said == data.drawings[rows[i]].caption))
    return out[:count]


def tower_gallery(system: System) -> list[Picture]:
    """`nearest_names` of a CLIP-like model on the test split."""
    rows = system.data.indices("test")
    pair = embed(system.model, system.tokenizer, system.data, rows, system.recipe.loop.precision)
    return nearest_names(system.data, rows, *pair)
