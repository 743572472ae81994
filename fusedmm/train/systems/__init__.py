"""Every further system: its model, data, loss and held-out figures behind one small interface.

`SYSTEMS` names them; a module is imported when its recipe is asked for, so that one system's
packages are not another's business.
"""

from __future__ import annotations

import importlib

from fusedmm.train.systems.base import Figure, Picture, Sources, System

SYSTEMS = {
    "fusion": "Fusion",
    "grounding": "Grounding",
    "siglip": "SigLip",
    "vlap": "Vlap",
    "vlp": "Vlp",
}


def load_system(name: str) -> type[System]:
    """The class behind a recipe's name."""
    module = importlib.import_module(f"fusedmm.train.systems.{name.replace('-', '_')}")
    return getattr(module, SYSTEMS[name])


__all__ = ["SYSTEMS", "Figure", "Picture", "Sources", "System", "load_system"]
