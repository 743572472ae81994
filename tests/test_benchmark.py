"""pytest-benchmark times of every op on one small shape, to compare between commits with
`pytest tests/test_benchmark.py --benchmark-autosave --benchmark-compare`."""

import pytest

from benchmarks import cases, measure, peers

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow
SMALL = {
    "bi_attention": "lxmert",
    "co_attention": "lxmert",
    "contrastive_loss": "region-word",
    "sigmoid_loss": "region-word",
}


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", list(cases.DTYPES))
@pytest.mark.parametrize("op", cases.OPS)
def test_speed(benchmark, op, dtype, mode):
    case = next(c for c in cases.CASES[op] if c.name == SMALL[op])
    ours = peers.PEERS[0]
    run = ours.make(case, mode, cases.DTYPES[dtype].itemsize)
    assert measure.check(run, case, ours, mode, dtype) == ""
    benchmark.group = f"{op} {dtype} {mode}"
    benchmark.pedantic(measure.steps(run, case.make(dtype), mode), rounds=10, warmup_rounds=2)
