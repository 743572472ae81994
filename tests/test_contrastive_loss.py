"""contrastive_loss: pair_loss_suite.py, targets of every kind, and well-fitted pairs."""

import dataclasses

import harness
import pytest
import torch
from pair_loss_suite import PairLossSuite
from torch.nn import functional as F

import fusedmm
from fusedmm import backends, testing
from fusedmm.ops import pairs
from fusedmm.testing import PairShape, fused, make_case

NAN, INF = float("nan"), float("inf")
SQUARE = PairShape(131, 131, 24, (2,))
WIDE = PairShape(67, 149, 24, (2,))
TALL = PairShape(149, 67, 24, (2,))


class TestContrastiveLoss(PairLossSuite):
    """See PairLossSuite."""

    op = "contrastive_loss"
    params = {
        **PairLossSuite.table,
        "features": {
            **PairLossSuite.features,
            "x": {"direction": "x", "shape": SQUARE},
            "y": {"direction": "y", "shape": SQUARE},
            "x_mean": {"direction": "x", "reduction": "mean"},
            "y_sum": {"direction": "y", "reduction": "sum"},
            "smoothing": {"label_smoothing": 0.1, "shape": SQUARE},
            "all_smoothing": {"label_smoothing": 1.0},
            "smoothing_rows_normalize": {
                "label_smoothing": 0.2, "logit_scale": "rows", "normalize": True, "shape": SQUARE,
            },
            "ignore": {"ids": 50, "duplicates": "ignore", "shape": SQUARE},
            "ignore_few": {"ids": 3, "duplicates": "ignore"},
            "ignore_smoothing": {"ids": 9, "duplicates": "ignore", "label_smoothing": 0.1},
            "ids_smoothing": {"ids": 9, "label_smoothing": 0.1, "direction": "x"},
            "shuffled": {"positives": "shuffled", "shape": SQUARE},
            "shuffled_wide": {"positives": "shuffled", "shape": WIDE},
            "shuffled_wide_mean": {"positives": "shuffled", "shape": WIDE, "reduction": "mean"},
            "repeated": {"positives": "repeated", "shape": SQUARE},
            "repeated_tall": {"positives": "repeated", "shape": TALL, "label_smoothing": 0.1},
            "repeated_tall_mean": {"positives": "repeated", "shape": TALL, "reduction": "mean"},
            "positives_ids": {"positives": "repeated", "ids": 20, "shape": TALL},
            "positives_ignore": {
                "positives": "shuffled", "ids": 20, "duplicates": "ignore", "shape": WIDE,
            },
            "ids_rectangular_mean": {"ids": 90, "shape": TALL, "reduction": "mean"},
        },
    }  # fmt: skip

    def test_is_the_mean_of_two_cross_entropies(self, backend, device):
        """The formula everyone writes, apart from the general one that eager here is."""
        case = self.case(testing.PAIR_SHAPES["three_tiles"], reduction="mean", device=device)
        x, y = (case.tensors[k].double() for k in "xy")
        s, labels = 10.0 * x @ y.T, torch.arange(301, device=device)
        want = (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2
        (got,) = fused(harness.accepted(case, backend), backend)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        for smoothing in (0.1, 0.5):
            want = F.cross_entropy(s, labels, label_smoothing=smoothing)
            smooth = case.replace(label_smoothing=smoothing, direction="x")
            torch.testing.assert_close(fused(smooth, backend)[0].double(), want, rtol=1e-6, atol=0)

    def test_directions(self, backend, device):
        case = harness.accepted(self.case(SQUARE, device=device), backend)
        both = fused(case, backend)
        for direction, i in (("x", 0), ("y", 1)):
            one = fused(case.replace(direction=direction), backend)
            torch.testing.assert_close(one[i], both[i], rtol=0, atol=1e-6)
            assert (one[1 - i] == 0).all()
            (mean,) = fused(case.replace(direction=direction, reduction="mean"), backend)
            torch.testing.assert_close(mean, both[i].mean(), rtol=1e-6, atol=0)

    def test_unmatched_columns_are_negatives_only(self, backend, device):
        case = self.case(WIDE, positives="shuffled", device=device)
        loss_x, loss_y = fused(harness.accepted(case, backend), backend)
        hit = F.one_hot(case.options["positives"], 149).sum(-2) > 0
        assert (loss_y[~hit] == 0).all() and (loss_y[hit] > 0).all() and (loss_x > 0).all()
        (mean,) = fused(case.replace(reduction="mean"), backend)
        want = (loss_x.mean() + loss_y[hit].mean()) / 2
        torch.testing.assert_close(mean, want, rtol=1e-6, atol=0)

    def test_rows_without_a_match_have_no_loss(self, backend, device):
        """By ids alone, M != N: no match, loss 0, and neither gradient nor weight in the mean."""
        case = self.case(WIDE, ids=30, device=device, direction="x")
        case.options["ids_x"][:, :5] = -1
        got = harness.run(harness.accepted(case, backend), backend)
        assert (got["loss_x"][:, :5] == 0).all() and (got["loss_x"][:, 5:] >= 0).all()
        assert (got["dx"][:, :5] == 0).all()
        harness.check_oracle(case.replace(reduction="mean"), backend)

    def test_all_ids_equal(self, backend, device):
        """Every pair matches: target uniform, or nothing left beside the positive (loss 0)."""
        case = self.case(SQUARE, ids=1, device=device)
        harness.check_oracle(case, backend)
        ignore = case.replace(duplicates="ignore")
        got = harness.run(harness.accepted(ignore, backend), backend)
        for name, t in got.items():
            torch.testing.assert_close(t, torch.zeros_like(t), atol=1e-6, rtol=0, msg=name)

    def test_distinct_ids_change_nothing(self, backend, device):
        case = self.case(SQUARE, device=device)
        ids = torch.randperm(131).expand(2, 131).to(device) * 2**40  # beyond 32 bits
        want = harness.run(harness.accepted(case, backend), backend)
        # On a GPU scores with ids go another way, which rounds otherwise.
        rtol, atol = (1e-6, 1e-7) if device == "cpu" else (1e-5, 1e-6)
        for mode in ("positive", "ignore"):
            got = harness.run(case.replace(ids_x=ids, ids_y=ids, duplicates=mode), backend)
            for name, t in got.items():
                torch.testing.assert_close(t, want[name], rtol=rtol, atol=atol)

    @pytest.mark.parametrize("scale", [40.0, 100.0, 200.0], ids=str)
    def test_well_fitted_pairs(self, backend, device, scale):
        """A loss of 1e-5 keeps five digits in fp32, and so do its gradients."""
        M, D = 301, 320
        x = torch.eye(M, D)
        # s_ij - s_ii = -gap for j != i, so that loss = log1p((M - 1) * exp(-gap)) = 1e-5
        gap = torch.tensor((M - 1) / 1e-5, dtype=torch.float64).log().item()
        shared = torch.zeros(M, D)
        shared[:, -1] = 1.0
        a = (gap / scale) ** 0.5
        x = (a * x + (1 - a * a) ** 0.5 * shared).to(device)
        case = make_case(self.op, PairShape(M, M, D), logit_scale=scale, reduction="none")
        case = case.replace(x=x, y=x.clone(), logit_scale=torch.tensor(scale, device=device))
        want = testing.truth(case)
        assert 5e-6 < want["loss_x"].mean() < 2e-5
        got = harness.run(harness.accepted(case, backend), backend)
        for name in ("loss_x", "loss_y"):
            torch.testing.assert_close(got[name].double(), want[name], rtol=5e-5, atol=0, msg=name)
        (mean,) = fused(case.replace(reduction="mean"), backend)
        torch.testing.assert_close(
            mean.double(), (want["loss_x"].mean() + want["loss_y"].mean()) / 2, rtol=5e-5, atol=0
        )
        for name in ("dx", "dy", "dlogit_scale"):
            error = testing.max_error(got[name], want[name])
            assert error <= 2e-4 * want[name].abs().max().item(), name
        harness.check_oracle(case, backend)

    def test_perfect_pairs(self, backend, device):
        """Loss below fp32's least step beside 1: not 0, not NaN."""
        x = torch.eye(200, 256, device=device)
        loss = testing.fused(
            harness.accepted(
                make_case(self.op, PairShape(200, 200, 256), reduction="none").replace(
                    x=x, y=x, logit_scale=torch.tensor(40.0, device=device)
                ),
                backend,
            ),
            backend,
        )
        want = torch.log1p(torch.tensor(199 * 2.718281828459045**-40.0, dtype=torch.float64)).item()
        for t in loss:
            torch.testing.assert_close(t, torch.full_like(t, want), rtol=5e-5, atol=0)

    @pytest.mark.parametrize("temperature", [0.005, 0.01])
    def test_small_temperature(self, backend, device, temperature):
        """Scale 200: no infinite loss, no NaN gradient; badly fitted pairs cost 100 nats."""
        for seed, fit in ((0, None), (1, 0.5)):
            case = self.case(
                testing.PAIR_SHAPES["three_tiles"], logit_scale=1 / temperature, fit=fit,
                seed=seed, device=device,
            )  # fmt: skip
            harness.check_oracle(case, backend)
        opposite = case.replace(y=-case.tensors["x"])
        got = harness.run(opposite, backend)
        assert all(t.isfinite().all() for t in got.values())
        assert got["loss_x"].max() > 100.0
        harness.check_oracle(opposite, backend)

    def test_logits_beyond_exp(self, backend, device):
        """Unnormalised rows, logits past 95 where exp overflows, and negative scales."""
        case = self.case(SQUARE, device=device, logit_scale=3.0)
        for factor in (10.0, 40.0):
            big = case.replace(x=case.tensors["x"] * factor, y=case.tensors["y"] * factor)
            harness.check_oracle(big, backend)
        negative = case.replace(logit_scale=-case.tensors["logit_scale"])
        harness.check_oracle(negative, backend)
        harness.check_oracle(
            case.replace(logit_scale=torch.zeros_like(negative.tensors["logit_scale"])), backend
        )

    def test_ignored_matches_beyond_exp(self, backend, device):
        """What leaves the denominator may lie far above all that stays."""
        case = self.case(SQUARE, device=device, ids=3, duplicates="ignore", logit_scale=200.0)
        ids = case.options["ids_x"]
        y = torch.eye(24, device=device)[ids] + 0.01 * case.tensors["y"]
        x = torch.eye(24, device=device)[ids] + 0.01 * case.tensors["x"]
        x.diagonal(dim1=-2, dim2=-1)[:] = 0.0  # some rows are far from their own match
        harness.check_oracle(case.replace(x=x, y=y), backend)

    @pytest.mark.parametrize("columns", [1, 3, 18, 100])
    def test_all_scores_far_below_zero(self, backend, device, columns):
        """exp(-lse) overflows; nothing past the end of a tile may come of it."""
        case = self.case(PairShape(37, columns, 8), device=device, logit_scale=200.0,
                         positives="repeated")  # fmt: skip
        y = case.tensors["x"][:1] + 0.01 * case.tensors["y"]
        far = case.replace(x=-y[:1] + 0.01 * case.tensors["x"], y=y)
        harness.check_oracle(dataclasses.replace(far, floor=1.0), backend)  # gradients cancel

    @pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
    def test_bad_row_stays_in_its_row(self, backend, device, dtype, bad):
        """Row i of x reaches loss_x[i] alone; it is part of every column. On a GPU rows share what
        their exponents refer to, which moves others by a rounding."""
        clean = self.case(SQUARE, dtype, device=device, direction="x")
        dirty = clean.tensors["x"].clone()
        dirty[0, 7, 2] = bad
        want = fused(harness.accepted(clean, backend), backend)[0]
        got = fused(clean.replace(x=dirty), backend)[0]
        keep = torch.ones_like(got, dtype=torch.bool)
        keep[0, 7] = False
        rtol = 0 if device == "cpu" else 1e-6
        torch.testing.assert_close(got[keep], want[keep], atol=0, rtol=rtol)
        assert not got[0, 7].isfinite()

    def test_repeated_rows_share_their_target(self, backend, device):
        """Two rows that point at one column: its target is half each."""
        case = self.case(PairShape(3, 2, 8), device=device)
        case.options["positives"] = torch.tensor([1, 1, 0], device=device)
        loss_x, loss_y = fused(harness.accepted(case, backend), backend)
        s = 10.0 * case.tensors["x"].double() @ case.tensors["y"].double().T
        columns = s.log_softmax(0)
        want = torch.stack([-columns[2, 0], -(columns[0, 1] + columns[1, 1]) / 2])
        torch.testing.assert_close(loss_y.double(), want, rtol=1e-5, atol=1e-6)
        rows = -s.log_softmax(1)[torch.arange(3), case.options["positives"]]
        torch.testing.assert_close(loss_x.double(), rows, rtol=1e-5, atol=1e-6)

    def test_gradient_reaches_one_direction_only(self, backend, device):
        """Backward through loss_y alone, loss_x left unused."""
        case = harness.accepted(self.case(device=device), backend).leaves()
        exact = case.at(torch.float64).leaves()
        for i in range(2):
            got = torch.autograd.grad(fused(case, backend)[i].sum(), [*case.tensors.values()])
            want = torch.autograd.grad(testing.eager(exact)[i].sum(), [*exact.tensors.values()])
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def views(M: int, lead=(), dtype=torch.float32, device="cpu", **options) -> testing.Case:
    """M rows whose positives are a random pairing; ids of a third as many values."""
    case = make_case("contrastive_loss", PairShape(M, M, 24, lead), dtype, ids=max(M // 3, 1))
    order = torch.rand(*lead, M).argsort(-1)
    mate = torch.empty_like(order).scatter_(-1, order, order.roll(M // 2, -1))
    ids = case.options["ids_x"].to(device)
    every = {"positives": mate.to(device), "ids_x": ids, "ids_y": ids, "duplicates": "positive"}
    kept = {k: v for k, v in every.items() if options.pop(k, k != "positives")}
    if "positives" in kept and "ids_x" in kept:
        kept["duplicates"] = "ignore"
    options = {"reduction": "none", "exclude_self": True, **kept, **options}
    tensors = {k: case.tensors[k].to(device) for k in ("x", "logit_scale")}
    return testing.Case(case.op, tensors, options, dtype)


def twice(case: testing.Case) -> testing.Case:
    """The case with y = x, one tensor in both roles."""
    pair = {"x": case.tensors["x"], "y": case.tensors["x"], **case.tensors}
    return testing.Case(case.op, pair, case.options, case.dtype)


def ours(backend: str):
    """The fused op of x against itself, as a function of a case."""
    return lambda case: fused(twice(case), backend)


def eager_twice(case: testing.Case):
    """Eager, score matrix and all."""
    return testing.eager(twice(case))


NO_IDS = {"ids_x": False, "ids_y": False, "duplicates": False}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_rows_in_one_pass(backend, device, smoothing):
    """A backend's losses and coefficients of rows are those of the definition: no, one or several
    matches, nothing or everything beside them, infinities and NaN."""
    module = backends.load(backend, "contrastive_loss")
    lse = torch.tensor([-1e4, -3.0, 0.0, 2.5, 40.0, 1e4, -INF, INF, NAN], dtype=torch.float64)
    count = torch.tensor([0.0, 1.0, 2.0, 37.0], dtype=torch.float64)
    neg, pos, n_pos = torch.cartesian_prod(lse, lse, count).unbind(-1)
    stats = torch.stack([neg, pos, n_pos * 1.5, n_pos, n_pos * 0.7, n_pos + 3.0])[:, None]
    there = stats.to(device)
    ramp = torch.linspace(-1, 1, neg.numel())[None]
    for dloss in (ramp, torch.zeros_like(ramp), torch.ones(()).expand_as(ramp)):
        want = pairs.coefficients(stats, dloss, smoothing)
        got = pairs.coefficients(there, dloss.to(device), smoothing, module)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-14, atol=0, equal_nan=True)
    got = pairs.row_loss(there, smoothing, module).cpu()
    want = pairs.row_loss(stats, smoothing)
    rtol = 1e-13 if got.dtype == torch.float64 else 1e-7  # as results are, or as they end
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=0, equal_nan=True)


class TestSelfSimilarity:
    """exclude_self: NT-Xent (positives), SupCon (ids), known duplicates ignored (both)."""

    @pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
    @pytest.mark.parametrize(
        "matches",
        [{"positives": True, **NO_IDS}, {}, {"positives": True}],
        ids=["pair", "ids", "both"],
    )
    @pytest.mark.parametrize("size", [(2, ()), (64, (2,)), (200, (2,)), (330, ())], ids=str)
    def test_matches_oracle(self, backend, device, size, matches, dtype):
        M, lead = size
        normalize = M == 200
        case = views(
            M, lead, dtype, device, **matches, normalize=normalize, label_smoothing=0.1 * normalize
        )
        want = testing.values_and_grads(eager_twice, case.at(torch.float64))
        base = testing.values_and_grads(eager_twice, case)
        got = testing.values_and_grads(ours(backend), case)
        for name, exact in want.items():
            limit = testing.bound(name, base[name], exact, case)
            assert testing.max_error(got[name], exact) <= limit, name

    def test_gradcheck(self):
        case = views(70, dtype=torch.float64, positives=True).leaves()

        def function(x, scale):
            return ours("reference")(case.replace(x=x, logit_scale=scale))

        assert torch.autograd.gradcheck(function, tuple(case.tensors.values()), fast_mode=True)

    def test_is_nt_xent(self, backend, device):
        """The formula everyone writes: two views of 100 pictures, every direction, mean and sum."""
        x = F.normalize(torch.randn(200, 32), dim=-1).to(device)
        mate = (torch.arange(200, device=device) + 100) % 200
        s = (5.0 * x.double() @ x.double().T).fill_diagonal_(float("-inf"))
        want = F.cross_entropy(s, mate)
        for direction in ("both", "x", "y"):
            for reduction, factor in (("mean", 1), ("sum", 200)):
                got = fusedmm.contrastive_loss(
                    x, x, 5.0, positives=mate, exclude_self=True, direction=direction,
                    reduction=reduction, backend=backend,
                )  # fmt: skip
                torch.testing.assert_close(got.double(), factor * want, rtol=1e-6, atol=0)

    def test_compiles_and_repeats(self, backend, device):
        case = views(150, device=device, positives=True, **NO_IDS)
        want = testing.values_and_grads(ours(backend), case)
        harness.assert_same(testing.values_and_grads(ours(backend), case), want)
        compiled = torch.compile(ours(backend), fullgraph=True, backend="aot_eager")
        harness.assert_same(testing.values_and_grads(compiled, case), want)

    def test_visits_half_of_the_scores(self, monkeypatch):
        """The blocks cover each pair once: entries handed to kernels are at most half of M * M."""

        from fusedmm.backends.reference import contrastive_loss as reference

        seen, fwd = [], reference.fwd

        def watched(x, y, *rest):
            seen.append(x.shape[0] * x.shape[1] * y.shape[1])
            return fwd(x, y, *rest)

        monkeypatch.setattr(reference, "fwd", watched)
        M = 1000
        ours("reference")(views(M, positives=True, **NO_IDS))
        blocks = [64] * 15 + [40]
        assert sum(seen) == (M * M - sum(b * b for b in blocks)) // 2
