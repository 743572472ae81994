"""Self tests of the virtual GPU, collected only on it; each runs for one of its architectures."""

from pathlib import Path

import pytest
import torch
import vgpu
from vgpu import sim

HERE = Path(__file__).parent
collect_ignore_glob = [] if vgpu.active() else ["*"]


def pytest_collection_modifyitems(config, items):
    """Mark ours `gpu`. A test of one architecture runs where that is the device; the rest once."""
    keep, drop = [], []
    for item in items:
        if HERE not in item.path.parents:
            keep.append(item)
            continue
        item.add_marker(pytest.mark.gpu)
        params = item.callspec.params if hasattr(item, "callspec") else {}
        arch = params.get("arch") or next((m.args[0] for m in item.iter_markers("vgpu_arch")), 0)
        (keep if arch // 10 in (0, vgpu.arch() // 10) else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    yield
    vgpu.reset()


@pytest.fixture(scope="session")
def nvcc():
    if sim.nvcc() is None:
        pytest.skip("no nvcc")
    return sim.nvcc()
