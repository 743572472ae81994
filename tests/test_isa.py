"""Every instruction set that this machine has runs the kernels right; see isa_check.py."""

import os
import pathlib
import subprocess
import sys

import pytest

try:
    from fusedmm import _C

    ISAS = list(_C.cpu_isas())
except ImportError:
    ISAS = []

SCRIPT = pathlib.Path(__file__).with_name("isa_check.py")


def _run(*command: str, isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "FUSEDMM_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    done = _run(str(SCRIPT), isa, isa=isa)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not ISAS, reason="extension not built")
def test_the_list_of_instruction_sets():
    known = ("avx512bf16", "avx512", "avx2", "baseline")
    assert ISAS == [name for name in known if name in ISAS] and ISAS[-1] == "baseline"


@pytest.mark.skipif(not ISAS, reason="extension not built")
def test_an_unknown_instruction_set_is_refused():
    code = "import torch, fusedmm; t = torch.ones(1, 1, 2, 2); fusedmm.bi_attention(t, t, t, t)"
    done = _run("-c", code, isa="avx9000")
    assert done.returncode != 0 and "avx9000" in done.stderr
    assert done.returncode > 0, "a clear error, not a crash"
