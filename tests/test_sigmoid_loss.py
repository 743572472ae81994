"""sigmoid_loss: pair_loss_suite.py, matches by ids, and what the bias and the scale receive."""

import harness
import pytest
import torch
from pair_loss_suite import PairLossSuite
from torch.nn import functional as F

from fusedmm import testing
from fusedmm.testing import PairShape, fused

NAN = float("nan")
SQUARE = PairShape(131, 131, 24, (2,))


class TestSigmoidLoss(PairLossSuite):
    """See PairLossSuite."""

    op = "sigmoid_loss"
    params = {
        **PairLossSuite.table,
        "features": {
            **PairLossSuite.features,
            "siglip_start": {"logit_scale": 10.0, "logit_bias": -10.0, "shape": SQUARE},
            "positive_bias": {"logit_bias": 5.0, "shape": SQUARE},
            "ids_rectangular_mean": {
                "ids": 9, "shape": PairShape(149, 67, 24, (2,)), "reduction": "mean",
            },
        },
    }  # fmt: skip

    def test_is_siglip(self, backend, device):
        """The paper's pseudocode."""
        case = self.case(
            testing.PAIR_SHAPES["three_tiles"], logit_bias=-10.0, reduction="mean", device=device
        )
        x, y = (case.tensors[k].double() for k in "xy")
        logits = 10.0 * x @ y.T - 10.0
        labels = 2 * torch.eye(301, dtype=torch.float64, device=device) - 1
        want = -F.logsigmoid(labels * logits).sum() / 301
        (got,) = fused(harness.accepted(case, backend), backend)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)

    def test_distinct_ids_change_nothing(self, backend, device):
        case = self.case(SQUARE, device=device)
        ids = torch.randperm(131).expand(2, 131).to(device) * 2**40  # beyond 32 bits
        want = harness.run(harness.accepted(case, backend), backend)
        got = harness.run(case.replace(ids_x=ids, ids_y=ids), backend)
        for name, t in got.items():
            torch.testing.assert_close(t, want[name], rtol=1e-6, atol=1e-6)

    def test_ids_replace_the_diagonal(self, backend, device):
        """Row i and column i are no match where their ids differ."""
        case = self.case(PairShape(7, 7, 8), device=device)
        ids = torch.arange(7, device=device)
        apart = case.replace(ids_x=ids, ids_y=ids + 100)
        s = 10.0 * case.tensors["x"].double() @ case.tensors["y"].double().T - 2.0
        (got,) = fused(harness.accepted(apart, backend), backend)
        torch.testing.assert_close(got.double(), F.softplus(s).sum(-1), rtol=1e-5, atol=1e-6)

    def test_bias_as_a_number(self, backend, device):
        case = harness.accepted(self.case(device=device), backend)
        want = fused(case, backend)[0]
        one = case.tensors["logit_bias"]
        for bias in (-2.0, -2, one, one.reshape(1), one.reshape(1, 1), one.double()):
            got = fused(case.replace(logit_bias=bias), backend)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        leaf = torch.full((1, 1), -2.0, dtype=torch.bfloat16, device=device, requires_grad=True)
        fused(case.replace(logit_bias=leaf), backend)[0].sum().backward()
        assert leaf.grad.shape == (1, 1) and leaf.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
    def test_bad_row_stays_in_its_row(self, backend, device, dtype, bad):
        clean = self.case(SQUARE, dtype, device=device)
        dirty = clean.tensors["x"].clone()
        dirty[0, 7, 2] = bad
        want = fused(harness.accepted(clean, backend), backend)[0]
        got = fused(clean.replace(x=dirty), backend)[0]
        keep = torch.ones_like(got, dtype=torch.bool)
        keep[0, 7] = False
        torch.testing.assert_close(got[keep], want[keep], atol=0, rtol=0)
        assert not got[0, 7].isfinite()

    def test_well_fitted_pairs(self, backend, device):
        """All of the loss in tails: softplus of large negative numbers keeps its digits."""
        x = torch.eye(261, 300, device=device)
        case = self.case(PairShape(261, 261, 300), device=device, logit_scale=45.0)
        bias = torch.tensor(-22.0, device=device)
        fitted = harness.accepted(case.replace(x=x, y=x.clone(), logit_bias=bias), backend)
        want = testing.truth(fitted)
        assert 1e-9 < want["loss"].mean() < 1e-6
        got = harness.run(fitted, backend)
        torch.testing.assert_close(got["loss"].double(), want["loss"], rtol=5e-5, atol=0)
        harness.check_oracle(fitted, backend)

    def test_far_from_fitted(self, backend, device):
        """softplus is linear far out: no overflow, gradient exactly the score's."""
        case = self.case(SQUARE, device=device, logit_scale=1e4, logit_bias=500.0)
        got = harness.run(harness.accepted(case, backend), backend)
        assert all(t.isfinite().all() for t in got.values())
        harness.check_oracle(case, backend)
