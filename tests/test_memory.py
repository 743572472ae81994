"""Peak memory of the cpu backend lies far below one score matrix; see memory_probe.py."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from fusedmm.testing import POSITIONAL

PROBE = pathlib.Path(__file__).with_name("memory_probe.py")
built = importlib.util.find_spec("fusedmm._C") is not None


def _growth(backend: str, size: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(PROBE), backend, str(size)],
        capture_output=True,
        text=True,
        check=True,
    )
    if done.stdout.strip() == "unsupported":
        pytest.skip("a process may not reset its peak memory here")
    growth = json.loads(done.stdout)
    assert growth.keys() == POSITIONAL.keys()
    return growth


@pytest.mark.skipif(not built, reason="extension not built")
def test_peak_is_far_below_a_score_matrix():
    """A third of one fp32 score matrix of 576 MiB, gradients and all partial sums included: the
    attentions' partial sums are capped at 64 MiB a direction."""
    size = 12288
    for op, grown in _growth("cpu", size).items():
        assert grown < 4 * size * size / 3, f"{op}: {grown / 2**20:.0f} MiB"


def test_the_probe_sees_a_score_matrix():
    size = 2048
    for op, grown in _growth("reference", size).items():
        assert grown > 4 * size * size, op
