"""The ring's cost model against what gloo ranks measured, and a large batch in little memory."""

import json
import subprocess
import sys

import pytest

from benchmarks import large_batch, measure, ring

RESULT = json.loads(ring.RESULT.read_text())


def test_page_is_that_of_the_figures():
    assert ring.page(RESULT) == ring.PAGE.read_text()


@pytest.mark.parametrize("record", RESULT["records"], ids=lambda r: str(r["ranks"]))
def test_model_meets_the_measurements(record):
    """Bytes exactly, kernels of a hop within 15 %, memory within 15 % where the model holds."""
    model = ring.predicted(RESULT, record)
    assert set(record["sent"]) == {model["sent"]}
    for name in ("fwd", "bwd"):
        assert record[name] == pytest.approx(model[name], rel=0.15)
    if record["ranks"] > 2:
        assert record["grown"] == pytest.approx(model["grown"], rel=0.15)


def test_model_is_consistent():
    """A hop's bytes add up to what a rank sends; memory does not know the number of ranks."""
    n, D, b = 1000, 64, 2
    hop = sum(ring.hop_bytes(n, D, b))
    assert ring.sent(n, D, b, 5) == 4 * hop
    rate, bandwidth = 1e12, 1e9
    least = ring.least_rows(b, rate, bandwidth)
    for rows, hidden in ((least, True), (least - 2, False)):
        compute = [f / rate for f in ring.flops(rows, D)]
        wire = [rows * D * k / bandwidth for k in (b, b + 4)]
        assert all(c >= w for c, w in zip(compute, wire, strict=True)) == hidden


def test_large_batch_in_under_2_gib():
    """The committed run of 65,536 rows, and one of 8,192 here: a score matrix would be 256 MiB."""
    kept = json.loads(large_batch.RESULT.read_text())
    assert (kept["rows"], kept["width"]) == (65536, 512) and kept["peak_bytes"] < 2**31
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large_batch", "--rows", "8192", "--width", "64"],
        capture_output=True, text=True, cwd=measure.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = json.loads(done.stdout)
    rows = 2 * 8192 * 64 * 4  # x and y; as much again for their gradients
    assert here["peak_bytes"] - here["before_bytes"] < 4 * rows + 2**26
