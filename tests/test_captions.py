"""Pictures of one's own: every way to bring them gives the same set, damaged ones are skipped and
counted, mistakes are named.
"""

import io
import json
import tarfile

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")
Image = pytest.importorskip("PIL.Image", reason="the train extra is not installed")

from fusedmm.__main__ import main  # noqa: E402
from fusedmm.train.captions import load_captions  # noqa: E402

CAPTIONS = {f"{i:02d}": [f"number {i}", f"the picture {i}"] for i in range(8)}


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 12), (i * 30, 255 - i * 30, 90)).save(out, "PNG")
    return out.getvalue()


def as_folder(root):
    root.mkdir()
    for i, (key, texts) in enumerate(CAPTIONS.items()):
        (root / f"{key}.png").write_bytes(png(i))
        (root / f"{key}.txt").write_text("\n".join(texts) + "\n")
    return root


def as_list(root, kind):
    as_folder(root)
    rows = [(f"{key}.png", text) for key, texts in CAPTIONS.items() for text in texts]
    for text in root.glob("*.txt"):
        text.unlink()
    if kind == "csv":
        lines = ["image,caption", *(f"{name},{text}" for name, text in rows)]
    else:
        lines = [json.dumps({"image": name, "caption": text}) for name, text in rows]
    (root / f"captions.{kind}").write_text("\n".join(lines))
    return root


def as_tar(root):
    root.mkdir()
    with tarfile.open(root / "shard.tar", "w") as tar:
        for i, (key, texts) in enumerate(CAPTIONS.items()):
            for name, raw in ((f"{key}.png", png(i)), (f"{key}.txt", "\n".join(texts).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    return root / "shard.tar"


@pytest.mark.parametrize("how", ["folder", "csv", "jsonl", "tar"])
def test_all_ways_give_the_same_set(tmp_path, how):
    root = tmp_path / "set"
    path = {"folder": as_folder, "tar": as_tar}.get(how, lambda r: as_list(r, how))(root)
    data = load_captions(path, tmp_path / "cache", size=8)
    assert [d.names for d in data.drawings] == [tuple(t) for t in CAPTIONS.values()]
    assert data.images.shape == (8, 3, 8, 8)
    for i, picture in enumerate(data.images):
        assert picture.float().mean(dim=(1, 2)).tolist() == [i * 30, 255 - i * 30, 90]
    again = load_captions(path, tmp_path / "cache", size=8)
    assert torch.equal(again.images, data.images) and again.source == data.source


def test_damaged_pictures_are_skipped_and_counted(tmp_path, caplog):
    root = as_folder(tmp_path / "set")
    (root / "03.png").write_bytes(png(3)[:40])
    data = load_captions(root, tmp_path / "cache", size=8)
    assert len(data) == 7 and "03.png" not in {d.code for d in data.drawings}
    assert "1 of 8 pictures left out" in caplog.text
    kept = load_captions(root, tmp_path / "cache", size=8)
    assert len(kept) == 7
    cache = next((tmp_path / "cache").glob("*.safetensors"))
    raw = bytearray(cache.read_bytes())
    raw[-1] ^= 255
    cache.write_bytes(raw)
    again = load_captions(root, tmp_path / "cache", size=8)
    assert "checksum differs" in caplog.text and torch.equal(again.images, data.images)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected pictures with captions"):
        load_captions(tmp_path / "nowhere", tmp_path, size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pictures with captions, got none"):
        load_captions(tmp_path / "empty", tmp_path, size=8)
    root = as_list(tmp_path / "set", "jsonl")
    (root / "captions.jsonl").write_text('{"image": "00.png"}')
    with pytest.raises(ValueError, match="row 1: expected image and caption"):
        load_captions(root, tmp_path, size=8)
    (root / "captions.jsonl").write_text("{")
    with pytest.raises(ValueError, match="expected one JSON object a line"):
        load_captions(root, tmp_path, size=8)


def test_a_recipe_trains_on_them(tmp_path, capsys):
    pytest.importorskip("rich", reason="the train extra is not installed")
    root = tmp_path / "set"
    root.mkdir()
    for i in range(40):
        (root / f"{i}.png").write_bytes(png(i % 8))
        (root / f"{i}.txt").write_text(f"colour {i % 8}")
    where = [
        "--runs",
        str(tmp_path / "runs"),
        "--cache",
        str(tmp_path / "cache"),
        "--data",
        str(root),
    ]
    small = ["--model.image_size", "16", "--model.vision_layers", "1", "--model.text_layers", "1",
             "--loop.steps", "2", "--loop.warmup", "1", "--loop.batch_size", "8",
             "--loop.compare_steps", "0", "--model.vocab_size", "300"]  # fmt: skip
    assert main(["train", "siglip", *where, *small]) == 0
    assert "text to image" in capsys.readouterr().out
