"""The tests that both attentions must pass, as a class that their test files subclass."""

import dataclasses
from typing import Any, ClassVar

import harness
import pytest
import torch
from op_suite import DTYPES, OpSuite
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedmm import testing
from fusedmm.testing import AttentionShape, Case, fused, make_case

NEG_INF = float("-inf")
NAN = float("nan")


class AttentionSuite(OpSuite):
    """What the two attentions share."""

    small = AttentionShape(2, 2, 37, 29, 16, 12)
    tiny = AttentionShape(2, 1, 5, 4, 3, 2)
    defaults: ClassVar[dict[str, Any]] = {"return_lse": True, "mask": True}
    table: ClassVar[dict[str, dict[str, Any]]] = {
        "shape": testing.ATTENTION_SHAPES,
        "dtype": DTYPES,
        "big": {"three_tiles": testing.ATTENTION_SHAPES["three_tiles"]},
        # All sizes differ, so that none is taken for another's equal.
        "sizes": {
            "growing": (
                AttentionShape(2, 3, 37, 29, 16, 12),
                AttentionShape(2, 3, 45, 31, 16, 12),
                AttentionShape(4, 5, 50, 90, 16, 13),
            )
        },
        "doubling": {
            "long": (AttentionShape(1, 2, 150, 200, 16, 16), AttentionShape(1, 2, 300, 400, 16, 16))
        },
    }
    ragged = AttentionShape(2, 3, 131, 101, 24, 40)
    features: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {"mask": False, "return_lse": False},
        "lse": {"mask": False},
        "dead": {"mask": "dead"},
        "scale": {"scale": 0.37},
        "negative_scale": {"scale": -0.2},
        "no_scale": {"scale": 0.0},
        "spread": {"gain": 20.0},
        "bias": {"shape": ragged, "bias": (2, 3, 131, 101)},
        "bias_heads": {"shape": ragged, "bias": (1, 3, 131, 101), "mask": "dead"},
        "bias_keys": {"shape": ragged, "bias": (2, 1, 1, 101), "mask": False},
        "bias_queries": {"shape": ragged, "bias": (1, 1, 131, 1)},
        "bias_one": {"shape": ragged, "bias": (1, 1, 1, 1)},
    }

    def test_gradcheck_of_bias(self):
        for bias in ((2, 1, 5, 4), (1, 1, 5, 1), (2, 1, 1, 4)):
            harness.check_gradcheck(self.case(self.tiny, torch.float64, bias=bias))

    def test_opcheck_with_everything(self, backend, device):
        case = self.case(bias=(1, 2, 37, 1), mask="dead", dropout_p=0.1, device=device)
        harness.check_opcheck(case, backend)

    @pytest.mark.parametrize("dead", ["x", "y", "both"])
    def test_batch_item_without_keys(self, backend, device, dtype, dead):
        case = self.case(testing.ATTENTION_SHAPES["ragged_all"], dtype, device=device)
        for side in "xy" if dead == "both" else dead:
            case.options[f"mask_{side}"][1] = False
        got = harness.run(harness.accepted(case, backend), backend)
        for name, t in got.items():
            keeps_inf = name.startswith("lse")
            assert (t.isfinite() | (t == NEG_INF) if keeps_inf else t.isfinite()).all(), name
        for out, side in (("x", "y"), ("y", "x")):  # x looks at y
            if dead in (side, "both"):
                assert (got[f"o_{out}"][1] == 0).all()
                assert (got[f"lse_{out}"][1] == NEG_INF).all()
                assert (got[f"dv_{side}"][1] == 0).all()
                assert (got[f"o_{out}"][0] != 0).any()
        if dead == "both":
            assert all((t[1] == 0).all() for name, t in got.items() if name[0] == "d")

    @pytest.mark.parametrize(
        "sizes",
        [(2, 2, 0, 7), (2, 2, 7, 0), (0, 2, 5, 7), (2, 0, 5, 7), (1, 1, 0, 0)],
        ids=["M=0", "N=0", "B=0", "H=0", "M=N=0"],
    )
    @pytest.mark.parametrize("empty", [{"mask": True}, {}], ids=["masked", "unmasked"])
    def test_empty(self, backend, device, dtype, sizes, empty):
        shape = AttentionShape(*sizes, 8, 6)
        case = make_case(self.op, shape, dtype, device=device, return_lse=True, **empty)
        got = harness.run(harness.accepted(case, backend), backend)
        B, H, M, N = sizes
        assert got["o_x"].shape == (B, H, M, 6) and got["o_y"].shape == (B, H, N, 6)
        assert got["lse_x"].shape == (B, H, M) and got["lse_y"].shape == (B, H, N)
        for name, t in got.items():
            want = NEG_INF if name.startswith("lse") and 0 in sizes else 0.0
            assert (t == want).all(), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("scale", [None, 1.0], ids=["default_scale", "scale_1"])
    def test_logits_of_1e4(self, backend, device, dtype, scale):
        gain = 2500.0 if scale is None else 625.0
        shape = AttentionShape(2, 2, 133, 261, 16, 24)
        case = self.case(shape, dtype, device=device, gain=gain, scale=scale, mask="dead")
        args = list(case.tensors.values())
        k = args[1] if self.op == "bi_attention" else args[4]
        s = (args[0].double() @ k.double().mT) * (scale or 0.25)
        assert 8e3 < s.abs().max() < 2e4
        harness.check_oracle(case, backend)

    @pytest.mark.parametrize("sizes", [(1, 133), (133, 1), (1, 1)], ids=str)
    def test_one_key_takes_no_gradient(self, backend, device, dtype, sizes):
        """A softmax over one key is 1 whatever its score: not even rounding reaches the query."""
        harness.skip_inexact_deltas(backend, dtype)
        shape = AttentionShape(2, 2, *sizes, 96, 160)
        case = self.case(shape, dtype, device=device, gain=30.0, return_lse=False, mask=False)
        case = case.leaves()
        leaves = list(case.tensors.values())
        for out, keys in zip(fused(case, backend), reversed(sizes), strict=True):
            if keys > 1:
                continue
            up = torch.randn_like(out)
            grads = torch.autograd.grad(out, leaves, up, retain_graph=True, allow_unused=True)
            for name, grad in zip(case.tensors, grads, strict=True):
                assert name.startswith("v") or grad is None or not grad.any(), name

    @pytest.mark.parametrize("sizes", [(3, 261), (133, 261)], ids=str)
    def test_one_key_of_many_takes_no_gradient(self, backend, device, dtype, sizes):
        """Where all others underflow, dp and its correction are the same product of do and v."""
        if backend == "reference":
            pytest.skip("its products are torch's, summed in an order of their own")
        harness.skip_inexact_deltas(backend, dtype)
        shape = AttentionShape(2, 2, *sizes, 96, 100)
        case = self.case(shape, dtype, device=device, return_lse=False, mask=False)
        queries, keys = list(case.tensors)[0], list(case.tensors)[1 if "bi" in self.op else 4]
        tensors = {k: t.clone() for k, t in case.tensors.items()}
        tensors[queries].fill_(4.0)
        tensors[keys][..., 130, :] = 40.0
        case = case.replace(**tensors).leaves()
        out = fused(case, backend)[0]
        leaves = list(case.tensors.values())
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
        for name, grad in zip(case.tensors, grads, strict=True):
            assert name.startswith("v") or grad is None or not grad.any(), name

    def test_one_key_hides_the_rest(self, backend, device):
        """A maximum in the first, a middle or the last tile; the others underflow."""
        shape = AttentionShape(1, 1, 259, 259, 32, 32)
        case = self.case(shape, device=device, mask=False)
        for key in (0, 130, 258):
            tensors = {k: t.clone() for k, t in case.tensors.items()}
            for name, t in tensors.items():
                if name[0] != "v":
                    t[..., key, :] = 60.0
            got = harness.run(harness.accepted(case.replace(**tensors), backend), backend)
            assert all(t.isfinite().all() for t in got.values())
            harness.check_oracle(case.replace(**tensors), backend)

    @pytest.mark.parametrize("seed", [0, 2, 3])
    def test_wide_rows_are_as_exact(self, backend, device, seed):
        """fp32 sums of 256 products: BLAS adds 128 at a time, for roundings add up."""
        shape = AttentionShape(1, 1, 100, 100, 256, 16)
        case = self.case(shape, mask=False, device=device, seed=seed, gain=30.0, return_lse=True)
        testing.assert_no_worse_than_eager(harness.accepted(case, backend), backend)

    def test_minus_inf_bias_is_a_mask(self, backend, device, dtype):
        """Entries of -inf leave the softmax, a row of them is a row without keys."""
        shape = AttentionShape(1, 2, 131, 101, 16, 12)
        g = torch.Generator().manual_seed(3)
        bias = torch.where(torch.rand(1, 2, 131, 101, generator=g) < 0.5, NEG_INF, 0.0)
        bias[:, :, 5], bias[:, :, :, 7] = NEG_INF, NEG_INF
        case = self.case(shape, dtype, mask=False, device=device)
        bias = bias.to(device=device, dtype=dtype)
        names = {"bias": bias} if self.op == "bi_attention" else {"bias_xy": bias}
        if self.op == "co_attention":
            names["bias_yx"] = bias.mT
        masked = case.replace(**names)
        harness.accepted(masked, backend)
        got = harness.run(masked, backend)
        assert (got["o_x"][:, :, 5] == 0).all() and (got["lse_x"][:, :, 5] == NEG_INF).all()
        assert (got["o_y"][:, :, 7] == 0).all() and (got["lse_y"][:, :, 7] == NEG_INF).all()
        assert all(t.isfinite().all() for name, t in got.items() if not name.startswith("lse"))
        # The same as the huge negative numbers that other libraries take for a mask.
        low = {k: t.clamp_min(torch.finfo(dtype).min / 2) for k, t in names.items()}
        want = harness.run(case.replace(**low), "reference")
        rows = torch.ones(131, dtype=torch.bool)
        rows[5] = False
        scale = 8 * testing.TOLERANCE[dtype]
        torch.testing.assert_close(
            got["o_x"][:, :, rows], want["o_x"][:, :, rows], atol=scale, rtol=scale
        )

    @pytest.mark.parametrize("low", [-1e9, -9e15, None], ids=["1e9", "9e15", "finfo_min"])
    def test_finite_bias_that_masks(self, backend, device, dtype, low):
        """As models spell masks. All keys of a row and of a column have it: eager's softmax of
        equal scores is uniform, and so are its gradients."""
        low = torch.finfo(dtype).min if low is None else max(low, torch.finfo(dtype).min)
        for sizes in ((131, 40), (140, 150)):  # one stream short, both long
            shape = AttentionShape(1, 2, *sizes, 16, 12)
            bias = torch.zeros(1, 1, *sizes, dtype=dtype)
            bias[..., 5, :], bias[..., 7], bias[..., 60:, 20:] = low, low, low
            case = self.case(shape, dtype, mask=False, device=device, return_lse=False)
            names = {"bias": bias} if self.op == "bi_attention" else {"bias_xy": bias}
            if self.op == "co_attention":
                names["bias_yx"] = bias.mT
            names = {name: b.to(device) for name, b in names.items()}
            biased = dataclasses.replace(case, tensors={**case.tensors, **names})
            testing.assert_no_worse_than_eager(harness.accepted(biased, backend), backend)

    @pytest.mark.parametrize("size", [-1e4, 6e4, -1e6, -1e9, -9e15], ids="{:.0e}".format)
    def test_equal_scores_of_any_size(self, backend, device, size):
        """All scores are the bias: p is uniform, and nothing of it is lost in the size of lse."""
        for sizes in ((131, 40), (140, 150)):  # one stream short, both long
            shape = AttentionShape(1, 2, *sizes, 16, 12)
            case = self.case(
                shape, mask=False, device=device, return_lse=False, bias=(1, 1, *sizes)
            )
            for name, t in case.tensors.items():
                if name.startswith("bias"):
                    t.fill_(size)
                elif name[0] != "v":
                    t.zero_()
            testing.assert_no_worse_than_eager(harness.accepted(case, backend), backend)

    def test_bias_of_another_dtype(self, backend, device):
        """A bias may be finer than the data; outputs keep the dtype of the data, lse is fp32."""
        case = self.case(dtype=torch.bfloat16, device=device, mask=False)
        bias = torch.randn(2, 2, 37, 29, device=device)
        for dtype in (torch.float32, torch.float64, torch.float16):
            b = bias.to(dtype)
            names = {"bias": b} if self.op == "bi_attention" else {"bias_xy": b}
            biased = harness.accepted(case.replace(**names), backend)
            o_x, o_y, lse_x, lse_y = fused(biased, backend)
            assert o_x.dtype == o_y.dtype == torch.bfloat16
            assert lse_x.dtype == lse_y.dtype == torch.float32
            want = testing.eager(biased.at(torch.float64))
            torch.testing.assert_close(lse_x.double(), want[2], atol=2e-3, rtol=1e-3)
            leaf = b.clone().requires_grad_()
            key = next(iter(names))
            sum(o.sum() for o in fused(case.replace(**{key: leaf}), backend)[:2]).backward()
            assert leaf.grad.dtype == dtype

    @pytest.mark.parametrize("bad", [NAN, float("inf"), NEG_INF], ids=["nan", "inf", "-inf"])
    def test_bad_query_row_stays_in_its_row(self, backend, device, dtype, bad):
        shape = AttentionShape(2, 2, 131, 101, 16, 12)
        clean = self.case(shape, dtype, device=device)
        clean.options["mask_x"][:, 3] = False  # token 3 of x is no key for y
        name = "qk_x" if self.op == "bi_attention" else "q_x"
        dirty = clean.tensors[name].clone()
        dirty[0, 1, 3, 5] = bad
        want = fused(harness.accepted(clean, backend), backend)
        got = fused(clean.replace(**{name: dirty}), backend)
        hit = torch.zeros(2, 2, 131, dtype=torch.bool)
        hit[0, 1, 3] = True
        for g, w, rows in zip(got, want, (hit, None, hit, None), strict=True):
            keep = ~rows if rows is not None else torch.ones(g.shape[:3], dtype=torch.bool)
            torch.testing.assert_close(g[keep], w[keep], atol=0, rtol=0)
        assert not got[0][hit].isfinite().all()

    def test_bad_batch_item_stays_in_its_item(self, backend, device, dtype):
        shape = AttentionShape(3, 2, 131, 101, 16, 12)
        clean = self.case(shape, dtype, device=device)
        dirty = clean.replace(**{k: t.clone() for k, t in clean.tensors.items()})
        for t in dirty.tensors.values():
            t[1] = NAN
        want = harness.run(harness.accepted(clean, backend), backend)
        got = harness.run(dirty, backend)
        for name, t in got.items():
            torch.testing.assert_close(t[[0, 2]], want[name][[0, 2]], atol=0, rtol=0)
            assert not t[1].isfinite().all(), name

    @pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
    def test_masked_tokens_are_never_read(self, backend, device, dtype, bad):
        """A padded token's key and value may hold anything: no output or gradient sees them."""
        shape = AttentionShape(2, 2, 131, 101, 16, 12)
        clean = self.case(shape, dtype, device=device, mask=True)
        dirty = {k: t.clone() for k, t in clean.tensors.items()}
        keys = ("v_x", "v_y") if self.op == "bi_attention" else ("k_x", "v_x", "k_y", "v_y")
        for name in keys:
            dirty[name].masked_fill_(~clean.options[f"mask_{name[-1]}"][:, None, :, None], bad)
        want = harness.run(harness.accepted(clean, backend), backend)
        got = harness.run(clean.replace(**dirty), backend)
        for name, t in got.items():
            assert t.isfinite().all(), name
            torch.testing.assert_close(t, want[name], atol=0, rtol=0)
        for name in keys:
            side = ~clean.options[f"mask_{name[-1]}"][:, None, :, None].expand_as(dirty[name])
            assert (got[f"d{name}"][side] == 0).all()

    def test_unused_outputs(self, backend, device, unused):
        """The gradient of each single output, the others left alone."""
        case = harness.accepted(self.case(device=device), backend).leaves()
        exact = case.at(torch.float64).leaves()
        leaves, exact_leaves = list(case.tensors.values()), list(exact.tensors.values())
        got = torch.autograd.grad(
            fused(case, backend)[unused].square().sum(), leaves, allow_unused=True
        )
        want = torch.autograd.grad(
            testing.eager(exact)[unused].square().sum(), exact_leaves, allow_unused=True
        )
        for name, g, w in zip(case.tensors, got, want, strict=True):
            w = torch.zeros_like(g, dtype=torch.float64) if w is None else w
            g = torch.zeros_like(w) if g is None else g
            torch.testing.assert_close(g.double(), w, atol=2e-5, rtol=1e-4, msg=name)

    def test_lse_is_fp32_of_16_bit_inputs(self, backend, device):
        """Accumulation in fp32: lse of 16-bit inputs is as exact as of the same numbers in fp32."""
        for dtype in (torch.float16, torch.bfloat16):
            case = self.case(
                testing.ATTENTION_SHAPES["three_tiles"], dtype, gain=4.0, device=device
            )
            got = fused(harness.accepted(case, backend), backend)
            want = testing.eager(case.at(torch.float64))
            for g, w in zip(got[2:], want[2:], strict=True):
                assert g.dtype == torch.float32
                torch.testing.assert_close(g.double(), w, atol=2e-5, rtol=2e-6)

    # Dropout. With equal scores and v = identity, o shows the mask itself.

    def _identity(self, dtype: torch.dtype, device: str, p: float) -> Case:
        M, N = 150, 200
        case = make_case(self.op, AttentionShape(2, 2, M, N, 8, 8), dtype, device=device)
        zeros = {k: torch.zeros_like(t) for k, t in case.tensors.items()}
        for side, size in (("x", M), ("y", N)):
            zeros[f"v_{side}"] = torch.eye(size, dtype=dtype, device=device).expand(2, 2, -1, -1)
        return Case(self.op, zeros, {"dropout_p": p}, dtype)

    def _masks(self, backend: str, device: str, p: float, seed: int = 5) -> tuple[Tensor, Tensor]:
        """What is kept, [B, H, M, N] and [B, H, N, M]."""
        case = harness.accepted(self._identity(torch.float32, device, p), backend)
        torch.manual_seed(seed)
        o_x, o_y = fused(case, backend)
        for o in (o_x, o_y):
            kept = o[o != 0] * o.shape[-1]
            if p < 1.0:
                torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
        return o_x != 0, o_y != 0

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_dropout_statistics(self, backend, device, p):
        for kept in self._masks(backend, device, p):
            n = kept.numel()
            tolerance = 5 * (p * (1 - p) / n) ** 0.5
            assert abs(kept.double().mean().item() - (1 - p)) < tolerance
            for dim in (-1, -2):  # no row, column or lag stands out
                lines = kept.double().mean(dim)
                assert lines.var().item() < 2 * p * (1 - p) / kept.shape[dim]
                a, b = kept.double().roll(1, dim), kept.double()
                lag = (a * b).mean().item() - (1 - p) ** 2
                assert abs(lag) < 6 * tolerance
        x, y = self._masks(backend, device, p)
        assert not torch.equal(x, y.mT), "directions drop independently"
        assert not torch.equal(x[0], x[1]) and not torch.equal(x[:, 0], x[:, 1])

    def test_dropout_mask_is_the_same_on_every_backend(self, backend, device):
        want = self._masks("reference", "cpu", 0.3)
        got = self._masks(backend, device, 0.3)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.cpu(), w)
        assert not torch.equal(self._masks(backend, device, 0.3, seed=6)[0].cpu(), want[0])

    def test_dropout_mask_is_the_same_in_backward(self, backend, device):
        case = harness.accepted(self._identity(torch.float32, device, 0.4), backend).leaves()
        o_x, o_y = fused(case, backend)
        torch.manual_seed(99)  # the backward must not draw again
        # dv_y[n, d] = sum_m p[m, n] do[m, d]: with do a slice of the identity, p itself.
        do_x = torch.zeros_like(o_x)
        rows = min(o_x.shape[2], o_x.shape[3])
        do_x[..., :rows, :rows] = torch.eye(rows, device=device)
        do_y = torch.zeros_like(o_y)
        do_y[..., :rows, :rows] = torch.eye(rows, device=device)
        dv_x, dv_y = torch.autograd.grad(
            [o_x, o_y], [case.tensors["v_x"], case.tensors["v_y"]], [do_x, do_y]
        )
        torch.testing.assert_close(dv_y[..., :, :rows], o_x[..., :rows, :].mT)
        torch.testing.assert_close(dv_x[..., :, :rows], o_y[..., :rows, :].mT)

    def test_dropout_matches_reference(self, backend, device, dtype):
        """Values and gradients under dropout against the reference in fp64, of the same seed."""
        shape = AttentionShape(2, 2, 131, 101, 24, 20)
        case = self.case(shape, dtype, device=device, dropout_p=0.25, mask="dead")
        harness.accepted(case, backend)
        results = []
        for c, name in (
            (case.at(torch.float64), "reference"),
            (case, "reference"),
            (case, backend),
        ):
            torch.manual_seed(11)
            results.append(harness.run(c, name))
        want, base, got = results
        for name, exact in want.items():
            limit = testing.bound(name, base[name], exact, case)
            limit = max(limit, 3 * testing.TOLERANCE[dtype] * exact[exact.isfinite()].abs().max())
            assert testing.max_error(got[name], exact) <= limit, name

    def test_gradcheck_dropout(self):
        case = self.case(self.tiny, torch.float64, dropout_p=0.4, mask=False).leaves()
        names = list(case.tensors)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            torch.manual_seed(3)
            return fused(case.replace(**dict(zip(names, tensors, strict=True))), "reference")

        assert torch.autograd.gradcheck(function, tuple(case.tensors.values()), atol=1e-7)

    def test_dropout_ends(self, backend, device):
        """p = 1 drops everything without NaN; p = 0 leaves torch's generator alone."""
        case = self.case(device=device, dropout_p=1.0)
        got = harness.run(harness.accepted(case, backend), backend)
        assert (got["o_x"] == 0).all() and (got["o_y"] == 0).all()
        assert all(t.isfinite().all() for t in got.values())
        plain = self.case(device=device)
        harness.assert_same(
            {"lse": got["lse_x"]}, {"lse": fused(plain, backend)[2]}
        )  # lse is that of the undropped scores
        state = torch.get_rng_state()
        fused(self.case(device=device, dropout_p=0.0), backend)
        assert torch.equal(torch.get_rng_state(), state)

    def test_dropout_under_checkpoint_and_compile(self, backend, device):
        case = harness.accepted(self.case(device=device, dropout_p=0.5), backend)
        torch.manual_seed(1)
        want = harness.run(case, backend)
        torch.manual_seed(1)
        got = testing.values_and_grads(
            lambda c: checkpoint(fused, c, backend, use_reentrant=False), case
        )
        harness.assert_same(got, want)
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        got = testing.values_and_grads(lambda c: compiled(c, backend), case)
        harness.assert_same(got, want)
        torch.manual_seed(2)
        again = testing.values_and_grads(lambda c: compiled(c, backend), case)
        assert not torch.equal(again["o_x"], got["o_x"]), "the seed must not be baked in"
