"""bi_attention: attention_suite.py, the clamp, and one score matrix under two softmaxes."""

import harness
import pytest
import torch
from attention_suite import AttentionSuite

from fusedmm import testing
from fusedmm.testing import AttentionShape, fused, make_case

RAGGED = AttentionShape(2, 3, 131, 101, 24, 40)


class TestBiAttention(AttentionSuite):
    """See AttentionSuite."""

    op = "bi_attention"
    params = {
        **AttentionSuite.table,
        "features": {
            **AttentionSuite.features,
            "clamp": {"clamp": 0.7},
            "clamp_wide": {"clamp": 50000.0},
            "clamp_then_bias": {"clamp": 0.5, "bias": (2, 3, 131, 101), "shape": RAGGED},
            "clamp_scale_dead": {"clamp": 1.5, "gain": 5.0, "scale": 0.3, "mask": "dead"},
        },
        "unused": {"o_x": 0, "o_y": 1, "lse_x": 2, "lse_y": 3},
    }

    def test_values_of_different_widths(self, backend, device):
        case = self.case(AttentionShape(2, 2, 131, 101, 24, 40), device=device)
        other = self.case(AttentionShape(2, 2, 131, 101, 24, 9), device=device, seed=1)
        mixed = case.replace(v_x=other.tensors["v_x"])
        harness.check_oracle(mixed, backend)
        o_x, o_y, _, _ = fused(mixed, backend)
        assert (o_x.shape[-1], o_y.shape[-1]) == (40, 9)

    def test_both_softmaxes_share_the_scores(self, backend, device):
        """exp(s - lse_x) sums to one over y and exp(s - lse_y) over x, for one and the same s."""
        case = self.case(testing.ATTENTION_SHAPES["three_tiles"], device=device, mask=False)
        _, _, lse_x, lse_y = fused(harness.accepted(case, backend), backend)
        s = case.tensors["qk_x"].double() @ case.tensors["qk_y"].double().mT / 8
        torch.testing.assert_close(lse_x.double(), s.logsumexp(-1), atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(lse_y.double(), s.logsumexp(-2), atol=1e-5, rtol=1e-6)

    @pytest.mark.parametrize("spread", ["rows", "columns", "both"])
    @pytest.mark.parametrize("size", [20.0, 200.0, 3000.0])
    def test_far_apart_rows_and_columns(self, backend, device, spread, size):
        """Rows and columns whose maxima differ by far more than exp can hold in one factor: a
        shared exponential must not underflow in either direction."""
        shape = AttentionShape(1, 2, 261, 133, 8, 16)
        case = make_case(self.op, shape, device=device, return_lse=True)
        x, y = case.tensors["qk_x"].clone(), case.tensors["qk_y"].clone()
        g = torch.Generator().manual_seed(4)
        # An offset per row: one dimension of x against a constant in y; the columns likewise.
        x[..., 0] = torch.randn(261, generator=g).to(device) * size if spread != "columns" else 0.0
        y[..., 0] = 1.0
        y[..., 1] = torch.randn(133, generator=g).to(device) * size if spread != "rows" else 0.0
        x[..., 1] = 1.0
        far = case.replace(qk_x=x, qk_y=y, scale=1.0)
        harness.check_oracle(far, backend)
        assert all(t.isfinite().all() for t in harness.run(far, backend).values())

    def test_clamp_limits_the_scores_before_the_bias(self, backend, device):
        shape = AttentionShape(1, 1, 131, 101, 16, 8)
        case = self.case(shape, gain=400.0, mask=False, device=device)
        bias = torch.full((1, 1, 1, 1), 7.0, device=device)
        clamped = harness.accepted(case.replace(clamp=2.0), backend)
        _, _, lse_x, _ = fused(clamped, backend)
        limit = 2.0 + torch.tensor(101.0).log().item()
        assert lse_x.max() <= limit + 1e-4 and lse_x.min() >= limit - 4.0 - 1e-4
        shifted = case.replace(clamp=2.0)
        shifted.tensors["bias"] = bias
        torch.testing.assert_close(fused(shifted, backend)[2], lse_x + 7.0, atol=1e-4, rtol=1e-5)

    def test_clamp_has_no_gradient_outside(self, backend, device):
        case = self.case(AttentionShape(1, 1, 131, 101, 16, 8), mask=False, device=device)
        ones = torch.ones_like
        x, y = ones(case.tensors["qk_x"]), ones(case.tensors["qk_y"])
        y[:, :, 50:] *= -1.0
        outside = case.replace(qk_x=x, qk_y=y, clamp=3.9, scale=1.0)  # |s| = 16 everywhere
        got = harness.run(harness.accepted(outside, backend), backend)
        assert (got["dqk_x"] == 0).all() and (got["dqk_y"] == 0).all()
        assert (got["dv_x"] != 0).any()

    def test_results_do_not_depend_on_the_batch(self, backend, device):
        """Scores beyond 50000 in one item change nothing in another, with clamp as well."""
        case = self.case(AttentionShape(2, 2, 37, 29, 16, 12), device=device, clamp=50000.0)
        x = case.tensors["qk_x"].clone()
        x[1] *= 1e6
        big = harness.accepted(case.replace(qk_x=x), backend)
        for g, w in zip(fused(big, backend), fused(case, backend), strict=True):
            torch.testing.assert_close(g[0], w[0], atol=0, rtol=0)
            assert g.isfinite().all()

    def test_self_attention_symmetry(self, backend, device):
        """The same stream on both sides: both outputs agree up to the order of summation."""
        shape = AttentionShape(2, 2, 259, 259, 32, 32)
        case = make_case(self.op, shape, return_lse=True, device=device)
        t = case.tensors
        same = harness.accepted(case.replace(qk_y=t["qk_x"], v_y=t["v_x"]), backend)
        o_x, o_y, lse_x, lse_y = fused(same, backend)
        torch.testing.assert_close(o_x, o_y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse_x, lse_y, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert fused(same, backend)[0].dtype == torch.float32
