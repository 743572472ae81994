"""BERT parts shared by the fusion encoders: layers, embeddings, a decoder layer, the word head.

Parameter names are BERT's. Self-attention is torch's own; what joins two modalities both ways goes
through fusedmm in the models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.nn.co_attention import BertIntermediate, BertOutput, standard_attention


class BertSelfAttention(nn.Module):
    """`query`, `key`, `value` and scaled dot-product attention within a stream, or into another."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(
                f"BertSelfAttention: heads: expected a divisor of {hidden_size}, got {heads}"
            )
        self.heads = heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None,
        *,
        causal: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """[B, N, d] looking at itself, or at `context` [B, M, d]; `keep` is over what is seen."""
        context = x if context is None else context
        q, k, v = (
            f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, t in ((self.query, x), (self.key, context), (self.value, context))
        )
        o = standard_attention(q, k, v, keep=keep, causal=causal)
        return o.transpose(1, 2).flatten(2)


class BertAttention(nn.Module):
    """Self-attention with its output projection and residual."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = BertSelfAttention(hidden_size, heads)
        self.output = BertOutput(hidden_size, hidden_size, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None,
        *,
        causal: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        return self.output(self.self(x, keep, causal=causal, context=context), x)


class BertLayer(nn.Module):
    """A post-norm BERT layer."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = BertAttention(hidden_size, heads, dropout)
        self.intermediate = BertIntermediate(hidden_size, 4 * hidden_size)
        self.output = BertOutput(4 * hidden_size, hidden_size, dropout=dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.attention(x, keep)
        return self.output(self.intermediate(x), x)


class TextEmbeddings(nn.Module):
    """Word plus position, normalised."""

    def __init__(self, vocab_size: int, max_position: int, hidden_size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings = nn.Embedding(max_position, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        position = self.position_embeddings.weight[: tokens.shape[1]]
        return self.LayerNorm(self.word_embeddings(tokens) + position)


class ImageEmbeddings(nn.Module):
    """Region feature plus region location (x, y, width, height in 0..1), normalised."""

    def __init__(self, feature_size: int, hidden_size: int) -> None:
        super().__init__()
        self.image_embeddings = nn.Linear(feature_size, hidden_size)
        self.image_location_embeddings = nn.Linear(4, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        return self.LayerNorm(
            self.image_embeddings(features) + self.image_location_embeddings(boxes)
        )


class BertDecoderLayer(nn.Module):
    """Causal self-attention, then attention to the other modality, then a feed-forward."""

    def __init__(self, hidden_size: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = BertAttention(hidden_size, heads, dropout)
        self.crossattention = BertAttention(hidden_size, heads, dropout)
        self.intermediate = BertIntermediate(hidden_size, 4 * hidden_size)
        self.output = BertOutput(4 * hidden_size, hidden_size, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, N, d], [B, M, d] -> [B, N, d]."""
        x = self.attention(x, None, causal=True)
        x = self.crossattention(x, None, context=context)
        return self.output(self.intermediate(x), x)


class WordHead(nn.Module):
    """Hidden states to logits over words, through the transposed word embedding."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        width = words.embedding_dim
        self.transform = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12)
        )
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        """[..., width] -> [..., vocab_size]."""
        return F.linear(self.transform(hidden), words.weight, self.bias)


def init_bert(model: nn.Module, *, skip: tuple[str, ...] = ()) -> None:
    """Linear weights of std 1 / sqrt(width), embeddings of 0.02; modules below `skip` are left.

    BERT's 0.02 suits a width of 768; narrower layers would start with hardly a signal, and a
    matching head, a product of two of them, with next to no gradient.
    """
    for name, module in model.named_modules():
        if name.startswith(skip) and skip:
            continue
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
