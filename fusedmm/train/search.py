"""Text search over all drawings with a trained CLIP: embed the words, rank the pictures.

Picture embeddings are written once by `write_index` and refused when damaged. Left out: an
approximate index, which four thousand rows do not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedmm.models import CLIP, Tokenizer, load
from fusedmm.models.checkpoint import atomic_path
from fusedmm.train.clip import embed
from fusedmm.train.data import Drawing, OpenMoji
from fusedmm.train.loop import device

INDEX = "embeddings.safetensors"


@dataclass(frozen=True)
class Hit:
    """One answer: the drawing and its cosine similarity to the words."""

    row: int
    drawing: Drawing
    score: float


def write_index(
    run_dir: Path, key: str, model: CLIP, tokenizer: Tokenizer, data: OpenMoji
) -> Tensor:
    """Embed every drawing and keep the unit vectors beside the model; returns [N, embed_dim]."""
    images, _ = embed(model, tokenizer, data, list(range(len(data))), "fp32")
    with atomic_path(run_dir / INDEX) as tmp:
        save_file({"images": images}, tmp, {"key": key})
    return images


def read_index(run_dir: Path, key: str, count: int) -> Tensor | None:
    """The unit vectors of `count` drawings by the model with that key, or None."""
    try:
        with safe_open(run_dir / INDEX, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            images = file.get_tensor("images")
    except (SafetensorError, OSError):
        return None
    return images if len(images) == count else None


@torch.no_grad()
def search(run_dir: str | Path, text: str, data: OpenMoji, *, count: int = 5) -> list[Hit]:
    """The `count` drawings whose embedding is nearest to that of `text`, best first.

    Args:
        run_dir: folder of a trained CLIP.
    Raises: FileNotFoundError, no model there. ValueError, empty text or not a CLIP.
    """
    run_dir = Path(run_dir)
    if not text.strip():
        raise ValueError("search: text: expected at least one word, got none")
    if not 1 <= count <= len(data):
        raise ValueError(f"search: count: expected 1..{len(data)}, got {count}")
    model, tokenizer, config = load(run_dir)
    if not isinstance(model, CLIP):
        raise ValueError(f"search: {run_dir}: expected a clip model, got {config['model']!r}")
    model.to(device())
    images = read_index(run_dir, config["key"], len(data))
    if images is None:
        images = write_index(run_dir, config["key"], model, tokenizer, data)
    query = model.encode_text(tokenizer.encode([text]).to(device()))
    scores = images @ F.normalize(query, dim=-1).float().cpu()[0]
    best = scores.topk(count)
    return [
        Hit(row, data.drawings[row], score)
        for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
