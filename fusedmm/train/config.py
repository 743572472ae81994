"""Recipe settings as frozen dataclasses, and the one translation of them to command-line flags.

A nested field `loop.steps` becomes `--loop.steps`. Every unknown or ill-typed setting is refused by
name. A YAML file holds the same names, nested; a run's own config.json can be read back by
`from_dict`.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PRECISIONS = ("auto", "bf16", "fp32")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to learn. A run is `steps` optimizer steps, never a time.

    `accumulate` batches make one step; `ema`, where more than 0, is the decay of a running mean of
    the weights that takes their place at the end; `tensorboard` writes scalars for it.
    """

    steps: int = 500
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 40
    weight_decay: float = 0.1
    beta2: float = 0.98
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    checkpoint_every: int = 50
    compare_steps: int = 20
    accumulate: int = 1
    ema: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loop.{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"loop.warmup: expected 0..{self.steps - 1} to fit loop.steps, got {self.warmup}"
            )
        if not 0 <= self.compare_steps <= self.steps:
            raise ValueError(
                f"loop.compare_steps: expected 0..{self.steps} to fit loop.steps, "
                f"got {self.compare_steps}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"loop.ema: expected 0 (off) to below 1, got {self.ema}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"loop.precision: expected one of {PRECISIONS}, got {self.precision!r}"
            )


def from_dict(
    cls: type[T], values: Mapping[str, Any], *, where: str = "", default: T | None = None
) -> T:
    """Build dataclass `cls` from nested dicts, checking names and types.

    What is not given comes from `default`, for a nested field from what the outer class has there.

    Raises: ValueError, a key that is no field or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}{name}"
        if name not in fields:
            raise ValueError(
                f"config: {path}: expected one of {sorted(fields)}, got an unknown key"
            )
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, hint):
                out[name] = value
                continue
            if not isinstance(value, Mapping):
                raise ValueError(f"config: {path}: expected settings by name, got {value!r}")
            out[name] = from_dict(
                hint, value, where=f"{path}.", default=_default(fields[name], default)
            )
        else:
            out[name] = _checked(path, hint, value)
    return cls(**out) if default is None else dataclasses.replace(default, **out)


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings from a YAML file, nested as the dataclasses are; `from_dict` checks them.

    Raises: ValueError, not a mapping or not YAML.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path}: expected YAML, got {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config: {path}: expected settings by name, got {values!r}")
    return values


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of both; where both say something, `above` counts."""
    out = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merged(out[name], value) if both else value
    return out


def _default(field: dataclasses.Field, owner: Any) -> Any:
    """The value a field has in `owner`, or its own default, or None."""
    if owner is not None:
        return getattr(owner, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _checked(path: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"config: {path}: expected a list of {inner.__name__}, got {value!r}")
        return tuple(_checked(path, inner, v) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"config: {path}: expected {hint.__name__}, got {value!r}")
    return value


def add_flags(parser: argparse.ArgumentParser, cls: type, *, prefix: str = "") -> None:
    """Give `parser` one `--name` per leaf field of `cls`; an absent flag leaves the default."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            add_flags(parser, hint, prefix=f"{name}.")
            continue
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        nargs: dict[str, Any] = {}
        if hint is bool:
            hint = _yes_or_no
        if typing.get_origin(hint) is tuple:
            hint, nargs = typing.get_args(hint)[0], {"nargs": "*"}
        parser.add_argument(
            f"--{name}",
            type=hint,
            default=argparse.SUPPRESS,
            metavar=hint.__name__.strip("_").upper(),
            **nargs,
        )


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def flags_to_dict(args: argparse.Namespace, cls: type, *, prefix: str = "") -> dict[str, Any]:
    """The nested dict of those fields of `cls` that were given as flags."""
    out: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            if inner := flags_to_dict(args, hints[field.name], prefix=f"{name}."):
                out[field.name] = inner
        elif hasattr(args, name):
            out[field.name] = getattr(args, name)
    return out
