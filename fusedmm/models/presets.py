"""Standard sizes by name: the models that papers report, with random weights.

`build(*PRESETS[name])` makes one; on `torch.device("meta")` it takes no memory. The small defaults
of each config are what the recipes train.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fusedmm.models.clip import CLIPConfig
from fusedmm.models.vilbert import ViLBERTConfig


def _clip(patch: int, width: int, layers: int, text_width: int, embed_dim: int) -> CLIPConfig:
    return CLIPConfig(
        image_size=224, patch_size=patch, stem="patch", pool="token",
        vision_width=width, vision_layers=layers, vision_heads=width // 64,
        context_length=77, vocab_size=49408,
        text_width=text_width, text_layers=12, text_heads=text_width // 64, embed_dim=embed_dim,
    )  # fmt: skip


_B_32 = _clip(32, 768, 12, 512, 512)
_VILBERT = ViLBERTConfig(
    vocab_size=30522, max_position=512, hidden_size=768, layers=12, heads=12,
    v_hidden_size=1024, v_layers=6, v_heads=8, bi_hidden_size=1024, bi_heads=8,
    t_biattention_id=(6, 7, 8, 9, 10, 11), v_biattention_id=(0, 1, 2, 3, 4, 5),
    dropout=0.1, regions=_B_32,
)  # fmt: skip

# Kind and settings, as `build` takes them. ViLBERT's picture feed-forward is 4 wide where the
# original's is 1, and its regions are a ViT-B/32's tokens.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-b-32": ("clip", asdict(_B_32)),
    "clip-vit-b-16": ("clip", asdict(_clip(16, 768, 12, 512, 512))),
    "clip-vit-l-14": ("clip", asdict(_clip(14, 1024, 24, 768, 768))),
    "vilbert-base": ("vilbert", asdict(_VILBERT)),
}
