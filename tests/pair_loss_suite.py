"""The tests that both losses must pass, as a class that their test files subclass."""

import math
from typing import Any, ClassVar

import harness
import pytest
import torch
from op_suite import DTYPES, OpSuite
from torch import Tensor

import fusedmm
from fusedmm import testing
from fusedmm.ops import pairs
from fusedmm.testing import PairShape, fused, make_case

NAN = float("nan")


class PairLossSuite(OpSuite):
    """What the two losses share."""

    small = PairShape(37, 37, 19, (2,))
    tiny = PairShape(4, 4, 3, (2,))
    defaults: ClassVar[dict[str, Any]] = {"reduction": "none"}
    table: ClassVar[dict[str, dict[str, Any]]] = {
        "shape": testing.PAIR_SHAPES,
        "dtype": DTYPES,
        "big": {"three_tiles": PairShape(301, 301, 64, (2,))},
        "sizes": {
            "growing": tuple(PairShape(m, m, d, (g,)) for m, d, g in ((37, 19, 2), (301, 23, 3)))
        },
        "doubling": {"long": (PairShape(200, 200, 16), PairShape(400, 400, 16))},
    }
    ragged = PairShape(131, 131, 24, (2,))
    features: ClassVar[dict[str, dict[str, Any]]] = {
        "mean": {"reduction": "mean", "shape": ragged},
        "sum": {"reduction": "sum", "shape": ragged},
        "normalize": {"normalize": True},
        "normalize_mean": {"normalize": True, "reduction": "mean", "shape": ragged},
        "row_scale": {"logit_scale": "rows", "shape": ragged},
        "scale_200": {"logit_scale": 200.0, "shape": ragged},
        "ids": {"ids": 50, "shape": ragged},
        "ids_few": {"ids": 3},
        "ids_mean": {"ids": 50, "shape": ragged, "reduction": "mean", "normalize": True},
        "ids_rectangular": {"ids": 9, "shape": PairShape(67, 131, 24, (2,))},
    }

    def keep(self, tiles, dtype, monkeypatch) -> int:
        """From now on `tiles` tiles of products are kept from any forward; the floats of one."""
        size = pairs.dots_tile(dtype)
        monkeypatch.setattr(pairs, "KEEP_WIDTH", 1)
        monkeypatch.setattr(pairs, "KEEP_ROWS", 1)
        monkeypatch.setattr(pairs, "KEEP_BYTES", tiles * 4 * size)
        return size

    @pytest.mark.parametrize("tiles", [4, 7, 1000], ids="{}_tiles".format)
    @pytest.mark.parametrize("option", ["plain", "ids", "normalize", "rows"])
    def test_kept_products(self, dtype, tiles, option, monkeypatch):
        """What the cpu forward leaves for the backward is what that would compute; of bf16 inputs
        as near as the gradients are to be to fp64."""
        features = {"plain": {}, "rows": {"logit_scale": "rows"}, "ids": {"ids": 9}}
        case = make_case(
            self.op, self.ragged, dtype, **features.get(option, {option: True}), reduction="none"
        )
        want = harness.run(case, "cpu")
        size = self.keep(tiles, dtype, monkeypatch)
        with harness.recorded(self.op) as calls:
            got = harness.run(case, "cpu")
        dots = [t for t in calls["_bwd"] if isinstance(t, Tensor) and t.dim() == 1 and len(t) > 999]
        assert dots[0].numel() == min(tiles // 4 * 4, 8) * size, (
            "as many of each of 4 rows of tiles"
        )
        if dtype == torch.bfloat16:
            harness.check_oracle(case, "cpu")
        else:
            harness.assert_same(got, want)
        with harness.recorded(self.op) as calls, torch.no_grad():
            fused(case, "cpu")
        assert calls["_fwd"][-2] == 0, "keeps products though nothing requires a gradient"

    def test_products_too_large_for_16_bits(self, monkeypatch):
        """Tiles of scores up to thousands are computed again: no bit changes."""
        case = make_case(self.op, self.ragged, torch.bfloat16, reduction="none")
        case = case.replace(logit_scale=torch.tensor(1e4))
        want = harness.run(case, "cpu")
        self.keep(1000, torch.bfloat16, monkeypatch)
        harness.assert_same(harness.run(case, "cpu"), want)

    @pytest.mark.parametrize("odd", [math.nan, math.inf])
    def test_kept_products_that_are_not_finite(self, odd, monkeypatch):
        case = make_case(self.op, self.ragged, torch.bfloat16, reduction="none")
        case.tensors["x"][0, 5] = odd
        want = harness.run(case, "cpu")
        self.keep(1000, torch.bfloat16, monkeypatch)
        got = harness.run(case, "cpu")
        for name, t in want.items():
            assert torch.equal(got[name].isfinite(), t.isfinite()), name

    def test_exports_with_any_number_of_rows(self):
        """Also above and below sizes from which products are kept."""
        case = self.case(PairShape(6, 6, 8), reduction="mean")
        rest = [t for name, t in case.tensors.items() if name not in "xy"]

        class Loss(torch.nn.Module):
            def forward(_, x, y):
                return getattr(fusedmm, self.op)(x, y, *rest)

        rows = {0: torch.export.Dim("M")}
        x, y = case.tensors["x"], case.tensors["y"]
        program = torch.export.export(Loss(), (x, y), dynamic_shapes=({**rows}, {**rows}))
        x, y = torch.randn(1100, 8), torch.randn(1100, 8)
        assert torch.equal(program.module()(x, y), Loss()(x, y))

    def test_losses_are_fp32(self, backend, device, dtype):
        for reduction in ("none", "mean", "sum"):
            case = self.case(dtype=dtype, device=device, reduction=reduction)
            got = harness.run(harness.accepted(case, backend), backend)
            for name, t in got.items():
                data = name in ("dx", "dy")
                assert t.dtype == (dtype if data else torch.float32), name

    def test_fp32_accumulation_of_16_bit_inputs(self, backend, device):
        """Losses of 16-bit inputs are as exact as those of the same numbers in fp32."""
        for dtype in (torch.float16, torch.bfloat16):
            shape = testing.PAIR_SHAPES["three_tiles"]
            case = self.case(shape, dtype, logit_scale=30.0, device=device)
            got = fused(harness.accepted(case, backend), backend)
            want = testing.eager(case.at(torch.float64))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g.double(), w, atol=4e-5, rtol=4e-6)

    def test_reductions_agree(self, backend, device):
        case = harness.accepted(self.case(device=device), backend)
        rows = fused(case, backend)
        total = fused(case.replace(reduction="sum"), backend)[0]
        mean = fused(case.replace(reduction="mean"), backend)[0]
        both = sum(r.double().sum() for r in rows) / len(rows)
        torch.testing.assert_close(total.double(), both, rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), both / rows[0].numel(), rtol=1e-5, atol=0)
        assert total.shape == mean.shape == ()

    def test_leading_dimensions_are_independent_problems(self, backend, device):
        case = self.case(PairShape(37, 37, 19, (2, 3)), logit_scale="rows", device=device)
        got = harness.run(harness.accepted(case, backend), backend)
        for i in range(2):
            for j in range(3):
                one = case.replace(**{k: t[i, j] for k, t in case.tensors.items() if t.dim() > 1})
                want = fused(one, backend)
                for g, w in zip(
                    [t for k, t in got.items() if k.startswith("loss")], want, strict=True
                ):
                    torch.testing.assert_close(g[i, j], w, rtol=1e-6, atol=1e-6)

    def test_number_and_tensor_scale_agree(self, backend, device):
        case = harness.accepted(self.case(device=device), backend)
        want = fused(case, backend)
        shapes = [case.tensors["logit_scale"].reshape(s) for s in ((), (1,), (1, 1))]
        for scale in (10.0, 10, *shapes):
            for g, w in zip(fused(case.replace(logit_scale=scale), backend), want, strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=0)
        leaf = torch.full((1,), 10.0, dtype=torch.bfloat16, device=device, requires_grad=True)
        fused(case.replace(logit_scale=leaf), backend)[0].sum().backward()
        assert leaf.grad.shape == (1,) and leaf.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(0, 0, ()), (0, 0, (2,)), (5, 5, (0,))], ids=str)
    def test_empty(self, backend, device, dtype, shape):
        M, N, lead = shape
        for reduction in ("none", "sum", "mean"):
            case = self.case(PairShape(M, N, 8, lead), dtype, device=device, reduction=reduction)
            got = harness.run(harness.accepted(case, backend), backend)
            for name, t in got.items():
                assert (t == 0).all(), name
            assert got["dx"].shape == (*lead, M, 8)

    @pytest.mark.parametrize("scale", [200.0, 1e4], ids=str)
    def test_large_logits(self, backend, device, scale):
        for fit in (None, 0.1):
            case = self.case(PairShape(261, 261, 32), logit_scale=scale, fit=fit, device=device)
            harness.check_oracle(case, backend)
            got = harness.run(case, backend)
            assert all(t.isfinite().all() for t in got.values())

    @pytest.mark.parametrize("seed", [0, 2, 3])
    def test_wide_rows_are_as_exact(self, backend, device, seed):
        """fp32 sums of 1024 products: BLAS adds 128 at a time, for roundings add up."""
        case = self.case(PairShape(100, 100, 1024), logit_scale=1e4, device=device, seed=seed)
        testing.assert_no_worse_than_eager(harness.accepted(case, backend), backend)

    @pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
    def test_bad_problem_stays_in_its_problem(self, backend, device, dtype, bad):
        clean = self.case(PairShape(131, 131, 24, (3,)), dtype, logit_scale="rows", device=device)
        dirty = clean.tensors["x"].clone()
        dirty[1, 7, 2] = bad
        want = harness.run(harness.accepted(clean, backend), backend)
        got = harness.run(clean.replace(x=dirty), backend)
        for name, t in got.items():
            if t.dim():
                torch.testing.assert_close(t[[0, 2]], want[name][[0, 2]], atol=0, rtol=0)
        assert not got["dy"][1].isfinite().all()

    def test_zero_row_under_normalize(self, backend, device):
        """A row of zeros has no direction: finite loss, finite gradients, as F.normalize gives."""
        case = self.case(PairShape(37, 37, 19), normalize=True, device=device)
        x = case.tensors["x"].clone()
        x[3] = 0.0
        zero = case.replace(x=x)
        got = harness.run(harness.accepted(zero, backend), backend)
        assert all(t.isfinite().all() for t in got.values())
        want = testing.truth(zero)
        for name in got:
            if name != "dx":
                assert testing.max_error(got[name], want[name]) < 1e-3, name

    def test_scale_gradient_does_not_cancel(self, backend, device):
        """The scale's gradient near its optimum, where large terms of both signs meet."""
        case = self.case(PairShape(301, 301, 64), logit_scale=60.0, fit=0.3, device=device)
        harness.check_oracle(case.replace(reduction="mean"), backend)
