"""UNITER's encoder: one BERT over words and regions together, and word-region alignment.

The alignment is an optimal-transport distance between words and regions, minimised for pairs that
belong together. All attention is self-attention of one stream, which is torch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.models.bert import BertLayer


class UniterEncoder(nn.Module):
    """forward(text [B, N, d], image [B, M, d], keep [B, N]) -> both, same shapes.

    Source: UNITER, arXiv:1909.11740.
    """

    def __init__(self, width: int, heads: int, layers: int, backend: str | None = None) -> None:
        super().__init__()
        self.kind = nn.Parameter(torch.randn(2, width) * 0.02)
        self.layers = nn.ModuleList(BertLayer(width, heads, 0.0) for _ in range(2 * layers))

    def forward(self, text: Tensor, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([text + self.kind[0], image + self.kind[1]], dim=1)
        kept = F.pad(keep, (0, image.shape[1]), value=True)
        for layer in self.layers:
            both = layer(both, kept)
        return both.split((text.shape[1], image.shape[1]), dim=1)


def transport_distance(
    text: Tensor, image: Tensor, keep: Tensor, *, beta: float = 0.5, iterations: int = 20
) -> Tensor:
    """Optimal-transport distance between kept words and regions under cosine cost, [B].

        cost = 1 - cos(text, image)                   # [B, N, M]
        distance = (plan * cost).sum(), plan with uniform margins over words and regions

    The plan comes from proximal-point iterations (IPOT) without a gradient; the cost has one.

    Args:
        text: [B, N, d]; image: [B, M, d]; keep: [B, N] bool, at least one True a row.
        beta: proximal step; iterations: of the plan.
    Source: IPOT, arXiv:1802.04307; UNITER, arXiv:1909.11740.
    """
    text, image = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
    cost = 1 - text @ image.mT
    m = image.shape[1]
    with torch.no_grad():
        rows = keep.float() / keep.sum(dim=1, keepdim=True)  # [B, N] margins, 0 on padding
        columns = torch.full_like(cost[:, 0], 1 / m)
        kernel = torch.exp(-cost / beta) * keep[..., None]
        plan = kernel / kernel.sum(dim=(1, 2), keepdim=True)
        for _ in range(iterations):
            q = kernel * plan
            a = rows / q.sum(dim=2).clamp(min=1e-30)
            b = columns / (a[..., None] * q).sum(dim=1).clamp(min=1e-30)
            plan = a[..., None] * q * b[:, None]
    return (plan * cost).sum(dim=(1, 2))
