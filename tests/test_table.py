"""docs/recipes.md is what docs/recipes/*.json say, every figure in it beats chance, and the cases
of the end-to-end table agree with standard.
"""

import dataclasses
import json
import pathlib
import shutil

import pytest
import torch

pytest.importorskip("rich", reason="the train extra is not installed")
pytest.importorskip("safetensors", reason="the train extra is not installed")

from fusedmm.train import end_to_end  # noqa: E402
from fusedmm.train.commands import RECIPES, settings_class  # noqa: E402
from fusedmm.train.compare import (  # noqa: E402
    Comparison,
    Side,
    compare,
    relative_gap,
    rounded_standard,
)
from fusedmm.train.config import LoopConfig  # noqa: E402
from fusedmm.train.table import collect, figures_of, fill, write_page  # noqa: E402

DOCS = pathlib.Path(__file__).parents[1] / "docs"
COPIES = sorted(p for p in (DOCS / "recipes").glob("*.json") if p.stem != "end_to_end")


def test_page_is_what_the_copies_say(tmp_path):
    page = tmp_path / "recipes.md"
    shutil.copy(DOCS / "recipes.md", page)
    write_page(page, DOCS / "recipes", list(RECIPES))
    assert page.read_text() == (DOCS / "recipes.md").read_text()


@pytest.mark.parametrize("path", COPIES, ids=lambda p: p.stem)
def test_every_recipe_beats_chance(path):
    first = figures_of(json.loads(path.read_text()))[0]
    better = -1 if first.lower_is_better else 1
    assert better * first.value > better * first.chance * 1.1


def test_only_default_runs_are_copied(tmp_path):
    recipe = settings_class("siglip")()
    changed = dataclasses.replace(recipe, word_drop=0.5)
    for name, settings in (("kept", recipe), ("left", changed)):
        folder = tmp_path / name / "siglip"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"key": "k", "recipe": "siglip"}))
        given = {"recipe": dataclasses.asdict(settings)}
        (folder / "config.json").write_text(json.dumps(given))
        copied = collect(tmp_path / name, tmp_path / "store", ["siglip"], settings_class)
        assert copied == (["siglip"] if name == "kept" else [])
    with pytest.raises(ValueError, match="expected the mark recipes:table"):
        (tmp_path / "page.md").write_text("nothing")
        fill(tmp_path / "page.md", {"table": "x"})


def test_cached_clip_agrees_with_standard(tmp_path):
    pair = tuple(torch.randn(80, 16) for _ in range(2))
    loop = LoopConfig(steps=4, batch_size=64, warmup=1, precision="fp32", compare_steps=4)
    result = compare(
        lambda backend: end_to_end.CachedClip(pair, loop, backend), loop, ours="x", precision="fp32"
    )
    assert result.largest_gap < 1e-4
    rounded = [
        rounded_standard(
            lambda backend: end_to_end.CachedClip(pair, loop, backend), loop, precision, 4
        )
        for precision in ("fp32", "bf16")
    ]
    noise = [relative_gap(losses, result.standard.losses) for losses in rounded]
    assert 0 < noise[0] < 1e-4 < noise[1] < 1e-1
    noisy = {"rounded": rounded[1], "rounding_noise": 0.5}
    machine = {"device": "d", "cpu_capability": "c", "threads": 1, "torch": "t"}
    end_to_end.write(
        tmp_path,
        {
            "machine": machine,
            "comparisons": {"a": {"op": "contrastive_loss", **result.as_dict(), **noisy}},
        },
    )
    assert (tmp_path / "end_to_end.png").stat().st_size > 10_000
    page = tmp_path / "recipes.md"
    page.write_text(
        "".join(
            f"<!-- recipes:{n} -->\n<!-- /recipes:{n} -->\n"
            for n in ("table", "machine", "figures", "end_to_end")
        )
    )
    write_page(page, tmp_path, [])
    assert "geometric mean" in page.read_text()
    assert "5.0e-01" in page.read_text()


def test_speed_up_is_of_pairs_of_steps():
    """Ours is always a tenth faster than standard on the same batch, batches differ a lot."""
    times = [1.0, 1.1, 7.0, 7.7, 1.0, 1.1, 30.0, 33.0]
    ours = Side("ours", [], 4.0, 1, times[::2])
    comparison = Comparison(ours, Side("standard", [], 4.4, 1, times[1::2]), 1, "fp32")
    found = comparison.speed_up
    assert all(abs(value - 1.1) < 1e-12 for value in found.values())
    noisy = Comparison(
        ours, Side("standard", [], 4.4, 1, [1.0, 8.0, 2.0, 30.0]), 1, "fp32"
    ).speed_up
    assert noisy["low"] < noisy["median"] < noisy["high"]
