"""LXMERT's encoder: two single-modality stacks, then cross-modality layers with shared attention.

Each cross-modality layer runs `fusedmm.co_attention` once for both directions, then self-attention
and a feed-forward per stream. Left out: the detector, whose place a convolutional grid takes.
"""

from __future__ import annotations

from torch import Tensor, nn

from fusedmm.models.bert import BertLayer
from fusedmm.models.clip import STANDARD
from fusedmm.nn import LxmertCrossAttention


class CrossModalityLayer(nn.Module):
    """Both streams look at each other with one set of weights, then each at itself.

    `backend` "standard" runs the two directions one after the other with torch's attention.
    """

    def __init__(self, width: int, heads: int, backend: str | None) -> None:
        super().__init__()
        self.standard = backend == STANDARD
        self.cross = LxmertCrossAttention(
            width, heads, 0.0, 0.0, backend=None if self.standard else backend
        )
        self.text = BertLayer(width, heads, 0.0)
        self.image = BertLayer(width, heads, 0.0)

    def forward(self, text: Tensor, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        if self.standard:
            (saw,), (heard,) = self.cross(text, image), self.cross(image, text, keep)
        else:
            (saw,), (heard,) = self.cross.both(text, image, keep, None)
        return self.text(saw, keep), self.image(heard)


class LxmertEncoder(nn.Module):
    """forward(text [B, N, d], image [B, M, d], keep [B, N]) -> both, same shapes.

    Source: LXMERT, arXiv:1908.07490.
    """

    def __init__(self, width: int, heads: int, layers: int, backend: str | None = None) -> None:
        super().__init__()
        self.text = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in range(layers))
        self.image = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in range(layers - 1))
        self.cross = nn.ModuleList(CrossModalityLayer(width, heads, backend) for _ in range(layers))

    def forward(self, text: Tensor, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.text:
            text = layer(text, keep)
        for layer in self.image:
            image = layer(image)
        for layer in self.cross:
            text, image = layer(text, image, keep)
        return text, image
