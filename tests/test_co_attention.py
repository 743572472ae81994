"""co_attention: attention_suite.py, and what only two independent score matrices can show."""

import harness
import pytest
import torch
from attention_suite import AttentionSuite

from fusedmm import testing
from fusedmm.testing import AttentionShape, fused


class TestCoAttention(AttentionSuite):
    """See AttentionSuite."""

    op = "co_attention"
    params = {
        **AttentionSuite.table,
        "features": AttentionSuite.features,
        "unused": {"o_x": 0, "o_y": 1, "lse_x": 2, "lse_y": 3},
    }

    @pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
    def test_streams_of_different_widths(self, backend, device, dtype):
        """q_x meets k_y and q_y meets k_x: the two pairs, and v_x and v_y, may differ in width."""
        a = self.case(AttentionShape(2, 2, 131, 101, 24, 40), dtype, device=device)
        b = self.case(AttentionShape(2, 2, 131, 101, 33, 9), dtype, device=device, seed=1)
        mixed = a.replace(**{k: b.tensors[k] for k in ("q_y", "k_x", "v_x")})
        harness.check_oracle(mixed, backend)
        o_x, o_y, _, _ = fused(mixed, backend)
        assert (o_x.shape[-1], o_y.shape[-1]) == (40, 9)

    def test_bias_of_one_direction_only(self, backend, device):
        case = self.case(AttentionShape(2, 2, 131, 101, 24, 40), device=device)
        for name, shape in (("bias_xy", (2, 2, 131, 101)), ("bias_yx", (1, 2, 101, 131))):
            case.tensors[name] = torch.randn(shape, device=device)
            harness.check_oracle(case, backend)
            del case.tensors[name]

    def test_directions_are_swaps(self, backend, device):
        """Exchanging the streams exchanges the outputs, bit for bit."""
        shape = AttentionShape(2, 2, 131, 101, 24, 24)
        case = harness.accepted(self.case(shape, device=device), backend)
        o_x, o_y, lse_x, lse_y = fused(case, backend)
        t, o = case.tensors, case.options
        swapped = case.replace(
            q_x=t["q_y"], k_x=t["k_y"], v_x=t["v_y"], q_y=t["q_x"], k_y=t["k_x"], v_y=t["v_x"],
            mask_x=o["mask_y"], mask_y=o["mask_x"],
        )  # fmt: skip
        got = fused(swapped, backend)
        for g, w in zip(got, (o_y, o_x, lse_y, lse_x), strict=True):
            torch.testing.assert_close(g, w, atol=0, rtol=0)

    def test_outputs_depend_on_their_own_scores_only(self, backend, device):
        """o_x needs no gradient through k_x, q_y and v_x."""
        case = harness.accepted(self.case(device=device), backend).leaves()
        o_x = fused(case, backend)[0]
        t = case.tensors
        grads = torch.autograd.grad(o_x.sum(), [t["k_x"], t["q_y"], t["v_x"]], allow_unused=True)
        assert all(g is None or (g == 0).all() for g in grads)
