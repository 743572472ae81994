"""ViLBERT's co-attention block as modules around `fusedmm.co_attention`.

Parameter names are those of the original vilbert code, so its checkpoints load with strict=True.
Masks are bool, True = keep, or additive [B, 1, 1, tokens] as in the original. Left out: dynamic
attention and the unused co_attention_mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.ops.co_attention import co_attention

from .masks import keep_or_bias, probabilities
from .project import project

STANDARD = "standard"
# Below this many scores a head, half precision on a CPU: softmax(q @ k.T) @ v beats torch's fused
# kernel, whose backward took 81 ms against 13 at 128x4x65x65 D=32 (AMD EPYC, 1 thread, torch 2.14).
_SHORT = 128 * 128


def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention without fusedmm, the faster of torch's fused call and the plain equation.

        o = softmax(q @ k.mT / sqrt(D)) @ v      # keys where keep is False, or later ones, left out

    Args:
        q, k, v: [B, H, M, D], [B, H, N, D], [B, H, N, Dv].
        keep: [B, N] bool; causal: query i sees keys 0..i only. One of the two at most.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32 or q.shape[-2] * k.shape[-2] > _SHORT:
        mask = None if keep is None else keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        keep = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~keep, float("-inf"))
    elif keep is not None:
        s = s.masked_fill(~keep[:, None, None, :], float("-inf"))
    return torch.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _call(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


class BertBiAttention(nn.Module):
    """Each stream's queries look at the other stream's keys and values, both ways in one call.

        context_1 = softmax(query2(x2) @ key1(x1).T / sqrt(d)) @ value1(x1)    # stream 2 looks at 1
        context_2 = softmax(query1(x1) @ key2(x2).T / sqrt(d)) @ value2(x2)    # stream 1 looks at 2

    Args:
        v_hidden_size, hidden_size: widths of stream 1 (vision) and stream 2 (text).
        bi_hidden_size: width of the joint space; divisible by `num_attention_heads`.
        dropout: probability on the attention weights, in training.
        attention_backend: a fusedmm backend name, None for the first that accepts, or "standard":
            two calls of `standard_attention`.
    Source: ViLBERT, arXiv:1908.02265.
    """

    def __init__(
        self,
        v_hidden_size: int,
        hidden_size: int,
        bi_hidden_size: int,
        num_attention_heads: int,
        *,
        dropout: float = 0.0,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        if bi_hidden_size % num_attention_heads:
            raise ValueError(
                f"BertBiAttention: num_attention_heads: expected a divisor of bi_hidden_size "
                f"{bi_hidden_size}, got {num_attention_heads}"
            )
        self.num_attention_heads = num_attention_heads
        self.dropout = dropout
        self.attention_backend = attention_backend
        self.query1 = nn.Linear(v_hidden_size, bi_hidden_size)
        self.key1 = nn.Linear(v_hidden_size, bi_hidden_size)
        self.value1 = nn.Linear(v_hidden_size, bi_hidden_size)
        self.query2 = nn.Linear(hidden_size, bi_hidden_size)
        self.key2 = nn.Linear(hidden_size, bi_hidden_size)
        self.value2 = nn.Linear(hidden_size, bi_hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)  # [B, H, n, D]

    def forward(
        self, x1: Tensor, mask1: Tensor | None, x2: Tensor, mask2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[B, M, v_hidden], keep [B, M], [B, N, hidden], keep [B, N] -> (context_1 [B, N, bi],
        context_2 [B, M, bi]), in the order the original returns them. Masks may be additive."""
        call = _call if self.attention_backend == STANDARD else project
        q1, k1, v1 = map(self._heads, call(x1, self.query1, self.key1, self.value1))
        q2, k2, v2 = map(self._heads, call(x2, self.query2, self.key2, self.value2))
        p = self.dropout if self.training else 0.0
        if self.attention_backend == STANDARD:
            if p:
                raise NotImplementedError(
                    f"BertBiAttention: attention_backend='standard': expected dropout 0, got {p}"
                )
            if any(m is not None and m.dtype != torch.bool for m in (mask1, mask2)):
                raise ValueError(
                    "BertBiAttention: mask: expected bool with attention_backend='standard', got "
                    "an additive one"
                )
            o1 = standard_attention(q1, k2, v2, keep=mask2)
            o2 = standard_attention(q2, k1, v1, keep=mask1)
        else:
            keep1, bias1 = keep_or_bias(type(self).__name__, mask1, q1)
            keep2, bias2 = keep_or_bias(type(self).__name__, mask2, q1)
            o1, o2 = co_attention(
                q1, k1, v1, q2, k2, v2,
                mask_x=keep1, mask_y=keep2, bias_xy=bias2, bias_yx=bias1,
                dropout_p=p, backend=self.attention_backend,
            )  # fmt: skip
        return o2.transpose(1, 2).flatten(2), o1.transpose(1, 2).flatten(2)

    def attention_maps(
        self, x1: Tensor, mask1: Tensor | None, x2: Tensor, mask2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The probabilities forward() never stores: ([B, H, N, M] 2 looks at 1, [B, H, M, N])."""
        q1, k1, q2, k2 = (
            self._heads(f(x))
            for f, x in ((self.query1, x1), (self.key1, x1), (self.query2, x2), (self.key2, x2))
        )

        return (
            probabilities(q2, k1, *keep_or_bias(type(self).__name__, mask1, q2)),
            probabilities(q1, k2, *keep_or_bias(type(self).__name__, mask2, q1)),
        )


class BertBiOutput(nn.Module):
    """Projects each context back to its stream, adds the residual, normalises.

    `q_dense1`, `q_dense2` take no part in the forward, in the original neither; they keep its keys.
    """

    def __init__(
        self,
        v_hidden_size: int,
        hidden_size: int,
        bi_hidden_size: int,
        *,
        dropout: float = 0.0,
        call: Callable = project,
    ) -> None:
        super().__init__()
        self.call = call
        self.dense1 = nn.Linear(bi_hidden_size, v_hidden_size)
        self.LayerNorm1 = nn.LayerNorm(v_hidden_size, eps=1e-12)
        self.dropout1 = nn.Dropout(dropout)
        self.q_dense1 = nn.Linear(bi_hidden_size, v_hidden_size)
        self.dense2 = nn.Linear(bi_hidden_size, hidden_size)
        self.LayerNorm2 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout2 = nn.Dropout(dropout)
        self.q_dense2 = nn.Linear(bi_hidden_size, hidden_size)

    def forward(self, c1: Tensor, x1: Tensor, c2: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = self.LayerNorm1(self.dropout1(self.call(c1, self.dense1)[0]) + x1)
        y2 = self.LayerNorm2(self.dropout2(self.call(c2, self.dense2)[0]) + x2)
        return y1, y2


class BertIntermediate(nn.Module):
    """`gelu(dense(x))`, the first half of a BERT feed-forward."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, call: Callable = _call) -> None:
        super().__init__()
        self.call = call
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.call(x, self.dense)[0])


