"""Peak memory of the cpu backend lies far below one score matrix; see memory_probe.py."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from fusedmm.backends.native import extension
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
    attentions' partial sums are capped at 16 MiB a direction."""
    size = 12288
    for op, grown in _growth("cpu", size).items():
        assert grown < 4 * size * size / 3, f"{op}: {grown / 2**20:.0f} MiB"


def test_the_probe_sees_a_score_matrix():
    size = 2048
    for op, grown in _growth("reference", size).items():
        assert grown > 4 * size * size, op


def _printed(script: str) -> int:
    """The bytes that a script prints, run on two threads beside the probe. Large arrays are mapped
    one by one, so that freeing gives them back."""
    setup = "import sys, torch, fusedmm; sys.path.append(sys.argv[1]); import memory_probe"
    done = subprocess.run(
        [sys.executable, "-c", f"{setup}; torch.set_num_threads(2){script}", str(PROBE.parent)],
        capture_output=True, text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    if "clear_refs" in done.stderr:
        pytest.skip("a process may not reset its peak memory here")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


LEFT = """
x, y = torch.randn(16384, 512).requires_grad_(), torch.randn(64, 512).requires_grad_()
ids = torch.arange(16384) % 64, torch.arange(64)
def step(rows):
    loss = fusedmm.contrastive_loss(x[:rows], y, 10.0, ids_x=ids[0][:rows], ids_y=ids[1],
                                    normalize=True, backend="cpu")
    loss.backward()
    x.grad = y.grad = None
step(128)
before = memory_probe.resident("VmRSS")
step(16384)
print(memory_probe.resident("VmRSS") - before)
"""


@pytest.mark.skipif(not built, reason="extension not built")
def test_packed_rows_do_not_outlive_the_call():
    """64 MiB of them here; what an arena may keep is 48 MiB."""
    grown = _printed(LEFT)
    assert grown < 56 << 20, f"{grown / 2**20:.0f} MiB stay"


KEPT = """
tensors = [torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(6)]
def step(rows):
    o = fusedmm.co_attention(*(t[:, :, :rows] for t in tensors), backend="cpu")
    torch.autograd.grad(o, tensors, tuple(torch.ones_like(t) for t in o))
step(64)
before = memory_probe.resident("VmRSS")
step(2048)  # finds out how much it takes
step(2048)
print(memory_probe.resident("VmRSS") - before)
"""


@pytest.mark.skipif(not built, reason="extension not built")
def test_partial_sums_stay_for_the_next_call():
    """24 MiB of both sides. Given back, they were faulted in at every step: 30 ms became 61."""
    grown = _printed(KEPT)
    assert 20 << 20 < grown < 56 << 20, f"{grown / 2**20:.0f} MiB stay"


WORKSPACE = """
def step(M, N, D):
    x, y = [torch.randn(3, 1, 4, n, D).unbind() for n in (M, N)]
    tensors = [t.requires_grad_() for t in (*x, *y)]
    upstream = torch.ones_like(x[0]), torch.ones_like(y[0])
    memory_probe.reset_peak()
    before = memory_probe.resident("VmRSS")
    o = fusedmm.co_attention(*tensors, backend="cpu")
    grads = torch.autograd.grad(o, tensors, upstream)
    grown = memory_probe.resident("VmHWM") - before
    return grown - sum(t.untyped_storage().nbytes() for t in (*o, *grads))
step(64, 64, 64)
print(step(256, 4000, 256))
"""


@pytest.mark.skipif(not built, reason="extension not built")
def test_workspace_of_few_queries_and_many_keys():
    """A few MiB a thread. Sums of all keys' gradients, for every chunk of queries, once took 80."""
    grown = _printed(WORKSPACE)
    assert grown < 32 << 20, f"{grown / 2**20:.0f} MiB"


def _advised(data: int) -> bool:
    """Whether the mapping that holds the address was asked to take huge pages."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(end, 16) for end in first.split("-"))
                inside = low <= data < high
            elif inside and first == "VmFlags:":
                return "hg" in line.split()
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not built, reason="extension not built")
@pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_large_workspaces_ask_for_huge_pages():
    """Products kept from a forward to its backward, 8 MiB of them, past the first 2 MiB."""
    kept = extension.kept_dots(96 * 96 * 228, torch.empty(0))
    assert _advised(kept.data_ptr() + (4 << 20))
