"""patch() on Transformers' models, and the attention function, built from small random configs;
what a patched module meets in training: wrappers, compile, checkpointing, processes.
"""

import copy
import os

import nn_parity
import pytest
import torch
from test_nn_originals import dino_call, dino_config, lxmert_config
from torch import nn

import fusedmm
from fusedmm.integrations import register_attention
from fusedmm.nn import BiMultiHeadAttention, BiXAttn, BiXAttnBlock, LightGlueCrossBlock

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="not installed (extra: test)")
B, M, N, D = 2, 19, 13, 32


# -- modules whose originals are not on any package index: eager versions of their equations


class EagerCrossBlock(LightGlueCrossBlock):
    def forward(self, x0, x1, mask=None):
        def heads(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        qk0, qk1 = heads(self.to_qk(x0)), heads(self.to_qk(x1))
        s = qk0 @ qk1.mT / qk0.shape[-1] ** 0.5
        if mask is not None:
            s = s.masked_fill(~mask[:, None], float("-inf"))
        messages = s.softmax(-1) @ heads(self.to_v(x1)), s.mT.softmax(-1) @ heads(self.to_v(x0))
        out = []
        for x, m in zip((x0, x1), messages, strict=True):
            m = self.to_out(m.nan_to_num().transpose(1, 2).flatten(2))
            out.append(x + self.ffn(torch.cat([x, m], -1)))
        return out


class EagerBiXAttn(BiXAttn):
    def forward(self, latents, patches):
        def heads(t):
            return t.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

        r_l, v_l = heads(self.rv_latents(latents))
        r_p, v_p = heads(self.rv_patches(patches))
        s = r_l @ r_p.mT / r_l.shape[-1] ** 0.5
        outs = s.softmax(-1) @ v_p, s.mT.softmax(-1) @ v_l
        l_out, p_out = (o.transpose(1, 2).flatten(2) for o in outs)
        return self.proj_lat(l_out), self.proj_pat(p_out)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_lightglue_cross_block(masked: bool) -> None:
    ours, theirs = LightGlueCrossBlock(D, 4), EagerCrossBlock(D, 4)
    nn_parity.load_both_ways(ours, theirs)
    inputs = {"x0": torch.randn(B, M, D), "x1": torch.randn(B, N, D)}
    if masked:
        real0, real1 = torch.rand(B, M) > 0.3, torch.rand(B, N) > 0.3
        with torch.no_grad():  # the eager gradient of a row without keys is NaN
            pair = real0[:, :, None] & real1[:, None]
            for a, b in zip(ours(**inputs, mask=pair), theirs(**inputs, mask=pair), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert torch.equal(ours(**inputs, mask=pair[:, None])[0], ours(**inputs, mask=pair)[0])
    else:
        nn_parity.assert_parity(ours, theirs, inputs)
    assert set(ours.state_dict()) == {
        f"{layer}.{name}" for layer in ("to_qk", "to_v", "to_out", "ffn.0", "ffn.1", "ffn.3")
        for name in ("weight", "bias")
    }  # fmt: skip


@pytest.mark.parametrize("one_set", [False, True], ids=["batch", "one_set"])
def test_bixt(one_set: bool) -> None:
    ours, theirs = BiXAttn(24, D, 48, 4), EagerBiXAttn(24, D, 48, 4)
    nn_parity.load_both_ways(ours, theirs)
    inputs = {"x": torch.randn(1 if one_set else B, N, 24), "y": torch.randn(B, M, D)}
    nn_parity.assert_parity(ours, theirs, inputs, call=lambda m, x, y: m(x, y))
    block, eager = BiXAttnBlock(24, D, 48, 4), BiXAttnBlock(24, D, 48, 4)
    eager.attn = theirs
    block.attn = ours
    eager.load_state_dict(block.state_dict())
    if not one_set:
        nn_parity.assert_parity(block, eager, inputs, call=lambda m, x, y: m(x, y))
    assert {k.split(".")[0] for k in block.state_dict()} == {
        "norm1_lat", "norm1_pat", "attn", "norm2_lat", "mlp_lat", "norm2_pat", "mlp_pat",
    }  # fmt: skip


# -- whole models


def lightglue():
    detector = transformers.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, keypoint_decoder_dim=65,
        descriptor_decoder_dim=D, max_keypoints=40, keypoint_threshold=0.0,
    )  # fmt: skip
    config = transformers.LightGlueConfig(
        keypoint_detector_config=detector, descriptor_dim=D, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, depth_confidence=-1.0, width_confidence=-1.0,
        filter_threshold=0.0,
    )  # fmt: skip
    return transformers.LightGlueForKeypointMatching(config).eval()


def test_patch_lightglue() -> None:
    """Matching of image pairs, before and after: the same keypoints, matches and scores."""
    model, images = lightglue(), torch.rand(2, 2, 3, 96, 128)
    with torch.no_grad():
        want = model(images)
        replaced = fusedmm.patch(model, verbose=False)
        assert list(replaced) == [f"transformer_layers.{i}.cross_attention" for i in range(3)]
        got = model(images)
        assert torch.equal(got.matches, want.matches) and (want.matches >= 0).any()
        torch.testing.assert_close(got.matching_scores, want.matching_scores)
        maps = model(images, output_attentions=True).attentions
        fusedmm.unpatch(model)
        for a, b in zip(maps, model(images, output_attentions=True).attentions, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(model(images).matching_scores, want.matching_scores)


class BertBiAttention(nn.Module):
    """The interface of the original code's class of that name around the paper's equation."""

    __module__ = "vilbert.vilbert"

    def __init__(self, width1: int, width2: int, joint: int, heads: int, p: float) -> None:
        super().__init__()
        self.num_attention_heads, self.visualization = heads, True
        for i, width in ((1, width1), (2, width2)):
            for name in ("query", "key", "value"):
                setattr(self, f"{name}{i}", nn.Linear(width, joint))
            setattr(self, f"dropout{i}", nn.Dropout(p))

    def forward(self, x1, mask1, x2, mask2, co_attention_mask=None, use_co_attention_mask=False):
        def heads(layer, x):
            return layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        def attend(query, key, value, mask, dropout):
            p = (query @ key.mT / query.shape[-1] ** 0.5 + mask).softmax(-1)
            return (dropout(p) @ value).transpose(1, 2).flatten(2), p

        q1, k1, v1 = (heads(f, x1) for f in (self.query1, self.key1, self.value1))
        q2, k2, v2 = (heads(f, x2) for f in (self.query2, self.key2, self.value2))
        c1, p1 = attend(q2, k1, v1, mask1, self.dropout1)
        c2, p2 = attend(q1, k2, v2, mask2, self.dropout2)
        return c1, c2, {"attn1": p1, "queries1": q2, "keys1": k1,
                        "attn2": p2, "querues2": q1, "keys2": k2}  # fmt: skip


def test_patch_vilbert() -> None:
    """The code's own class by its name, here a stand-in: it is on no package index."""
    model = nn.ModuleList([BertBiAttention(24, D, 48, 4, 0.0)])
    x1, x2 = torch.randn(B, M, 24), torch.randn(B, N, D)
    masks = (-1e4 * (torch.rand(B, 1, 1, n) > 0.6).float() for n in (M, N))
    args = (x1, next(masks), x2, next(masks))
    want1, want2, want = model[0](*args)
    keys = model.state_dict().keys()
    assert list(fusedmm.patch(model, verbose=False)) == ["0"] and model.state_dict().keys() == keys
    got1, got2, got = model[0](*args, None, False)
    torch.testing.assert_close(got1, want1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got2, want2, atol=1e-5, rtol=1e-5)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        torch.testing.assert_close(torch.add(got[name], 0.0), exact, atol=1e-6, rtol=1e-5)
    model[0].visualization = False
    assert model[0](*args)[2] is None
    model[0].dropout2.p = 0.5
    with pytest.raises(NotImplementedError, match="BertBiAttention: dropout2: expected 0.0"):
        model[0](*args)


@pytest.mark.parametrize("kind", ["clip", "bert", "gpt2"])
def test_attention_function(kind: str) -> None:
    """attn_implementation="fusedmm": bidirectional, padded and causal models, forward and backward;
    and for a model that is loaded already."""
    if kind == "bert" and transformers.__version__ < "5":
        pytest.skip("BERT before Transformers 5 has a table of attentions of its own")
    register_attention()
    sizes = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ids = torch.randint(1, 90, (B, N))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "clip":
        text = {**sizes, "vocab_size": 100, "max_position_embeddings": 16}
        vision = {**sizes, "image_size": 32, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = transformers.CLIPModel(config)
        inputs["pixel_values"] = torch.randn(B, 3, 32, 32)
    elif kind == "bert":
        config = transformers.BertConfig(vocab_size=100, **sizes, hidden_dropout_prob=0.0,
                                         attention_probs_dropout_prob=0.0)  # fmt: skip
        model = transformers.BertModel(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=100, n_embd=D, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2Model(config)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(**inputs)
        result = out.logits_per_image if kind == "clip" else out.last_hidden_state
        result = result if kind == "clip" else result * mask[..., None]
        result.square().sum().backward()
        return [result.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    model.set_attn_implementation("eager")
    want = run()
    model.set_attn_implementation("fusedmm")
    got = run()
    assert len(got) == len(want)
    scale = max(t.abs().max() for t in want[1:])
    torch.testing.assert_close(got[0], want[0], atol=2e-5, rtol=2e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 * scale, rtol=1e-4)
    fresh = transformers.AutoModel.from_config(config, attn_implementation="fusedmm")
    assert fresh.config._attn_implementation == "fusedmm"


def test_report(capsys: pytest.CaptureFixture) -> None:
    """What was replaced, and why the rest was not."""
    from transformers.models.grounding_dino import modeling_grounding_dino as hf

    class Changed(hf.GroundingDinoBiMultiHeadAttention):
        pass

    model = nn.ModuleDict({
        "model": transformers.LxmertModel(lxmert_config()),
        "changed": Changed(dino_config()),
        "remote": type("LxmertCrossAttentionLayer", (nn.Module,), {})(),
        "plain": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    patched = fusedmm.patch(model)
    text = capsys.readouterr().out
    assert text == f"{patched}\n" and text.startswith("fusedmm: replaced 4 modules, left ")
    assert "model.encoder.x_layers.0.visual_attention: LxmertCrossAttentionLayer" in text
    reasons = patched.left
    assert "extends GroundingDinoBiMultiHeadAttention" in reasons["changed"]
    assert "is not that of transformers" in reasons["remote"]
    assert "within one stream" in reasons["plain"]
    assert "within one stream" in reasons["model.encoder.layer.0.attention.self"]
    again = fusedmm.patch(model, verbose=False)
    assert not again and not capsys.readouterr().out
    assert set(again.left) == set(reasons)
    dino = fusedmm.patch(transformers.GroundingDinoForObjectDetection(dino_config()), verbose=False)
    assert any("samples its keys" in why for why in dino.left.values())


# -- what happens to a patched module


@pytest.fixture(autouse=True)
def few_vision_tokens(monkeypatch) -> None:
    """Small shapes take the paths of large ones."""
    monkeypatch.setattr("fusedmm.nn.bi_attention.ABSORB_FROM", 0)


def fusion(training: bool = False) -> BiMultiHeadAttention:
    from transformers.models.grounding_dino import modeling_grounding_dino as hf

    module = hf.GroundingDinoBiMultiHeadAttention(dino_config()).train(training)
    fusedmm.patch(module, verbose=False)
    return module


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, M, D), torch.randn(B, N, D)


def outputs(module: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (v, _), (t, _) = module(*args)
    return v, t


def test_save_and_load(tmp_path) -> None:
    model = transformers.GroundingDinoForObjectDetection(dino_config()).eval()
    fusedmm.patch(model, verbose=False)
    with torch.no_grad():
        want = dino_call(model).pred_boxes
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert not any("fusedmm" in type(m).__module__ for m in loaded.modules())
        assert fusedmm.patch(loaded, verbose=False)
        torch.testing.assert_close(dino_call(loaded).pred_boxes, want)
        model.load_state_dict(loaded.state_dict(), strict=True)


def test_adapters_are_heard() -> None:
    """PEFT-style: Linear layers replaced inside a patched module, and a patched module wrapped."""

    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        @property
        def weight(self) -> torch.Tensor:
            return self.base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    from transformers.models.grounding_dino import modeling_grounding_dino as hf

    original = hf.GroundingDinoBiMultiHeadAttention(dino_config()).eval()
    for name in ("vision_proj", "values_text_proj", "out_vision_proj"):
        setattr(original, name, Lora(getattr(original, name)))
    args = streams()
    want = outputs(original, *args)
    wrapper = nn.Sequential(copy.deepcopy(original))
    assert list(fusedmm.patch(wrapper, verbose=False)) == ["0"]
    for a, b in zip(outputs(wrapper[0], *args), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    lxmert = transformers.LxmertModel(lxmert_config()).eval()
    for layer in lxmert.encoder.x_layers:
        layer.visual_attention.att.query = Lora(layer.visual_attention.att.query)
    call = dict(input_ids=torch.randint(1, 99, (B, N)), visual_feats=torch.randn(B, M, 24),
                visual_pos=torch.rand(B, M, 4))  # fmt: skip
    want = lxmert(**call).pooled_output
    fusedmm.patch(lxmert, verbose=False)
    torch.testing.assert_close(lxmert(**call).pooled_output, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    module, (v, t) = fusion(training=True), streams()
    module.dropout = 0.3  # the recomputed forward must draw the same mask

    def grads(checkpoint: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        leaves = [s.clone().requires_grad_() for s in (v, t)]
        run = lambda *a: outputs(module, *a)  # noqa: E731
        out = (
            torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant)
            if checkpoint
            else run(*leaves)
        )
        module.zero_grad()
        sum(o.square().sum() for o in out).backward()
        return [s.grad for s in leaves] + [p.grad for p in module.parameters()]

    for a, b in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "direct"])
def test_compiles_dynamically(absorbed: bool) -> None:
    """fullgraph and dynamic, forward and backward, one graph for several lengths."""
    module = fusion()
    if not absorbed:
        module.vision_proj.register_buffer("unused", torch.zeros(1))
        module.vision_proj.__class__ = type("Wrapped", (nn.Linear,), {})
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: outputs(module, *a), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m, n in ((19, 13), (23, 17)):
        v, t = torch.randn(B, m, D, requires_grad=True), torch.randn(B, n, D, requires_grad=True)
        pad = torch.zeros(B, n, dtype=torch.bool)
        pad[1, 9:] = True
        found = []
        for f in (compiled, lambda *a: outputs(module, *a)):
            out = f(v, t, None, pad)
            found.append([*out, *torch.autograd.grad(sum(o.square().sum() for o in out), (v, t))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_export_and_vmap() -> None:
    module, (v, t) = fusion(), streams()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, v: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return outputs(self.inner, v, t)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Plain(), (v, t), dynamic_shapes=({1: tokens}, None))
    longer = torch.randn(B, 31, D)
    with torch.no_grad():
        for a, b in zip(program.module()(longer, t), outputs(module, longer, t), strict=True):
            torch.testing.assert_close(a, b)
        many_v, many_t = torch.randn(3, B, M, D), torch.randn(3, B, N, D)
        batched = torch.vmap(lambda a, b: outputs(module, a, b))(many_v, many_t)
        for i in range(3):
            for a, b in zip(batched, outputs(module, many_v[i], many_t[i]), strict=True):
                torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-5)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sum(o.square().sum() for o in outputs(module, a, b))

    per_sample = torch.func.vmap(torch.func.grad(loss))(many_v, many_t)
    leaf = many_v[1].clone().requires_grad_()
    loss(leaf, many_t[1]).backward()
    torch.testing.assert_close(per_sample[1], leaf.grad, atol=1e-4, rtol=1e-4)


def test_profiler_names() -> None:
    module, (v, t) = fusion(training=True), streams()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sum(o.sum() for o in outputs(module, v.requires_grad_(), t)).backward()
    names = {event.key for event in profile.key_averages()}
    assert any("fusedmm" in n and "fusion_attention" in n and "ackward" in n for n in names), names
    assert any("fusedmm" in n and "fusion_attention_fwd" in n for n in names), names
