"""Session settings: seed, NaN in every uninitialised tensor, full fp32 products; and the backends
that tests run on. A backend that this build or machine lacks is left out of the parameters.
"""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.pop("FUSEDMM_BACKEND", None)  # the tests choose

from fusedmm import backends, problem  # noqa: E402

SUITES = "op_suite", "attention_suite", "pair_loss_suite"
pytest.register_assert_rewrite("harness", *SUITES, "fusedmm.testing")


def _available(name: str) -> bool:
    device = "cpu" if name in ("cpu", "reference") else "cuda"
    side = problem.Side(4, 4, 8, 8)
    asked = problem.AttentionProblem("co_attention", 1, 1, side, side, torch.bfloat16, device)
    return not backends.reject(name, "co_attention", asked)


ON_CPU = [name for name in ("reference", "cpu") if _available(name)]
ON_CUDA = [name for name in ("triton", "cuda") if torch.cuda.is_available() and _available(name)]


def pytest_report_header() -> str:
    """One line on what is tested."""
    return f"fusedmm backends under test: {', '.join(ON_CPU + ON_CUDA)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises `backend` over the backends at hand, those on "cuda" tensors marked gpu; and a
    suite's arguments over the tables in its `params`, which subclasses fill."""
    own = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    for name, table in getattr(metafunc.cls, "params", {}).items():
        if name in metafunc.fixturenames and name not in own:
            metafunc.parametrize(name, list(table.values()), ids=list(table))
    if "backend" in metafunc.fixturenames and "backend" not in own:
        on_cuda = [pytest.param(name, marks=pytest.mark.gpu) for name in ON_CUDA]
        metafunc.parametrize("backend", ON_CPU + on_cuda)


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of `backend` live."""
    return "cuda" if backend in ON_CUDA else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _session() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "uninitialised memory must be poisoned"
    yield
    torch.use_deterministic_algorithms(False)