class BertOutput(nn.Module):
    """`LayerNorm(dense(h) + x)`, the second half of a BERT feed-forward or attention."""

    def __init__(
        self,
        intermediate_size: int,
        hidden_size: int,
        *,
        dropout: float = 0.0,
        call: Callable = _call,
    ) -> None:
        super().__init__()
        self.call = call
        self.dense = nn.Linear(intermediate_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.call(hidden, self.dense)[0]) + x)


class BertConnectionLayer(nn.Module):
    """One co-attention block: bidirectional attention, residual, then a feed-forward per stream.

    Args:
        v_hidden_size, v_intermediate_size: widths of stream 1 (vision).
        hidden_size, intermediate_size: widths of stream 2 (text).
        bi_hidden_size, num_attention_heads: the joint space.
        dropout: probability on hidden states; `attention_dropout` on attention weights.
        attention_backend: see `BertBiAttention`.
    Source: ViLBERT, arXiv:1908.02265.
    """

    def __init__(
        self,
        v_hidden_size: int,
        v_intermediate_size: int,
        hidden_size: int,
        intermediate_size: int,
        bi_hidden_size: int,
        num_attention_heads: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.biattention = BertBiAttention(
            v_hidden_size,
            hidden_size,
            bi_hidden_size,
            num_attention_heads,
            dropout=attention_dropout,
            attention_backend=attention_backend,
        )
        call = _call if attention_backend == STANDARD else project
        self.biOutput = BertBiOutput(
            v_hidden_size, hidden_size, bi_hidden_size, dropout=dropout, call=call
        )
        self.v_intermediate = BertIntermediate(v_hidden_size, v_intermediate_size, call=call)
        self.v_output = BertOutput(v_intermediate_size, v_hidden_size, dropout=dropout, call=call)
        self.t_intermediate = BertIntermediate(hidden_size, intermediate_size, call=call)
        self.t_output = BertOutput(intermediate_size, hidden_size, dropout=dropout, call=call)

    @classmethod
    def from_config(cls, config: object, **changes: object) -> BertConnectionLayer:
        """The layer of a config of the original code (`BertConfig` of vilbert), with its names:
        v_hidden_size, v_intermediate_size, hidden_size, intermediate_size, bi_hidden_size,
        bi_num_attention_heads, hidden_dropout_prob, attention_probs_dropout_prob.

        Raises: NotImplementedError, a vision stream with dropout or activation of its own.
        """
        for ours, theirs in (("hidden_dropout_prob", "v_hidden_dropout_prob"),
                             ("attention_probs_dropout_prob", "v_attention_probs_dropout_prob"),
                             ("hidden_act", "v_hidden_act")):  # fmt: skip
            a, b = getattr(config, ours), getattr(config, theirs, getattr(config, ours))
            if a != b:
                raise NotImplementedError(
                    f"BertConnectionLayer: config: expected {theirs} as {ours} {a}, got {b}"
                )
        if config.hidden_act != "gelu":
            raise NotImplementedError(
                f"BertConnectionLayer: config: expected hidden_act 'gelu', got {config.hidden_act}"
            )
        return cls(
            config.v_hidden_size,
            config.v_intermediate_size,
            config.hidden_size,
            config.intermediate_size,
            config.bi_hidden_size,
            config.bi_num_attention_heads,
            **{
                "dropout": config.hidden_dropout_prob,
                "attention_dropout": config.attention_probs_dropout_prob,
                **changes,
            },
        )

    def forward(
        self, x1: Tensor, mask1: Tensor | None, x2: Tensor, mask2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both streams after one exchange: ([B, M, v_hidden], [B, N, hidden])."""
        context1, context2 = self.biattention(x1, mask1, x2, mask2)
        y1, y2 = self.biOutput(context2, x1, context1, x2)
        return (
            self.v_output(self.v_intermediate(y1), y1),
            self.t_output(self.t_intermediate(y2), y2),
        )
