"""Save a trained model as model.safetensors, config.json and tokenizer.json; load it in one call.

`config.json` names the model class and its sizes, so `load(folder)` needs nothing else. Left out:
optimizer state, which belongs to a training run and not to a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fusedmm.models.alignment import DeepCCA, DeepCCAConfig
from fusedmm.models.autoencoder import AutoencoderConfig, JointAutoencoder
from fusedmm.models.clip import CLIP, CLIPConfig
from fusedmm.models.distillation import DistillationConfig, Students
from fusedmm.models.fusion import FusionConfig, FusionZoo
from fusedmm.models.grounding import Grounder, GrounderConfig
from fusedmm.models.siglip import SigLIP
from fusedmm.models.text_to_image import TextToImage, TextToImageConfig
from fusedmm.models.tokenizer import Tokenizer
from fusedmm.models.vilbert import ViLBERT, ViLBERTConfig
from fusedmm.models.vlap import VLAP, VLAPConfig
from fusedmm.models.vlmp import VLMP, VLMPConfig
from fusedmm.models.vlp import VLP, VLPConfig
from fusedmm.models.vqa import VQA, VQAConfig

MODELS: dict[str, tuple[type[nn.Module], type]] = {
    "alignment": (DeepCCA, DeepCCAConfig),
    "autoencoder": (JointAutoencoder, AutoencoderConfig),
    "clip": (CLIP, CLIPConfig),
    "distillation": (Students, DistillationConfig),
    "fusion": (FusionZoo, FusionConfig),
    "grounding": (Grounder, GrounderConfig),
    "siglip": (SigLIP, CLIPConfig),
    "text-to-image": (TextToImage, TextToImageConfig),
    "vlap": (VLAP, VLAPConfig),
    "vlmp": (VLMP, VLMPConfig),
    "vlp": (VLP, VLPConfig),
    "vqa": (VQA, VQAConfig),
    "vilbert": (ViLBERT, ViLBERTConfig),
}


class Loaded(NamedTuple):
    """What `load` returns: the model in eval mode, its tokenizer, and the whole config.json."""

    model: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    tmp = Path(name)
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


def save(folder: str | Path, model: nn.Module, tokenizer: Tokenizer, **extra: Any) -> None:
    """Write model, sizes and tokenizer into `folder`; `extra` lands in config.json beside them."""
    folder = Path(folder)
    kind = next((name for name, (cls, _) in MODELS.items() if type(model) is cls), None)
    if kind is None:
        raise TypeError(f"models.save: model: expected one of {sorted(MODELS)}, got {type(model)}")
    with atomic_path(folder / "model.safetensors") as tmp:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp)
    with atomic_path(folder / "tokenizer.json") as tmp:
        tokenizer.save(tmp)
    sizes = dataclasses.asdict(model.config)
    write_json(
        folder / "config.json",
        {"model": kind, "config": sizes, "tokenizer_length": tokenizer.length, **extra},
    )


def build(kind: str, config: dict[str, Any], **options: Any) -> nn.Module:
    """A model of that kind with random weights; `options` go to its constructor."""
    if kind not in MODELS:
        raise ValueError(f"models.build: kind: expected one of {sorted(MODELS)}, got {kind!r}")
    cls, config_cls = MODELS[kind]
    known = {field.name for field in dataclasses.fields(config_cls)}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"models.build: {kind}: expected keys {sorted(known)}, got also {unknown}")
    return cls(config_cls(**config), **options)


def load(folder: str | Path, **options: Any) -> Loaded:
    """The model a run left in `folder`, ready to use.

    Args:
        folder: holds model.safetensors, config.json and tokenizer.json.
        options: passed to the model's constructor, e.g. `attention_backend="cpu"`.
    Raises: FileNotFoundError, no trained model there. ValueError, a file is damaged.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"models.load: {folder}: expected a trained model, got no {name}; "
                f"`python -m fusedmm run` makes one"
            )
    try:
        config = json.loads((folder / "config.json").read_text())
        model = build(config["model"], config["config"], **options)
        tokenizer = Tokenizer.load(folder / "tokenizer.json", length=config["tokenizer_length"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, json.JSONDecodeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"models.load: {folder}: damaged or of another version: {error}"
        ) from error
    return Loaded(model.eval(), tokenizer, config)
