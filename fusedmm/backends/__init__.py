"""Table of backends: (name, op) -> module. A backend module has `reject(problem) -> list[str]`,
`fwd(...)` and `bwd(...)`; one of contrastive_loss may have `row_loss` and `coefficients`.

Filled at import, a plain dict, so that torch.compile traces through the choice of a backend.
"""

import importlib
import importlib.util
from types import ModuleType

import torch

OPS = ("co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss")
RETRIEVAL = ("similarity_topk", "retrieval_ranks", "dual_softmax_match")
_FOLDER = {"cuda": "native", "triton": "triton", "cpu": "native", "reference": "reference"}
_RETRIEVAL_FOLDER = {"cuda": "tiled", "cpu": "tiled", "reference": "reference"}
_modules: dict[tuple[str, str], ModuleType] = {}
_missing: dict[str, str] = {}

if importlib.util.find_spec("triton") is None:
    _missing["triton"] = "not installed"
elif not torch.cuda.is_available():
    _missing["triton"] = "no CUDA device"

for _name, _folder in _FOLDER.items():
    for _op in OPS:
        if _name not in _missing:
            _modules[_name, _op] = importlib.import_module(f"{__name__}.{_folder}.{_op}")
for _name in ("cpu", "reference"):
    _path = f"{__name__}.{_FOLDER[_name]}.fusion_attention"
    _modules[_name, "fusion_attention"] = importlib.import_module(_path)
for _name, _folder in _RETRIEVAL_FOLDER.items():
    for _op in RETRIEVAL:
        _modules[_name, _op] = importlib.import_module(f"{__name__}.{_folder}.{_op}")


def load(name: str, op: str) -> ModuleType:
    """The module that implements `op` on backend `name`."""
    return _modules[name, op]


def reject(name: str, op: str, problem) -> list[str]:
    """Why backend `name` cannot run `problem`; empty if it can."""
    device = problem.device_type
    runs_on = "cuda" if name == "triton" else name
    if name != "reference" and device != runs_on:
        return [f"inputs are on {device}"]
    if name in _missing:
        return [_missing[name]]
    if (name, op) not in _modules:
        return [f"{op} is not implemented"]
    return _modules[name, op].reject(problem)
