"""Every further system: its model, data, loss and held-out figures behind one small interface.

`SYSTEMS` names them; a module is imported when its recipe is asked for, so that one system's
packages are not another's business.
"""

from __future__ import annotations

import importlib

from fusedmm.train.systems.base import Figure, Picture, Sources, System

# Recipe: module and class.
SYSTEMS = {
    "alignment": ("alignment", "Alignment"),
    "autoencoder": ("autoencoder", "Autoencoder"),
    "dialogue": ("scene_questions", "Dialogue"),
    "distillation": ("distillation", "Distillation"),
    "fusion": ("fusion", "Fusion"),
    "grounding": ("grounding", "Grounding"),
    "lxmert": ("vqa", "Lxmert"),
    "siglip": ("siglip", "SigLip"),
    "text-to-image": ("text_to_image", "TextToImage"),
    "uniter": ("vqa", "Uniter"),
    "video-qa": ("scene_questions", "VideoQa"),
    "vilbert-vqa": ("vqa", "VilbertVqa"),
    "vlap": ("vlap", "Vlap"),
    "vlmp": ("vlmp", "Vlmp"),
    "vlp": ("vlp", "Vlp"),
}


def load_system(name: str) -> type[System]:
    """The class behind a recipe's name."""
    module, cls = SYSTEMS[name]
    return getattr(importlib.import_module(f"fusedmm.train.systems.{module}"), cls)


__all__ = ["SYSTEMS", "Figure", "Picture", "Sources", "System", "load_system"]
