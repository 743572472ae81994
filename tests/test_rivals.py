"""What other implementations of these losses and attentions get wrong, as tests of ours.

Gather order and diagonal offset across ranks (sentence-transformers #2932, #3453) are the "moved"
and uneven cases of test_distributed.py.
"""

import harness
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmm
from fusedmm import testing
from fusedmm.backends.reference import contrastive_loss as reference
from fusedmm.ops import self_similarity
from fusedmm.testing import AttentionShape, PairShape, fused, make_case

PAIRS = PairShape(261, 261, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_of_0_005(backend, device, dtype):
    """memeff: loss -inf and NaN gradients."""
    case = make_case(
        "contrastive_loss", PAIRS, dtype, logit_scale=1 / 0.005, normalize=True, device=device
    )
    got = harness.run(harness.accepted(case, backend), backend)
    assert all(t.isfinite().all() for t in got.values()) and got["loss"] > 0
    harness.check_oracle(case, backend)


@pytest.mark.parametrize("op", testing.LOSSES)
def test_second_derivative_is_an_error(backend, device, op):
    """memeff and Inf-CL: 46 % off, silently."""
    harness.check_double_backward(make_case(op, PAIRS, device=device), backend)


@pytest.mark.parametrize("logit", [95.0, 1000.0])
def test_logits_where_exp_overflows(backend, device, logit):
    """Inf-CL: log(exp(s).sum()) without a maximum is inf from 89 on."""
    case = make_case("contrastive_loss", PAIRS, logit_scale=1.0, device=device)
    case = case.replace(**{k: case.tensors[k] * logit**0.5 for k in "xy"})
    case.tensors["y"][:] = case.tensors["x"]  # s_ii = logit
    got = harness.run(harness.accepted(case, backend), backend)
    assert got["loss"].isfinite() and 0 <= got["loss"] < 1
    harness.check_oracle(case, backend)


def test_scale_gradient_at_its_optimum(backend, device):
    """siglip-kernel: the sum over s of large terms of both signs cancels."""
    case = make_case("sigmoid_loss", PAIRS, logit_scale=20.0, logit_bias=-10.0, fit=0.3,
                     device=device)  # fmt: skip
    scales = torch.linspace(2.0, 60.0, 59).tolist()
    slopes = [testing.truth(case.replace(logit_scale=torch.tensor(s)))["dlogit_scale"].item()
              for s in scales]  # fmt: skip
    at = min(range(59), key=lambda i: abs(slopes[i]))
    assert slopes[0] < 0 < slopes[-1], "an optimum lies between"
    near = case.replace(logit_scale=torch.tensor(scales[at], device=device))
    got = harness.run(harness.accepted(near, backend), backend)["dlogit_scale"]
    assert abs(got.item() - slopes[at]) < 1e-5 * max(map(abs, slopes))
    harness.check_oracle(near, backend)


def test_saved_tensors_of_siglip_stay_linear(backend, device):
    """open_clip's chunk_size: what is saved for the backward still grows as N * N."""
    kept = [
        harness.saved_bytes(make_case("sigmoid_loss", PairShape(n, n, 8), device=device), backend)
        for n in (256, 1024)
    ]
    assert kept[1] <= 4 * kept[0] + 256 < 4 * 1024 * 1024


def test_nt_xent_is_not_cubic():
    """pytorch-metric-learning's NTXentLoss: a tensor of positives x negatives, O(N ** 3)."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    N, D = 512, 16
    x, scale = torch.randn(1, N, D), torch.ones(1)
    mate = ((torch.arange(N) + N // 2) % N)[None]
    with Watch():
        stats = self_similarity.fwd(reference, x, scale, mate, None, False, True)
        coef = torch.cat([stats[:1], torch.ones(4, 1, N)])
        self_similarity.bwd(reference, coef, x, scale, mate, None, False, True, [True, True])
    # The reference stores the largest block, a quarter of s; kernels store no block at all.
    assert N * N // 4 <= largest <= N * N // 2


def test_bias_paths(backend, device):
    """CCE #52: the bias path wrong and untested."""
    for bias in ((2, 2, 131, 101), (1, 2, 1, 101), (2, 1, 131, 1), (1, 1, 1, 1)):
        shape = AttentionShape(2, 2, 131, 101, 16, 12)
        harness.check_oracle(make_case("bi_attention", shape, bias=bias, device=device), backend)
    case = make_case("sigmoid_loss", PAIRS, logit_bias=-7.0, reduction="none", device=device)
    harness.check_oracle(case, backend)


def test_fully_masked_row_is_zero(backend, device):
    """Hugging Face's Grounding DINO: NaN for a caption that is padding only."""
    shape = AttentionShape(2, 2, 131, 20, 16, 12)
    case = make_case("bi_attention", shape, mask="dead", return_lse=True, device=device)
    got = harness.run(harness.accepted(case, backend), backend)
    assert not any(t.isnan().any() for t in got.values())
    assert (got["o_x"][1] == 0).all() and (got["dqk_x"][1] == 0).all()


def test_clamp_knows_no_batch(backend, device):
    """Hugging Face's Grounding DINO subtracts the maximum of the whole batch before it clamps, so
    that an item's result depends on its neighbours once scores pass 50000."""
    shape = AttentionShape(2, 1, 67, 20, 16, 12)
    case = make_case("bi_attention", shape, clamp=50000.0, scale=1.0, device=device)
    loud = case.tensors["qk_x"].clone()
    loud[1] *= 1e5
    case = harness.accepted(case.replace(qk_x=loud), backend)
    s = loud.double() @ case.tensors["qk_y"].double().mT
    assert s[1].abs().max() > 50000
    both = fused(case, backend)
    alone = fused(case.replace(**{k: t[:1] for k, t in case.tensors.items()}), backend)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=0, atol=0)
    harness.check_oracle(case, backend)


def test_padding_keeps_the_fused_path(backend, device):
    """LightGlue: a padded batch silently leaves flash attention. A named backend never falls back,
    and nothing of size M * N is saved."""
    shape = AttentionShape(2, 1, 512, 512, 8, 8)
    plain, padded = (
        harness.saved_bytes(make_case("bi_attention", shape, mask=m, device=device), backend)
        for m in (False, True)
    )
    assert padded <= plain + 2 * 2 * 512 * 2 and padded < 512 * 512 * 4


@pytest.mark.parametrize("op", testing.ATTENTIONS)
def test_cosine_attention_beyond_one_tile(backend, device, op):
    """lucidrains' flash-cosine-sim: wrong from the second tile on, where its tests stop."""
    case = make_case(op, testing.ATTENTION_SHAPES["three_tiles"], scale=10.0, device=device)
    unit = {
        k: torch.nn.functional.normalize(t, dim=-1)
        for k, t in case.tensors.items()
        if not k.startswith("v")
    }
    harness.check_oracle(case.replace(**unit), backend)


def test_ours_is_what_nn_losses_are(backend, device):
    """open_clip's modes part by the world's size; ours is one loss whatever the flags."""
    x, y = (torch.nn.functional.normalize(torch.randn(16, 8), dim=-1).to(device) for _ in range(2))
    want = fusedmm.contrastive_loss(x, y, 10.0, backend=backend)
    for local in (False, True):
        for gather in (False, True):
            loss = fusedmm.nn.ClipLoss(local_loss=local, gather_with_grad=gather)
            loss.backend = backend
            assert torch.equal(loss(x, y, 10.0), want)
