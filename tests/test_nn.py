"""Modules against plain eager versions of their equations, written out here."""

import copy
import pickle

import nn_parity
import pytest
import torch
from torch import nn

import fusedmm
from fusedmm.nn import (
    AdditiveAttention,
    AttentionFusion,
    BertBiAttention,
    BertConnectionLayer,
    BiAttentionBlock,
    BiMultiHeadAttention,
    ClipLoss,
    CoAttention,
    ConcatFusion,
    GatedFusion,
    LxmertCrossAttention,
    MultimodalAttention,
    SigLipLoss,
)

B, M, N, DIM = 3, 19, 13, 32


def streams(dim_x: int = DIM, dim_y: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, M, dim_x), torch.randn(B, N, dim_y)


def keep(size: int) -> torch.Tensor:
    mask = torch.rand(B, size) > 0.3
    mask[:, 0] = True
    return mask


def attend(q, k, v, mask=None):
    """softmax(q @ k.mT / sqrt(D)) @ v over kept keys; mask bool [B, N] or additive."""
    s = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None and mask.dtype == torch.bool:
        s = s.masked_fill(~mask.view(B, *[1] * (s.dim() - 2), -1), float("-inf"))
    elif mask is not None:
        s = s + mask
    return s.softmax(-1) @ v


class EagerCoAttention(nn.Module):
    def __init__(self, dim_q, dim_k, dim_v):
        super().__init__()
        self.q_linear, self.k_linear = nn.Linear(dim_q, dim_k), nn.Linear(dim_k, dim_k)
        self.v_linear = nn.Linear(dim_v, dim_v)

    def forward(self, x, y, mask_x=None, mask_y=None):
        q, k, v = self.q_linear, self.k_linear, self.v_linear
        return attend(q(x), k(y), v(y), mask_y), attend(q(y), k(x), v(x), mask_x)


class EagerMultimodalAttention(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.query, self.key = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)

    def forward(self, image, text, mask=None):
        return attend(self.query(image), self.key(text), self.value(text), mask)


class EagerBertBiAttention(BertBiAttention):
    """ViLBERT's equations with the scores stored."""

    def forward(self, x1, mask1, x2, mask2):
        q1, k1, v1 = (self._heads(f(x1)) for f in (self.query1, self.key1, self.value1))
        q2, k2, v2 = (self._heads(f(x2)) for f in (self.query2, self.key2, self.value2))
        contexts = attend(q2, k1, v1, mask1), attend(q1, k2, v2, mask2)
        return tuple(c.transpose(1, 2).flatten(2) for c in contexts)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_co_attention(masked: bool, dtype: torch.dtype) -> None:
    ours, theirs = CoAttention(DIM, DIM, DIM), EagerCoAttention(DIM, DIM, DIM)
    nn_parity.load_both_ways(ours, theirs)
    x, y = (t.to(dtype) for t in streams())
    masks = {"mask_x": keep(M), "mask_y": keep(N)} if masked else {}
    call = lambda m, x, y, **k: m(x, y, k.get("mask_x"), k.get("mask_y"))  # noqa: E731
    nn_parity.assert_parity(ours, theirs, {"x": x, "y": y, **masks}, dtype, call)


def test_co_attention_order_and_widths() -> None:
    module = CoAttention(DIM, DIM, DIM)
    txt_fused, img_fused = module(*streams())
    assert txt_fused.shape == (B, M, DIM) and img_fused.shape == (B, N, DIM)
    wide = CoAttention(512, 512, 512)
    assert wide(*streams(512, 512))[0].shape == (B, M, 512)
    with pytest.raises(ValueError, match="CoAttention: dim_q, dim_k, dim_v: expected one width"):
        CoAttention(32, 16, 32)


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_multimodal_attention(masked: bool) -> None:
    ours, theirs = MultimodalAttention(DIM), EagerMultimodalAttention(DIM)
    nn_parity.load_both_ways(ours, theirs)
    image, text = streams()
    masks = {"mask": keep(N)} if masked else {}
    nn_parity.assert_parity(ours, theirs, {"image": image, "text": text, **masks})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_masks_of_other_types_are_refused(dtype: torch.dtype) -> None:
    """A tokenizer's 1 and 0 would be added to the scores, or is a raw error of torch."""
    mask, (image, text) = keep(N).to(dtype), streams()
    calls = [
        lambda: MultimodalAttention(DIM)(image, text, mask),
        lambda: AdditiveAttention(DIM, DIM, 8)(image, text, text, mask),
    ]
    if dtype != torch.float32:  # which BERT's code adds
        calls.append(lambda: BertBiAttention(DIM, DIM, DIM, 4)(image, None, text, mask))
    for call in calls:
        with pytest.raises(
            ValueError, match="Attention: mask: expected bool, True = keep.* got dtype"
        ):
            call()


