"""LXMERT's cross-modality attention around `fusedmm.co_attention`: both directions, one call.

Parameter names are those of Transformers' LxmertCrossAttentionLayer, which serves both directions
with one set of weights. Masks are additive as there, or bool with True = keep.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.co_attention import co_attention
from .masks import keep_or_bias, probabilities
from .project import project


class LxmertProjections(nn.Module):
    """The query, key and value layers of one attention, and its dropout; holds no equation."""

    def __init__(self, hidden_size: int, num_attention_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)


class LxmertOutput(nn.Module):
    """The layers after attention; holds no equation."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)


class LxmertCrossAttention(nn.Module):
    """Cross-attention with one set of weights for both directions, and a post-norm residual.

        o = softmax(query(a) @ key(b).mT / sqrt(head_dim) + mask) @ value(b)    # per head
        a = LayerNorm(dense(o) + a)

    `forward` is one direction, called as Transformers' LxmertCrossAttentionLayer; `both` is the two
    of them from one fused call.

    Args:
        hidden_size: width of both streams; divisible by `num_attention_heads`.
        attention_dropout, dropout: probabilities on attention weights and on the output.
        backend: a fusedmm backend name, None for the first that accepts; `both` only.
    Raises: ValueError, hidden_size not divisible.
    Source: LXMERT, arXiv:1908.07490.
    """

    # On the class, so that an original whose class is exchanged for this one has it too.
    backend: str | None = None

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        attention_dropout: float = 0.1,
        dropout: float = 0.1,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                "LxmertCrossAttention: num_attention_heads: expected a divisor of hidden_size "
                f"{hidden_size}, got {num_attention_heads}"
            )
        self.backend = backend
        self.att = LxmertProjections(hidden_size, num_attention_heads, attention_dropout)
        self.output = LxmertOutput(hidden_size, dropout)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.att.num_attention_heads, -1)).transpose(1, 2)

    def _finish(self, o: Tensor, residual: Tensor) -> Tensor:
        output = self.output
        dense = project(o.transpose(1, 2).flatten(2), output.dense)[0]
        return output.LayerNorm(output.dropout(dense) + residual)

    def forward(
        self,
        input_tensor: Tensor,
        ctx_tensor: Tensor,
        ctx_att_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """One direction: input_tensor looks at ctx_tensor.

        Args:
            input_tensor: [B, M, hidden_size]; ctx_tensor: [B, N, hidden_size].
            ctx_att_mask: additive [B, 1, 1, N], or bool [B, N] with True = keep.
            output_attentions: also compute the map [B, H, M, N], without dropout.
        Returns: (output [B, M, hidden_size],) and the map if asked for.
        """
        att = self.att
        (q,) = map(self._heads, project(input_tensor, att.query))
        k, v = map(self._heads, project(ctx_tensor, att.key, att.value))
        keep, bias = keep_or_bias(type(self).__name__, ctx_att_mask, q)
        p = att.dropout.p if self.training else 0.0
        mask = bias if keep is None else keep[:, None, None, :]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        out = self._finish(o, input_tensor)
        return (out, probabilities(q, k, keep, bias)) if output_attentions else (out,)

    def both(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both directions: forward(x, y, mask_y, output_attentions), forward(y, x, mask_x)."""
        layers = (self.att.query, self.att.key, self.att.value)
        qkv = [self._heads(p) for t in (x, y) for p in project(t, *layers)]
        keep_x, bias_yx = keep_or_bias(type(self).__name__, mask_x, qkv[0])
        keep_y, bias_xy = keep_or_bias(type(self).__name__, mask_y, qkv[0])
        o_x, o_y = co_attention(
            *qkv, mask_x=keep_x, mask_y=keep_y, bias_xy=bias_xy, bias_yx=bias_yx,
            dropout_p=self.att.dropout.p if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        out_x = (self._finish(o_x, x),)
        if output_attentions:
            out_x += (probabilities(qkv[0], qkv[4], keep_y, bias_xy),)
        return out_x, (self._finish(o_y, y),)
