"""The plain attention layers between two streams: single-head, shared or separate projections.

`CoAttention` runs both directions in one fused call; the single-direction layers use torch's fused
attention, which is the same equation for one side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.co_attention import co_attention
from .masks import keep, masked_softmax
from .project import project


class CoAttention(nn.Module):
    """Single-head co-attention: both streams share one query, one key and one value projection.

        q, k, v = q_linear(t), k_linear(t), v_linear(t)         # for t = x and t = y
        x_fused = softmax(q_x @ k_y.mT / sqrt(dim_k)) @ v_y     # what x gathers from y
        y_fused = softmax(q_y @ k_x.mT / sqrt(dim_k)) @ v_x     # what y gathers from x

    Args:
        dim_q, dim_k, dim_v: widths of q_linear, k_linear and v_linear, each square. Every stream is
            query, key and value at once, so the three are equal.
        dropout: probability on the attention weights, in training.
        backend: a fusedmm backend name, None for the first that accepts. On a GPU widths above 256
            run on "reference", which stores the scores.
    Raises: ValueError, unequal widths.
    Source: ViLBERT's equation with shared weights, arXiv:1908.02265.
    """

    def __init__(
        self,
        dim_q: int,
        dim_k: int,
        dim_v: int,
        *,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not dim_q == dim_k == dim_v:
            raise ValueError(
                "CoAttention: dim_q, dim_k, dim_v: expected one width, since both streams serve as "
                f"query, key and value, got {dim_q}, {dim_k}, {dim_v}"
            )
        self.dim_k = dim_k
        self.dropout = dropout
        self.backend = backend
        self.q_linear = nn.Linear(dim_q, dim_k)
        self.k_linear = nn.Linear(dim_k, dim_k)
        self.v_linear = nn.Linear(dim_v, dim_v)

    def forward(
        self, x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fuses two streams.

        Args:
            x: [B, M, dim], say the text; y: [B, N, dim], say the image.
            mask_x, mask_y: [B, M], [B, N] bool, True = keep this token as a key.
        Returns: (x_fused [B, M, dim], y_fused [B, N, dim]), with text first (txt_fused, img_fused).
        """
        linears = (self.q_linear, self.k_linear, self.v_linear)
        qkv = [p[:, None] for t in (x, y) for p in project(t, *linears)]  # [B, 1, tokens, dim]
        o_x, o_y = co_attention(
            *qkv,
            mask_x=mask_x,
            mask_y=mask_y,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return o_x[:, 0], o_y[:, 0]


class MultimodalAttention(nn.Module):
    """Single-head cross-attention: the image asks, the text answers.

        o = softmax(query(image) @ key(text).mT / sqrt(d_model)) @ value(text)

    Args:
        d_model: width of both streams and of the three projections.
        dropout: probability on the attention weights, in training.
    Source: arXiv:1706.03762 (scaled dot-product attention).
    """

    def __init__(self, d_model: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text gathered for each image token.

        Args:
            image: [B, M, d_model]; text: [B, N, d_model].
            mask: [B, N] bool, True = keep this text token.
        Returns: [B, M, d_model].
        """
        q, k, v = self.query(image), self.key(text), self.value(text)
        p = self.dropout if self.training else 0.0
        mask = keep("MultimodalAttention", mask)
        mask = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=mask, dropout_p=p
        )[:, 0]


class AdditiveAttention(nn.Module):
    """Additive (Bahdanau) attention of queries over keys.

        s = w_v(tanh(W_q(queries)[:, :, None] + W_k(keys)[:, None]))    # [B, M, N]
        o = softmax(s) @ values

    Args:
        dim_q, dim_k: widths of queries and keys.
        dim_hidden: width in which they are added.
        dropout: probability on the attention weights, in training.
    Memory: O(M * N * dim_hidden); the tanh leaves no product to fuse.
    Source: arXiv:1409.0473.
    """

    def __init__(self, dim_q: int, dim_k: int, dim_hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.W_q = nn.Linear(dim_q, dim_hidden, bias=False)
        self.W_k = nn.Linear(dim_k, dim_hidden, bias=False)
        self.w_v = nn.Linear(dim_hidden, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Values gathered for each query.

        Args:
            queries: [B, M, dim_q]; keys: [B, N, dim_k]; values: [B, N, Dv].
            mask: [B, N] bool, True = keep this key.
        Returns: [B, M, Dv]; 0 where no key is kept.
        """
        hidden = torch.tanh(self.W_q(queries)[:, :, None] + self.W_k(keys)[:, None])
        p = masked_softmax(self.w_v(hidden).squeeze(-1), keep("AdditiveAttention", mask))
        return self.dropout(p) @ values
