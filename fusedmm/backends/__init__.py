"""Table of backends: name -> module per op. A backend module has `reject(problem) -> list[str]`,
`fwd(...)` and `bwd(...)`, and nothing else that callers see.
"""

import functools
import importlib
from types import ModuleType

_WHERE = {
    "cuda": "fusedmm.backends.native.{op}",
    "triton": "fusedmm.backends.triton.{op}",
    "cpu": "fusedmm.backends.native.{op}",
    "reference": "fusedmm.backends.reference.{op}",
}
OPS = ("co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss")


@functools.cache
def load(name: str, op: str) -> ModuleType:
    """The module that implements `op` on backend `name`."""
    return importlib.import_module(_WHERE[name].format(op=op))


def reject(name: str, op: str, problem) -> list[str]:
    """Why backend `name` cannot run `problem`; empty if it can."""
    device = problem.device_type
    if name in ("cpu", "cuda") and device != name:
        return [f"inputs are on {device}"]
    if name == "triton" and device != "cuda":
        return [f"inputs are on {device}"]
    return load(name, op).reject(problem)
