"""Reference models: fused and standard agree in value and gradient, names match the originals,
files round-trip, bad settings are refused. Tiny sizes.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("tokenizers", reason="the train extra is not installed")

import fusedmm  # noqa: E402
from fusedmm.models import (  # noqa: E402
    CLIP,
    PRESETS,
    CLIPConfig,
    Tokenizer,
    ViLBERT,
    ViLBERTConfig,
    build,
    load,
    save,
)
from fusedmm.models.clip import standard_contrastive_loss  # noqa: E402
from fusedmm.nn.co_attention import (  # noqa: E402
    BertBiAttention,
    BertConnectionLayer,
    standard_attention,
)

SMALL = CLIPConfig(
    image_size=32, vision_width=32, vision_layers=2, vision_heads=2, context_length=10,
    vocab_size=300, text_width=32, text_layers=1, text_heads=2, embed_dim=24,
)  # fmt: skip
SMALL_BERT = ViLBERTConfig(
    vocab_size=300, max_position=10, hidden_size=32, layers=2, heads=2, v_hidden_size=48,
    v_layers=1, v_heads=2, bi_hidden_size=40, bi_heads=2, t_biattention_id=(1, 2),
    v_biattention_id=(0, 1), regions=SMALL,
)  # fmt: skip


def tokens_of(batch: int, length: int = 10) -> torch.Tensor:
    out = torch.randint(4, 299, (batch, length))
    out[:, 0] = 3
    for i, row in enumerate(out):
        end = 2 + i % (length - 2)
        row[end] = 299
        row[end + 1 :] = 0
    return out


def gradients(model, loss):
    loss.backward()
    out = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def test_clip_fused_equals_standard():
    torch.manual_seed(0)
    ours, standard = CLIP(SMALL), CLIP(SMALL, loss_backend="standard")
    standard.load_state_dict(ours.state_dict())
    images, tokens = torch.rand(12, 3, 32, 32), tokens_of(12)
    ids = torch.arange(12) // 2  # every caption twice
    a, b = ours.loss(images, tokens, ids), standard.loss(images, tokens, ids)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    theirs = gradients(standard, b)
    for name, grad in gradients(ours, a).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_standard_loss_is_the_contract():
    torch.manual_seed(0)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 2, 3, 4, 4])
    for which in (None, ids):
        want = fusedmm.contrastive_loss(
            x, y, 9.0, ids_x=which, ids_y=which, normalize=True, backend="reference"
        )
        got = standard_contrastive_loss(x, y, torch.tensor(9.0), which)
        assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_clip_ignores_padding(pool):
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(SMALL, pool=pool)).eval()
    tokens = tokens_of(4)
    other = torch.where(tokens == 0, torch.tensor(5), tokens)
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(other))


def test_clip_has_open_clip_names():
    names = set(CLIP(dataclasses.replace(SMALL, stem="patch", pool="token")).state_dict())
    assert {
        "visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding",
        "visual.ln_pre.weight", "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.0.attn.out_proj.bias",
        "visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.ln_post.bias", "visual.proj",
        "token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection",
        "transformer.resblocks.0.ln_1.weight", "logit_scale",
    } <= names  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_bi_attention_fused_equals_standard(masked):
    torch.manual_seed(0)
    ours = BertBiAttention(48, 32, 40, 2)
    standard = BertBiAttention(48, 32, 40, 2, attention_backend="standard")
    standard.load_state_dict(ours.state_dict())
    x1, x2 = torch.randn(3, 70, 48), torch.randn(3, 11, 32)
    keep1 = keep2 = None
    if masked:
        keep1, keep2 = torch.rand(3, 70) < 0.6, torch.rand(3, 11) < 0.6
        keep1[:, 0] = keep2[:, 0] = True
    a, b = ours(x1, keep1, x2, keep2), standard(x1, keep1, x2, keep2)
    assert a[0].shape == (3, 11, 40) and a[1].shape == (3, 70, 40)
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    theirs = gradients(standard, b[0].square().sum() + b[1].square().sum())
    for name, grad in gradients(ours, a[0].square().sum() + a[1].square().sum()).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


def test_attention_maps_are_what_forward_uses():
    torch.manual_seed(0)
    block = BertBiAttention(48, 32, 40, 2)
    x1, x2 = torch.randn(2, 9, 48), torch.randn(2, 5, 32)
    keep2 = torch.tensor([[True] * 5, [True, True, False, False, True]])
    of_text, of_image = block.attention_maps(x1, None, x2, keep2)
    assert of_text.shape == (2, 2, 5, 9) and of_image.shape == (2, 2, 9, 5)
    assert (of_image[1, :, :, 2:4] == 0).all()
    v1 = block.value1(x1).view(2, 9, 2, 20).transpose(1, 2)
    context = (of_text @ v1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(context, block(x1, None, x2, keep2)[0], rtol=1e-4, atol=1e-5)


def test_connection_layer_has_vilbert_names():
    ours = set(BertConnectionLayer(48, 96, 32, 64, 40, 2).state_dict())
    linear = [f"biattention.{n}{i}" for n in ("query", "key", "value") for i in (1, 2)]
    linear += [f"biOutput.{n}{i}" for n in ("dense", "q_dense", "LayerNorm") for i in (1, 2)]
    linear += ["v_intermediate.dense", "t_intermediate.dense"]
    linear += [f"{s}_output.{n}" for s in "vt" for n in ("dense", "LayerNorm")]
    assert ours == {f"{n}.{p}" for n in linear for p in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_standard_attention_equals_sdpa(dtype, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 13, 8, dtype=dtype) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal
    )
    got = standard_attention(q, k, v, causal=causal)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=3e-2 if dtype != q.float().dtype else 1e-5
    )


def test_vilbert_fused_equals_standard():
    torch.manual_seed(0)
    ours, standard = ViLBERT(SMALL_BERT), ViLBERT(SMALL_BERT, attention_backend="standard")
    standard.load_state_dict(ours.state_dict())
    images, tokens = torch.rand(5, 3, 32, 32), tokens_of(5)
    losses = []
    for model in (ours, standard):
        encoded = model.encode(model.regions(images), tokens, tokens != 0)
        losses.append(
            model.matching_logits(encoded).square().sum()
            + model.mlm_logits(encoded.text).logsumexp(dim=-1).mean()
        )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    theirs = gradients(standard, losses[1])
    mine = gradients(ours, losses[0])
    assert mine.keys() == theirs.keys()
    assert not any(name.startswith("region_encoder") for name in mine)
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_vilbert_ignores_padding_and_shows_maps():
    torch.manual_seed(0)
    model = ViLBERT(SMALL_BERT).eval()
    regions = model.regions(torch.rand(4, 3, 32, 32))
    tokens = tokens_of(4)
    keep = tokens != 0
    other = torch.where(keep, tokens, torch.tensor(7))
    maps: list[torch.Tensor] = []
    a = model.matching_logits(model.encode(regions, tokens, keep, maps))
    torch.testing.assert_close(a, model.matching_logits(model.encode(regions, other, keep)))
    assert [m.shape for m in maps] == [(4, 2, 10, 17)] * 2
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(4, 2, 10))


def make_tokenizer(length: int = 10) -> Tokenizer:
    return Tokenizer.train(["a red apple", "a green tree"], vocab_size=300, length=length)


@pytest.mark.parametrize("kind", ["clip", "vilbert"])
def test_save_and_load(tmp_path, kind):
    torch.manual_seed(0)
    model = CLIP(SMALL) if kind == "clip" else ViLBERT(SMALL_BERT)
    save(tmp_path, model, make_tokenizer(), note="kept")
    again, tokenizer, config = load(tmp_path)
    assert type(again) is type(model) and not again.training
    assert again.config == model.config and config["note"] == "kept"
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert tokenizer.length == 10
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_load_names_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a trained model, got no config.json"):
        load(tmp_path / "nowhere")
    save(tmp_path, CLIP(SMALL), make_tokenizer())
    weights = tmp_path / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="damaged or of another version"):
        load(tmp_path)
    weights.write_bytes(raw)
    (tmp_path / "config.json").write_text('{"model": "clip"')
    with pytest.raises(ValueError, match="damaged or of another version"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "blip", "config": {}, "tokenizer_length": 10}')
    with pytest.raises(ValueError, match="kind: expected one of .*got 'blip'"):
        load(tmp_path)
    with pytest.raises(TypeError, match="models.save: model: expected one of"):
        save(tmp_path, torch.nn.Linear(2, 2), make_tokenizer())


# As open_clip counts ViT-B-32, ViT-B-16 and ViT-L-14; ViLBERT with its frozen region encoder.
PARAMETERS = {
    "clip-vit-b-32": 151_277_313,
    "clip-vit-b-16": 149_620_737,
    "clip-vit-l-14": 427_616_513,
    "vilbert-base": 409_421_628,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_standard_sizes(name):
    with torch.device("meta"):
        model = build(*PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_clip_preset_has_the_names_and_shapes_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    config = PRESETS["clip-vit-b-32"][1]
    with torch.device("meta"):
        ours = build("clip", config)
        theirs = open_clip.model.CLIP(
            512,
            open_clip.CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224),
            open_clip.CLIPTextCfg(
                context_length=77, vocab_size=49408, width=512, heads=8, layers=12
            ),
        )
    shapes = [{k: v.shape for k, v in m.named_parameters()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_a_standard_size_takes_a_training_step():
    torch.manual_seed(0)
    model = build(*PRESETS["clip-vit-b-32"])
    images, tokens = torch.rand(2, 3, 224, 224), torch.randint(0, 49000, (2, 77))
    tokens[:, 9] = 49407
    before = model.visual.proj.clone()
    loss = model.loss(images, tokens)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model.visual.proj.isfinite().all() and not torch.equal(model.visual.proj, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPConfig(patch_size=7, stem="patch"), "patch_size: expected a divisor of"),
        (lambda: CLIPConfig(patch_size=7), "patch_size: expected a power of 2"),
        (lambda: CLIPConfig(pool="max"), "pool: expected one of"),
        (lambda: CLIPConfig(stem="dense"), "stem: expected one of"),
        (lambda: CLIPConfig(vision_heads=3), "vision_heads: expected a divisor of"),
        (lambda: CLIPConfig(text_heads=5), "text_heads: expected a divisor of"),
        (lambda: ViLBERTConfig(v_biattention_id=(0,)), "v_biattention_id: expected 2 entries"),
        (lambda: ViLBERTConfig(t_biattention_id=(2, 1)), "t_biattention_id: expected ascending"),
        (lambda: ViLBERTConfig(t_biattention_id=(1, 9)), "t_biattention_id: expected ascending"),
        (lambda: BertBiAttention(8, 8, 9, 2), "num_attention_heads: expected a divisor of"),
        (lambda: ViLBERT(ViLBERTConfig(heads=3)), "heads: expected a divisor of 128, got 3"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
