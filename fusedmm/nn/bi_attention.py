"""GLIP's and Grounding DINO's fusion as modules around `fusedmm.bi_attention`.

Parameter names are those of Transformers' Grounding DINO; GLIP's own names load as well. Masks are
bool, True = padding, as in Grounding DINO. Left out: absorbing the projections into the scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bi_attention import bi_attention
from .masks import masked_softmax

# The limit on scores in all three models; fp16 ends at 65504.
CLAMP = 50000.0

# Names in GLIP's code and IDEA's Grounding DINO -> names here.
_ATTENTION_KEYS = {
    "v_proj": "vision_proj",
    "l_proj": "text_proj",
    "values_v_proj": "values_vision_proj",
    "values_l_proj": "values_text_proj",
    "out_v_proj": "out_vision_proj",
    "out_l_proj": "out_text_proj",
}
_BLOCK_KEYS = {
    "layer_norm_v": "layer_norm_vision",
    "layer_norm_l": "layer_norm_text",
    "gamma_v": "vision_param",
    "gamma_l": "text_param",
}


def _rename(state_dict: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    """Moves keys `prefix + old[.*]` to `prefix + new[.*]`, in place."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        head, dot, tail = key.removeprefix(prefix).partition(".")
        if head in names:
            state_dict[prefix + names[head] + dot + tail] = state_dict.pop(key)


class BiMultiHeadAttention(nn.Module):
    """Multi-head attention both ways between vision and text, from one score matrix.

        s = clamp(vision_proj(v) @ text_proj(l).mT / sqrt(head_dim), -50000, 50000)     # per head
        v_out = out_vision_proj(softmax(s, over text) @ values_text_proj(l))
        l_out = out_text_proj(softmax(s, over vision).mT @ values_vision_proj(v))

    The original subtracts the largest score before it clamps; the softmax is the same as long as no
    score lies 50000 below the largest. A token without a key gives the output bias, not NaN.

    Args:
        v_dim, l_dim: widths of vision and text.
        embed_dim: joint width; divisible by `num_heads`.
        dropout: probability on the attention weights, in training.
        backend: a fusedmm backend name, None for the first that accepts.
    Raises: ValueError, embed_dim not divisible.
    Source: GLIP, arXiv:2112.03857; Grounding DINO, arXiv:2303.05499.
    """

    # On the class, so that an original whose class is exchanged for this one has them too.
    backend: str | None = None
    output_attentions = False

    def __init__(
        self,
        v_dim: int,
        l_dim: int,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.1,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                "BiMultiHeadAttention: num_heads: expected a divisor of embed_dim "
                f"{embed_dim}, got {num_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.dropout = dropout
        self.backend = backend
        self.vision_proj = nn.Linear(v_dim, embed_dim)
        self.text_proj = nn.Linear(l_dim, embed_dim)
        self.values_vision_proj = nn.Linear(v_dim, embed_dim)
        self.values_text_proj = nn.Linear(l_dim, embed_dim)
        self.out_vision_proj = nn.Linear(embed_dim, v_dim)
        self.out_text_proj = nn.Linear(embed_dim, l_dim)
        for module in self.children():
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        _rename(state_dict, prefix, _ATTENTION_KEYS)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, tokens, head_dim]

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Attends both ways.

        Args:
            vision_features: [B, M, v_dim]; text_features: [B, N, l_dim].
            vision_attention_mask, text_attention_mask: [B, M], [B, N] bool, True = padding.
            output_attentions: also compute the maps, M x N of memory; default the attribute of that
                name, False.
        Returns: ((v_out [B, M, v_dim], map), (l_out [B, N, l_dim], map)); the maps, without
            dropout, are [B * H, M, N] and [B * H, N, M], as in the original, or None.
        """
        qk_v = self._heads(self.vision_proj(vision_features))
        qk_l = self._heads(self.text_proj(text_features))
        v_v = self._heads(self.values_vision_proj(vision_features))
        v_l = self._heads(self.values_text_proj(text_features))
        keep_v, keep_l = (
            None if m is None else ~m.bool() for m in (vision_attention_mask, text_attention_mask)
        )
        o_v, o_l = bi_attention(
            qk_v, qk_l, v_v, v_l,
            mask_x=keep_v, mask_y=keep_l, clamp=CLAMP, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        map_v = map_l = None
        if self.output_attentions if output_attentions is None else output_attentions:
            s = (qk_v * self.scale @ qk_l.mT).clamp(-CLAMP, CLAMP)
            map_v = masked_softmax(s, keep_l).flatten(0, 1)
            map_l = masked_softmax(s.mT, keep_v).flatten(0, 1)
        out_v = self.out_vision_proj(o_v.transpose(1, 2).flatten(2))
        out_l = self.out_text_proj(o_l.transpose(1, 2).flatten(2))
        return (out_v, map_v), (out_l, map_l)


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample with probability p, in training.

    Source: stochastic depth, arXiv:1603.09382.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, t: Tensor) -> Tensor:
        """[B, ...] -> [B, ...], scaled by 1 / (1 - p) where kept."""
        if self.p == 0.0 or not self.training:
            return t
        return t * F.dropout(t.new_ones(t.shape[0], *[1] * (t.dim() - 1)), self.p)


class BiAttentionBlock(nn.Module):
    """Pre-norm residual block around `BiMultiHeadAttention`, scaled per channel.

        dv, dl = attn(layer_norm_vision(v), layer_norm_text(l))
        v, l = layer_norm_vision(v) + vision_param * dv, layer_norm_text(l) + text_param * dl

    Args:
        v_dim, l_dim, embed_dim, num_heads, dropout, backend: see `BiMultiHeadAttention`.
        drop_path: probability of dropping a sample's branch, in training.
        init_values: first value of vision_param and text_param.
    Source: GLIP, arXiv:2112.03857; Grounding DINO, arXiv:2303.05499.
    """

    def __init__(
        self,
        v_dim: int,
        l_dim: int,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        init_values: float = 1e-4,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.layer_norm_vision = nn.LayerNorm(v_dim)
        self.layer_norm_text = nn.LayerNorm(l_dim)
        self.attn = BiMultiHeadAttention(
            v_dim, l_dim, embed_dim, num_heads, dropout, backend=backend
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.vision_param = nn.Parameter(init_values * torch.ones(v_dim))
        self.text_param = nn.Parameter(init_values * torch.ones(l_dim))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        _rename(state_dict, prefix, _BLOCK_KEYS)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        attention_mask_vision: Tensor | None = None,
        attention_mask_text: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """((vision [B, M, v_dim], map), (text [B, N, l_dim], map)); arguments and maps as in
        `BiMultiHeadAttention.forward`, masks True = padding."""
        v, t = self.layer_norm_vision(vision_features), self.layer_norm_text(text_features)
        (dv, map_v), (dt, map_t) = self.attn(
            v, t, attention_mask_vision, attention_mask_text, output_attentions
        )
        v = v + self.drop_path(self.vision_param * dv)
        t = t + self.drop_path(self.text_param * dt)
        return (v, map_v), (t, map_t)
