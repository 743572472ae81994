"""Modules and patch() against the originals in Transformers and open_clip, random weights from a
config, nothing downloaded.
"""

import copy
import io
import os
import subprocess
import sys

import nn_parity
import pytest
import torch
from torch import nn

import fusedmm
from fusedmm.nn import (
    BiAttentionBlock,
    BiMultiHeadAttention,
    ClipLoss,
    LxmertCrossAttention,
    SigLipLoss,
)
from fusedmm.nn.lazy import LazyMap

os.environ["HF_HUB_OFFLINE"] = "1"
B, M, N, D = 3, 41, 11, 32


def library(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed (extra: models)")


def padding(size: int) -> torch.Tensor:
    mask = torch.rand(B, size) > 0.6
    mask[:, 0] = False
    return mask


def additive(size: int) -> torch.Tensor:
    return padding(size)[:, None, None].float() * torch.finfo(torch.float32).min


# -- Grounding DINO


def dino_config(**changes):
    library("transformers")
    from transformers import BertConfig, GroundingDinoConfig, SwinConfig

    return GroundingDinoConfig(
        **{
            "d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 4,
            "num_queries": 5, "num_feature_levels": 3, "encoder_n_points": 2,
            "decoder_n_points": 2, "max_text_len": 16, "fusion_dropout": 0.0,
            "fusion_droppath": 0.0, "use_pretrained_backbone": False,
            "text_config": BertConfig(
                hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                vocab_size=200, max_position_embeddings=32,
            ),
            "backbone_config": SwinConfig(
                image_size=64, window_size=4, embed_dim=12, depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"],
            ),
            **changes,
        }
    )  # fmt: skip


def dino_pair(block: bool, **changes):
    from transformers.models.grounding_dino import modeling_grounding_dino as hf

    config = dino_config(**changes)
    sizes = (D, D, config.encoder_ffn_dim // 2, config.encoder_attention_heads // 2, 0.0)
    if block:
        theirs, ours = hf.GroundingDinoFusionLayer(config), BiAttentionBlock(*sizes)
        with torch.no_grad():  # the initial 1e-4 would hide the attention
            theirs.vision_param.normal_()
            theirs.text_param.normal_()
    else:
        theirs, ours = hf.GroundingDinoBiMultiHeadAttention(config), BiMultiHeadAttention(*sizes)
    nn_parity.load_both_ways(ours, theirs)
    return ours, theirs


@pytest.fixture(autouse=True)
def few_vision_tokens(monkeypatch) -> None:
    """Small shapes take the paths of large ones."""
    monkeypatch.setattr("fusedmm.nn.bi_attention.ABSORB_FROM", 0)


def test_weights_are_absorbed_for_many_vision_tokens(monkeypatch) -> None:
    monkeypatch.setattr("fusedmm.nn.bi_attention.ABSORB_FROM", 8)
    ours = BiMultiHeadAttention(D, D, 48, 4)
    for tokens, absorbed in ((8 * N - 1, False), (8 * N, True)):
        assert ours._absorbs(torch.empty(B, tokens, D), torch.empty(B, N, D)) == absorbed


@pytest.mark.parametrize("masks", ["none", "text", "vision", "both"])
@pytest.mark.parametrize("block", [False, True], ids=["attention", "block"])
@pytest.mark.parametrize("path", ["absorbed", "direct"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_grounding_dino(block: bool, masks: str, path: str, training: bool) -> None:
    library("transformers")
    width = 96 if path == "absorbed" else 16  # heads of 12 or of 2, 11 tokens against 32 channels
    ours, theirs = (m.train(training) for m in dino_pair(block, encoder_ffn_dim=width))
    attention = ours.attn if block else ours
    assert attention._absorbs(torch.empty(B, M, D), torch.empty(B, N, D)) == (path == "absorbed")
    inputs = {"vision_features": torch.randn(B, M, D), "text_features": torch.randn(B, N, D)}
    for side, size in (("vision", M), ("text", N)):
        if masks in (side, "both"):
            inputs[f"{side}_mask"] = padding(size)

    def call(m, vision_features, text_features, vision_mask=None, text_mask=None):
        (v, _), (t, _) = m(vision_features, text_features, vision_mask, text_mask)
        return v, t

    nn_parity.assert_parity(ours, theirs, inputs, call=call)
    args = [inputs.get(k) for k in ("vision_features", "text_features", "vision_mask", "text_mask")]
    (_, want_v), (_, want_t) = theirs(*args)
    (_, map_v), (_, map_t) = ours(*args, output_attentions=True)
    (_, lazy_v), (_, lazy_t) = ours(*args)
    for lazy, now, want in ((lazy_v, map_v, want_v), (lazy_t, map_t, want_t)):
        assert repr(lazy) == "LazyMap(not read)"
        torch.testing.assert_close(now, want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.add(lazy, 0.0), want, atol=1e-6, rtol=1e-5)
        assert lazy.shape == want.shape and torch.equal(lazy[0], now[0])
        assert torch.equal(copy.copy(lazy), now) and torch.equal(1.0 - lazy, 1.0 - now)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grounding_dino_half(dtype: torch.dtype) -> None:
    library("transformers")
    ours, theirs = dino_pair(False)
    inputs = {
        "vision_features": torch.randn(B, M, D).to(dtype),
        "text_features": torch.randn(B, N, D).to(dtype),
        "vision_attention_mask": padding(M), "text_attention_mask": padding(N),
    }  # fmt: skip
    call = lambda m, **k: [out for out, _ in m(**k)]  # noqa: E731
    nn_parity.assert_parity(ours, theirs, inputs, dtype, call)
    plain = {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for (got, _), (want, _) in zip(ours(**plain), theirs(**plain), strict=True):
            assert got.dtype == want.dtype == torch.bfloat16
            torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


def test_grounding_dino_exact_clamp() -> None:
    """Scores more than 50000 apart, where the original's softmax is flat below the clamp; and the
    default, which is the softmax that the clamp cuts off."""
    library("transformers")
    ours, theirs = dino_pair(False)
    ours.exact_clamp = True
    inputs = {"vision_features": 6e4 * torch.randn(2, M, D), "text_features": torch.randn(2, N, D)}
    inputs["vision_features"][1] *= 1e-3
    with torch.no_grad():
        (want, want_map), (want_t, _) = theirs(**inputs)
        (got, got_map), (got_t, _) = ours(**inputs)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
        size = want_t.abs().amax((1, 2), keepdim=True)  # the two items differ by 1e3
        torch.testing.assert_close(got_t / size, want_t / size, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.add(got_map, 0.0), want_map, atol=1e-5, rtol=1e-4)
        ours.exact_clamp = False
        assert not torch.allclose(ours(**inputs)[0][0], want, atol=1e-3, rtol=1e-4)
        alone = {k: t[1:] for k, t in inputs.items()}
        torch.testing.assert_close(ours(**alone)[0][0], ours(**inputs)[0][0][1:])


def test_grounding_dino_dropout_and_adapters() -> None:
    """Absorbed and direct drop the same weights; a layer that is more than Linear is called."""
    ours = BiMultiHeadAttention(D, D, 48, 4, dropout=0.4)
    args = (torch.randn(B, M, D), torch.randn(B, N, D), padding(M), padding(N))

    def run(module):
        torch.manual_seed(3)
        leaves = [t.requires_grad_() for t in args[:2]]
        outs = nn_parity.flatten(module(*leaves, *args[2:]))
        return [*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), leaves)]

    assert ours._absorbs(*args[:2])
    want = run(ours)
    for name in ("vision_proj", "values_vision_proj"):
        hooked = copy.deepcopy(ours)
        getattr(hooked, name).register_forward_hook(lambda *_: None)
        assert not hooked._absorbs(*args[:2])
        for a, b in zip(run(hooked), want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    ours.vision_proj = Adapter(D, 48)
    assert not ours._absorbs(*args[:2])


def test_grounding_dino_large_scores() -> None:
    library("transformers")
    ours, theirs = dino_pair(False)
    inputs = {"vision_features": 60 * torch.randn(B, M, D), "text_features": torch.randn(B, N, D)}
    call = lambda m, **k: [out for out, _ in m(**k)]  # noqa: E731
    nn_parity.assert_parity(ours, theirs, inputs, call=call)


def dino_call(model, **more):
    torch.manual_seed(3)
    ids = torch.tensor([[101, 20, 21, 102], [101, 30, 102, 0]])
    return model(
        pixel_values=torch.randn(2, 3, 64, 64), input_ids=ids, attention_mask=(ids != 0).long(),
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["GroundingDino", "MMGroundingDino"])
def test_patch_grounding_dino(family: str) -> None:
    """The detection forward, before and after; copies, state_dict, undoing."""
    transformers = library("transformers")
    config = dino_config()
    if family == "MMGroundingDino":
        config = transformers.MMGroundingDinoConfig(**{
            k: v for k, v in config.to_dict().items()
            if k not in ("model_type", "text_config", "backbone_config", "architectures")
        }, text_config=config.text_config, backbone_config=config.backbone_config)  # fmt: skip
    model = getattr(transformers, f"{family}ForObjectDetection")(config).eval()
    attentions = [m for m in model.modules() if type(m).__name__.endswith("BiMultiHeadAttention")]
    classes, keys = [type(m) for m in attentions], list(model.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                p.fill_(1.0)
        want = dino_call(model, output_attentions=True)
        replaced = fusedmm.patch(model)
        assert len(replaced) == len(attentions) == 2
        assert list(replaced.values()) == classes
        assert all(type(m) is BiMultiHeadAttention for m in attentions)
        assert fusedmm.patch(model) == {} and list(model.state_dict()) == keys
        for patched in (model, copy.deepcopy(model)):
            got = dino_call(patched)
            torch.testing.assert_close(got.pred_boxes, want.pred_boxes, atol=2e-5, rtol=1e-4)
            finite = want.logits.isfinite()
            torch.testing.assert_close(
                got.logits[finite], want.logits[finite], atol=2e-4, rtol=1e-4
            )
        maps = dino_call(model, output_attentions=True).encoder_attentions
        for layer in range(2):
            for side in range(2):  # vision over text, text over vision: computed when read
                lazy, exact = maps[side][layer], want.encoder_attentions[side][layer]
                assert type(lazy) is LazyMap
                torch.testing.assert_close(torch.add(lazy, 0.0), exact, atol=1e-5, rtol=1e-4)
        assert fusedmm.unpatch(model) == replaced
        assert [type(m) for m in attentions] == classes and fusedmm.unpatch(model) == {}
        assert all("_fusedmm_original" not in m.__dict__ for m in attentions)
        assert torch.equal(dino_call(model).pred_boxes, want.pred_boxes)


# -- LXMERT


def lxmert_config(**changes):
    library("transformers")
    from transformers import LxmertConfig

    return LxmertConfig(
        **{
            "vocab_size": 100, "hidden_size": D, "num_attention_heads": 4, "l_layers": 1,
            "x_layers": 2, "r_layers": 1, "intermediate_size": 64, "visual_feat_dim": 24,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("form", ["none", "additive", "bool"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_lxmert(form: str, training: bool) -> None:
    library("transformers")
    from transformers.models.lxmert.modeling_lxmert import LxmertCrossAttentionLayer

    theirs = LxmertCrossAttentionLayer(lxmert_config()).train(training)
    ours = LxmertCrossAttention(D, 4, 0.0, 0.0).train(training)
    nn_parity.load_both_ways(ours, theirs)
    inputs = {"x": torch.randn(B, M, D), "y": torch.randn(B, N, D)}
    if form != "none":
        inputs |= {"x_mask": additive(M), "y_mask": additive(N)}
    fused = form == "bool"

    def both(m, x, y, x_mask=None, y_mask=None):
        if m.__class__ is LxmertCrossAttention:
            masks = [None if k is None else (k == 0)[:, 0, 0] for k in (x_mask, y_mask)]
            x_mask, y_mask = masks if fused else (x_mask, y_mask)
            return m.both(x, y, x_mask, y_mask)
        return m(x, y, y_mask), m(y, x, x_mask)

    def one(m, x, y, x_mask=None, y_mask=None):
        return m(x, y, y_mask, output_attentions=True)

    nn_parity.assert_parity(ours, theirs, inputs, call=both)
    nn_parity.assert_parity(ours, theirs, inputs, call=one)


def test_patch_lxmert() -> None:
    """Question answering, before and after, outputs, attentions and gradients; undoing."""
    transformers = library("transformers")
    model = transformers.LxmertForQuestionAnswering(lxmert_config()).eval()
    inputs = {
        "input_ids": torch.randint(1, 100, (B, N)),
        "visual_feats": torch.randn(B, M, 24),
        "visual_pos": torch.rand(B, M, 4),
        "attention_mask": (~padding(N)).long(),
        "visual_attention_mask": (~padding(M)).long(),
        "output_attentions": True,
    }

    def run():
        model.zero_grad()
        out = model(**inputs)
        out.question_answering_score.square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [out.question_answering_score, *out.cross_encoder_attentions, *grads]

    want = run()
    types = [type(m) for m in model.modules()]
    replaced = fusedmm.patch(model)
    assert len(replaced) == 4
    got = run()
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    score = loaded(**inputs).question_answering_score
    torch.testing.assert_close(score, got[0])
    assert fusedmm.unpatch(loaded).keys() == replaced.keys()
    fusedmm.unpatch(model)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


# -- open_clip


class Step(nn.Module):
    """A loss with its parameters, as a training script holds them."""

    def __init__(self, loss: nn.Module, scale: float, bias: float | None) -> None:
        super().__init__()
        self.loss = loss
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, image, text):
        image, text = (nn.functional.normalize(t, dim=-1) for t in (image, text))
        bias = {} if self.bias is None else {"logit_bias": self.bias}
        return self.loss(image, text, self.log_scale.exp(), output_dict=True, **bias)


@pytest.mark.parametrize("kind", ["clip", "clip_bias", "siglip"])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_open_clip_losses(kind: str, scale: float) -> None:
    open_clip = library("open_clip")
    ours, theirs = ClipLoss(), open_clip.ClipLoss()
    if kind == "siglip":
        ours, theirs = SigLipLoss(), open_clip.loss.SigLipLoss()
    bias = None if kind == "clip" else -10.0
    inputs = {"image": torch.randn(67, 40), "text": torch.randn(67, 40)}
    nn_parity.assert_parity(Step(ours, scale, bias), Step(theirs, scale, bias), inputs)
    x, y = (nn.functional.normalize(t, dim=-1) for t in inputs.values())
    args = (x, y, torch.tensor(scale), *([torch.tensor(bias)] if bias else []))
    assert ours(*args).shape == () and set(ours(*args, output_dict=True)) == {"contrastive_loss"}


def test_open_clip_constructors() -> None:
    open_clip = library("open_clip")
    kinds = {"local_loss": True, "gather_with_grad": True, "cache_labels": True}
    for options in (kinds, {**kinds, "rank": 0, "world_size": 1}):
        for loss in (open_clip.ClipLoss(**options), ClipLoss(**options)):
            assert {k: getattr(loss, k) for k in options} == options
    for loss in (open_clip.loss.SigLipLoss, SigLipLoss):
        assert loss(cache_labels=True, rank=0, world_size=1, dist_impl="gather").rank == 0


def test_patch_open_clip() -> None:
    """A loss on its own and within a module; subclasses stay."""
    open_clip = library("open_clip")
    x, y = (nn.functional.normalize(torch.randn(9, 16), dim=-1) for _ in range(2))
    loss, scale = open_clip.ClipLoss(cache_labels=True), torch.tensor(20.0)
    want = loss(x, y, scale)
    assert fusedmm.patch(loss) == {"": open_clip.ClipLoss} and type(loss) is ClipLoss
    torch.testing.assert_close(loss(x, y, scale), want)
    assert type(copy.deepcopy(loss)) is ClipLoss
    fusedmm.unpatch(loss)
    assert type(loss) is open_clip.ClipLoss and torch.equal(loss(x, y, scale), want)
    coca = open_clip.CoCaLoss(1.0, 1.0)
    both = nn.ModuleList([open_clip.loss.SigLipLoss(), coca])
    assert fusedmm.patch(both) == {"0": open_clip.loss.SigLipLoss} and both[1] is coca


def test_import_is_lazy() -> None:
    code = "import fusedmm, sys; print({'transformers', 'open_clip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
