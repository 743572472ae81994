"""Pictures with captions of your own: a folder, a CSV or JSONL list, or WebDataset tars.

    folder/a.jpg + folder/a.txt                     one caption a line
    folder/captions.csv | captions.jsonl            columns image, caption; several rows
    list.csv | list.jsonl                           paths relative to the list
    shard.tar, or a folder of them                  a.jpg + a.txt | a.json with "caption"

Pictures are cut square, scaled once and cached. Unreadable ones are skipped, named in the log and
counted. The result is what every recipe on drawings takes. Left out: streaming.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusedmm.models.checkpoint import atomic_path
from fusedmm.train.data import Drawing, OpenMoji

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
LISTS = ("captions.csv", "captions.jsonl")
Example = tuple[str, list[str], Callable[[], bytes]]  # name, captions, the picture's bytes


def load_captions(
    path: str | Path,
    cache_dir: str | Path,
    *,
    size: int,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> OpenMoji:
    """Read pictures and captions from `path`; each picture is its own base, split by its name.

    Args:
        path: a folder, a .csv or .jsonl list, or a .tar; see the top of this file.
        cache_dir: where the pixels are kept.
        size: pixels a side. limit: keep this many pictures only, the first by name.
        on_progress: called with (done, total) while decoding.
    Raises: FileNotFoundError, nothing there. ValueError, no picture with a caption, or a bad list.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: {path}: expected pictures with captions, got nothing there")
    examples = sorted(_examples(path), key=lambda e: e[0])[:limit]
    if not examples:
        raise ValueError(f"data: {path}: expected pictures with captions, got none")
    spec = [size, _stamp(path), [(name, texts) for name, texts, _ in examples]]
    key = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
    kept, pixels = _cached(Path(cache_dir) / f"captions-{key[:16]}.safetensors", key) or _decode(
        examples, size, Path(cache_dir) / f"captions-{key[:16]}.safetensors", key, on_progress
    )
    if len(kept) < len(examples):
        log.warning("data: %s: %d of %d pictures left out as unreadable", path,
                    len(examples) - len(kept), len(examples))  # fmt: skip
    drawings = tuple(
        Drawing(
            examples[i][0], examples[i][0], examples[i][0], tuple(dict.fromkeys(examples[i][1]))
        )
        for i in kept
    )
    return OpenMoji(drawings, pixels, source=key)


def _examples(path: Path) -> Iterator[Example]:
    if path.suffix == ".tar":
        yield from _from_tar(path)
    elif path.suffix in (".csv", ".jsonl"):
        yield from _from_list(path)
    elif not path.is_dir():
        raise ValueError(f"data: {path}: expected a folder, .csv, .jsonl or .tar, got another file")
    elif lists := [path / name for name in LISTS if (path / name).is_file()]:
        yield from _from_list(lists[0])
    elif shards := sorted(path.glob("*.tar")):
        for shard in shards:
            yield from _from_tar(shard)
    else:
        for picture in sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES):
            text = picture.with_suffix(".txt")
            if text.is_file() and (captions := _lines(text.read_text(encoding="utf-8"))):
                yield picture.relative_to(path).as_posix(), captions, picture.read_bytes


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_list(path: Path) -> Iterator[Example]:
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(path), start=1):
        try:
            captions.setdefault(str(row["image"]), []).append(str(row["caption"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"data: {path}: row {number}: expected image and caption, got {row!r}"
            ) from error
    for name, texts in captions.items():
        if texts := [t.strip() for t in texts if t.strip()]:
            yield name, texts, (path.parent / name).read_bytes


def _rows(path: Path) -> Iterable[dict]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return csv.DictReader(io.StringIO(text))
    try:
        return [json.loads(line) for line in _lines(text)]
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {path}: expected one JSON object a line, got {error}") from error


def _from_tar(path: Path) -> Iterator[Example]:
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, list[str]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            key = str(name.with_suffix(""))
            if not member.isfile():
                continue
            if name.suffix.lower() in IMAGES:
                pictures[key] = member
            elif name.suffix in (".txt", ".json"):
                text = tar.extractfile(member).read().decode("utf-8")
                captions[key] = (
                    [str(json.loads(text)["caption"])] if name.suffix == ".json" else _lines(text)
                )
    for key, member in pictures.items():
        if captions.get(key):
            yield f"{path.name}/{member.name}", captions[key], lambda m=member: _member(path, m)


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _stamp(path: Path) -> list:
    """What changes when the files below `path` do: names, sizes and times."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = ((p, p.stat()) for p in files)
    return [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]


def _decode(
    examples: list[Example],
    size: int,
    path: Path,
    key: str,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[int], torch.Tensor]:
    from PIL import Image, ImageOps

    kept, arrays = [], []
    for i, (name, _, read) in enumerate(examples):
        try:
            with Image.open(io.BytesIO(read())) as picture:
                square = ImageOps.fit(picture.convert("RGB"), (size, size))
            arrays.append(np.asarray(square))
            kept.append(i)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            log.warning("data: %s left out: %s", name, error)
        if on_progress is not None:
            on_progress(i + 1, len(examples))
    if not kept:
        raise ValueError(f"data: expected readable pictures, got none of {len(examples)}")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    tensors = {"images": pixels, "kept": torch.tensor(kept)}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, {"key": key, "sha256": _digest(pixels)})
    return kept, pixels


def _cached(path: Path, key: str) -> tuple[list[int], torch.Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            meta, pixels = file.metadata() or {}, file.get_tensor("images")
            kept = file.get_tensor("kept").tolist()
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("data: %s is damaged (%s); decoding again", path, error)
        return None
    if meta.get("key") != key or meta.get("sha256") != _digest(pixels):
        log.warning("data: %s is damaged (checksum differs); decoding again", path)
        return None
    return kept, pixels


def _digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