@pytest.mark.parametrize("form", ["none", "bool", "additive"])
def test_bert_bi_attention(form: str) -> None:
    ours, theirs = (c(48, DIM, 64, 4) for c in (BertBiAttention, EagerBertBiAttention))
    nn_parity.load_both_ways(ours, theirs)
    x1, x2 = streams(48, DIM)
    masks = {"mask1": None, "mask2": None}
    if form != "none":
        masks = {"mask1": keep(M), "mask2": keep(N)}
    if form == "additive":
        masks = {k: -1e4 * (~m)[:, None, None].float() for k, m in masks.items()}
    inputs = {"x1": x1, **masks, "x2": x2}
    for name, m in masks.items():
        inputs[f"{name}_mask"] = m
        del inputs[name]
    call = lambda m, x1, x2, mask1_mask, mask2_mask: m(x1, mask1_mask, x2, mask2_mask)  # noqa: E731
    nn_parity.assert_parity(ours, theirs, inputs, call=call)
    if form != "none":  # the maps are what multiplies the values
        p1, p2 = ours.attention_maps(x1, masks["mask1"], x2, masks["mask2"])
        v1, v2 = ours._heads(ours.value1(x1)), ours._heads(ours.value2(x2))
        for p, v, c in zip((p1, p2), (v1, v2), ours(*[x1, masks["mask1"], x2, masks["mask2"]]),
                           strict=True):  # fmt: skip
            torch.testing.assert_close((p @ v).transpose(1, 2).flatten(2), c, atol=2e-6, rtol=2e-5)


def test_connection_layer_has_vilberts_keys() -> None:
    layer = BertConnectionLayer(48, 96, DIM, 64, 64, 4)
    first = {k.split(".")[0] for k in layer.state_dict()}
    assert first == {
        "biattention", "biOutput", "v_intermediate", "v_output", "t_intermediate", "t_output",
    }  # fmt: skip
    x1, x2 = streams(48, DIM)
    y1, y2 = layer(x1, keep(M), x2, keep(N))
    assert y1.shape == x1.shape and y2.shape == x2.shape


def test_glip_names_load() -> None:
    ours = BiAttentionBlock(48, DIM, 64, 4)
    old = {}
    names = {
        "attn.values_vision_proj": "attn.values_v_proj", "attn.values_text_proj":
        "attn.values_l_proj", "attn.vision_proj": "attn.v_proj", "attn.text_proj": "attn.l_proj",
        "attn.out_vision_proj": "attn.out_v_proj", "attn.out_text_proj": "attn.out_l_proj",
        "layer_norm_vision": "layer_norm_v", "layer_norm_text": "layer_norm_l",
        "vision_param": "gamma_v", "text_param": "gamma_l",
    }  # fmt: skip
    for key, t in ours.state_dict().items():
        head = next(n for n in names if key.startswith(n))
        old[key.replace(head, names[head])] = torch.randn_like(t)
    assert not old.keys() & ours.state_dict().keys()
    copy.deepcopy(ours).load_state_dict(old, strict=True)
    holder = nn.ModuleList([ours])
    holder.load_state_dict({f"0.{k}": t for k, t in old.items()}, strict=True)
    torch.testing.assert_close(ours.attn.vision_proj.weight, old["attn.v_proj.weight"])
    torch.testing.assert_close(ours.text_param.data, old["gamma_l"])


def test_bi_attention_dead_rows() -> None:
    """All text padded: vision gets the output bias, gradients are finite."""
    ours = BiMultiHeadAttention(DIM, DIM, 64, 4, dropout=0.0)
    v, t = (s.requires_grad_() for s in streams())
    pad = torch.zeros(B, N, dtype=torch.bool)
    pad[1] = True
    (out_v, map_v), (out_t, _) = ours(v, t, None, pad, output_attentions=True)
    assert (out_v[1] == ours.out_vision_proj.bias).all()
    assert (map_v.view(B, 4, M, N)[1] == 0).all()
    (out_v.sum() + out_t.sum() + map_v.sum()).backward()
    assert v.grad.isfinite().all() and t.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["bi", "co", "vilbert", "lxmert"])
