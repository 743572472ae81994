"""SigLIP: CLIP's towers under a pairwise sigmoid loss with a learned bias.

The loss is `fusedmm.sigmoid_loss`; `loss_backend="standard"` takes the eager one that stores the
B x B logits. Left out: attention pooling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedmm
from fusedmm.models.clip import CLIP, STANDARD, CLIPConfig


class SigLIP(CLIP):
    """Image-text model in which every pair of a batch is a yes-or-no question of its own.

        loss = -log sigmoid(z * (exp(logit_scale) * x @ y.T + logit_bias)).sum() / B

    Args:
        config: sizes of the towers, as CLIP's.
        loss_backend: as CLIP's.
    Source: SigLIP, arXiv:2303.15343 (first scale 10, first bias -10).
    """

    def __init__(self, config: CLIPConfig, *, loss_backend: str | None = None) -> None:
        super().__init__(config, loss_backend=loss_backend)
        nn.init.constant_(self.logit_scale, math.log(10.0))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def loss(self, images: Tensor, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Sigmoid loss over all pairs of the batch; rows with equal `ids` are matches too."""
        x, y = self.encode_image(images).float(), self.encode_text(tokens).float()
        scale = self.logit_scale.exp().clamp(max=self.config.max_logit_scale)
        with torch.autocast(x.device.type, enabled=False):
            if self.loss_backend == STANDARD:
                return standard_sigmoid_loss(x, y, scale, self.logit_bias, ids)
            return fusedmm.sigmoid_loss(
                x, y, scale, self.logit_bias,
                ids_x=ids, ids_y=ids, normalize=True, backend=self.loss_backend,
            )  # fmt: skip


def standard_sigmoid_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, ids: Tensor | None = None
) -> Tensor:
    """The loss as it is usually written: stores the logits and the labels."""
    logits = logit_scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T + logit_bias
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    z = 2 * (ids[:, None] == ids[None, :]).to(logits.dtype) - 1  # [B, B]
    return -F.logsigmoid(z * logits).sum() / len(x)
