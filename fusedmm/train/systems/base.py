"""What a system is to the loop, the command line and the report, and where its data comes from.

A system is a `Task` (model, loss of a step) that also judges itself on held-out data. Left out:
anything about one system.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fusedmm.models import Loaded, Tokenizer, load
from fusedmm.train.data import OpenMoji
from fusedmm.train.easy_vqa import EasyVQA
from fusedmm.train.evaluate import Figure
from fusedmm.train.recipes import load_data


@dataclass(frozen=True)
class Picture:
    """A held-out example for the report: [3, H, W] in [0, 1], its text, and if it was right.

    `boxes` are (x, y, w, h) in 0..1 with a colour each.
    """

    image: Tensor
    caption: str
    right: bool | None = None
    boxes: tuple[tuple[tuple[float, float, float, float], str], ...] = ()


@dataclass(frozen=True)
class Sources:
    """Where systems get data and earlier models: both are read when asked for."""

    cache: Path
    runs: Path
    given: dict[str, Path] | None = None
    own: Path | None = None

    def openmoji(self, size: int, limit: int | None = None) -> OpenMoji:
        """The drawings, rendered once, or the pictures of `own` in their place."""
        return load_data(self.cache, limit, size, self.own)

    def easy_vqa(self, limit: int | None = None) -> EasyVQA:
        """Pictures, questions, answers."""
        return EasyVQA.load(limit)

    def trained(self, recipe: str) -> Loaded:
        """The model another recipe left in the runs folder.

        Raises: FileNotFoundError, it was not trained yet.
        """
        folder = (self.given or {}).get(recipe, self.runs / recipe)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"train: {folder}: expected a trained {recipe}, got none; "
                f"`python -m fusedmm train {recipe}` makes one"
            )
        return load(folder)


class System(ABC):
    """A recipe put to work. Subclasses name their settings class and say in `about` what they are.

    Args:
        recipe: an instance of `Recipe`.
        sources: data and earlier models.
        backend: None for ours, "standard" for the usual attention and loss; used by systems that
            name the `op` which makes the difference.
    """

    Recipe: ClassVar[type]
    about: ClassVar[str]
    op: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    model: nn.Module
    tokenizer: Tokenizer

    @abstractmethod
    def __init__(self, recipe: Any, sources: Sources, backend: str | None = None) -> None: ...

    @abstractmethod
    def loss(self, step: int) -> dict[str, Tensor]:
        """Scalars of this step, a pure function of its number; "loss" is minimised."""

    @abstractmethod
    def evaluate(self) -> list[Figure]:
        """Held-out figures, the one that stands for the system first."""

    def gallery(self) -> list[Picture]:
        """Held-out examples for the report."""
        return []