def test_dropout_statistics(kind: str) -> None:
    """In training the mean over many masks is the eval output; in eval there is no dropout."""
    p, copies = 0.3, 3000
    x, y = (torch.randn(1, n, 16).expand(copies, -1, -1) for n in (5, 4))
    if kind == "bi":
        module = BiMultiHeadAttention(16, 16, 16, 2, dropout=p)
        run = lambda: nn_parity.flatten(module(x, y))  # noqa: E731
    elif kind == "co":
        module = CoAttention(16, 16, 16, dropout=p)
        run = lambda: module(x, y)  # noqa: E731
    elif kind == "vilbert":
        module = BertBiAttention(16, 16, 16, 2, dropout=p)
        run = lambda: module(x, None, y, None)  # noqa: E731
    else:
        module = LxmertCrossAttention(16, 2, p, 0.0)
        module.output.LayerNorm = nn.Identity()
        run = lambda: nn_parity.flatten(module.both(x, y))  # noqa: E731
    with torch.no_grad():
        for noisy, exact in zip(run(), module.eval() and run(), strict=True):
            assert noisy.std(0).max() > 1e-3 and exact.std(0).max() < 1e-5
            # Four standard errors of the mean; about 1e-4 of the entries lie beyond.
            off = (noisy.mean(0) - exact.mean(0)).abs() / (noisy.std(0) / copies**0.5)
            assert off.max() < 5.0


def test_fusion_layers() -> None:
    x, y = torch.randn(B, 7), torch.randn(B, 9)
    concat, gated, mean = (c(7, 9, 5) for c in (ConcatFusion, GatedFusion, AttentionFusion))
    both = torch.cat([x, y], -1)
    torch.testing.assert_close(concat(x, y), both @ concat.fc.weight.T + concat.fc.bias)
    z = gated.gate(both).sigmoid()
    want = z * gated.fc_x(x).tanh() + (1 - z) * gated.fc_y(y).tanh()
    torch.testing.assert_close(gated(x, y), want)
    h_x, h_y = mean.fc_x(x), mean.fc_y(y)
    e_x, e_y = (mean.score(h.tanh()).exp() for h in (h_x, h_y))
    torch.testing.assert_close(mean(x, y), (e_x * h_x + e_y * h_y) / (e_x + e_y))
    for module in (concat, gated, mean):  # streams of one length as well
        assert module(torch.randn(2, 3, 7), torch.randn(2, 3, 9)).shape == (2, 3, 5)


def test_additive_attention() -> None:
    module = AdditiveAttention(8, 6, 5)
    q, k, v, mask = torch.randn(B, 4, 8), torch.randn(B, N, 6), torch.randn(B, N, 3), keep(N)
    mask[2] = False
    got = module(q, k, v, mask)
    for b in range(2):
        for m in range(4):
            s = torch.stack([
                module.w_v(torch.tanh(module.W_q(q[b, m]) + module.W_k(k[b, n])))[0]
                for n in range(N)
            ])  # fmt: skip
            p = s[mask[b]].softmax(0)
            torch.testing.assert_close(got[b, m], p @ v[b][mask[b]])
    assert (got[2] == 0).all()


def test_losses_take_a_backend(backend: str) -> None:
    x, y = (nn.functional.normalize(torch.randn(12, 8), dim=-1) for _ in range(2))
    with fusedmm.use_backend(backend):
        clip, siglip = ClipLoss()(x, y, 10.0), SigLipLoss()(x, y, 10.0, -10.0)
    s = 10.0 * x @ y.T
    labels = torch.arange(12)
    want = (nn.functional.cross_entropy(s, labels) + nn.functional.cross_entropy(s.T, labels)) / 2
    torch.testing.assert_close(clip, want)
    z = 2 * torch.eye(12) - 1
    want = -nn.functional.logsigmoid(z * (s - 10.0)).sum() / 12
    torch.testing.assert_close(siglip, want)


def test_losses_without_a_process_group() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="ClipLoss: world_size: expected a process group of 2"):
        ClipLoss(world_size=2)(x, x, 1.0)
    with pytest.raises(ValueError, match="SigLipLoss: dist_impl: expected"):
        SigLipLoss(dist_impl="ring")


def test_modules_copy_and_pickle() -> None:
    for module in (CoAttention(8, 8, 8), BiAttentionBlock(8, 8, 8, 2), LxmertCrossAttention(8, 2)):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.state_dict().keys() == module.state_dict().keys()


def test_patch_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="patch: model: expected a torch.nn.Module, got list"):
        fusedmm.patch([])
    assert fusedmm.patch(nn.Linear(2, 2)) == {}
