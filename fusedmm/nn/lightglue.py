"""LightGlue's cross block around `fusedmm.bi_attention`: one score matrix for both images.

Parameter names are those of the original code (cvg/LightGlue, CrossBlock).
"""

import torch
from torch import Tensor, nn

from ..ops.bi_attention import bi_attention
from .project import project


class LightGlueCrossBlock(nn.Module):
    """Residual block in which the keypoints of two images look at each other.

        s = to_qk(x0) @ to_qk(x1).mT / sqrt(head_dim)           # per head, the same both ways
        m0, m1 = to_out(softmax(s) @ to_v(x1)), to_out(softmax(s.mT) @ to_v(x0))
        x0, x1 = x0 + ffn([x0, m0]), x1 + ffn([x1, m1])

    Args:
        embed_dim: width; divisible by `num_heads`.
        flash: accepted; nothing depends on it.
        bias: of the projections.
        backend: a fusedmm backend name, None for the first that accepts.
    Raises: ValueError, embed_dim not divisible.
    Source: LightGlue, arXiv:2306.13643.
    """

    # On the class, so that an original whose class is exchanged for this one has it too.
    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        flash: bool = False,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                "LightGlueCrossBlock: num_heads: expected a divisor of embed_dim "
                f"{embed_dim}, got {num_heads}"
            )
        self.heads = num_heads
        self.backend = backend
        self.to_qk = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.to_v = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.to_out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.ffn = nn.Sequential(
            nn.Linear(2 * embed_dim, 2 * embed_dim),
            nn.LayerNorm(2 * embed_dim),
            nn.GELU(),
            nn.Linear(2 * embed_dim, embed_dim),
        )

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Exchanges messages.

        Args:
            x0, x1: [B, M, embed_dim], [B, N, embed_dim].
            mask: bool [B, M, N] or [B, 1, M, N], True where both keypoints are real.
        Returns: [x0, x1]; a keypoint that is not real gets the message 0 before `to_out`.
        """
        keep0 = keep1 = None
        if mask is not None:
            pair = mask if mask.dim() == 3 else mask[:, 0]
            keep0, keep1 = pair.any(2), pair.any(1)
        qk0, v0, qk1, v1 = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (x0, x1)
            for t in project(x, self.to_qk, self.to_v)
        )
        m0, m1 = bi_attention(qk0, qk1, v0, v1, mask_x=keep0, mask_y=keep1, backend=self.backend)
        return [self._update(x, m, keep) for x, m, keep in ((x0, m0, keep0), (x1, m1, keep1))]

    def _update(self, x: Tensor, message: Tensor, keep: Tensor | None) -> Tensor:
        message = message.transpose(1, 2).flatten(2)
        if keep is not None:
            message = message * keep[..., None]
        (message,) = project(message, self.to_out)
        (hidden,) = project(torch.cat([x, message], -1), self.ffn[0])
        return x + project(self.ffn[2](self.ffn[1](hidden)), self.ffn[3])[0]
