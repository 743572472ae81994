"""Reference models built on the fused ops: one file a system, and `load` / `save` for trained ones.

Each takes a backend name, None for the fastest that accepts, or "standard" for the usual eager
path. Nothing in the library proper imports this package.
"""

from fusedmm.models.checkpoint import Loaded, build, load, save
from fusedmm.models.clip import CLIP, CLIPConfig
from fusedmm.models.presets import PRESETS
from fusedmm.models.tokenizer import Tokenizer
from fusedmm.models.vilbert import ViLBERT, ViLBERTConfig

__all__ = [
    "CLIP",
    "CLIPConfig",
    "Loaded",
    "PRESETS",
    "Tokenizer",
    "ViLBERT",
    "ViLBERTConfig",
    "build",
    "load",
    "save",
]
