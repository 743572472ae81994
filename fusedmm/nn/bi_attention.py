"""GLIP's and Grounding DINO's fusion as modules around `fusedmm.bi_attention` and, where vision's
weights can be absorbed into text, `fusion_attention`.

Parameter names are those of Transformers' Grounding DINO; GLIP's own names load as well. Masks are
bool, True = padding, as in Grounding DINO.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bi_attention import bi_attention
from ..ops.fusion_attention import fusion_attention
from ..ops.linear import linear
from .lazy import LazyMap
from .masks import masked_softmax
from .project import plain, project

# The originals' limit on scores; fp16 ends at 65504.
CLAMP = 50000.0

# Vision tokens per text token from which on text, multiplied by vision's weights in fp32, costs
# less than vision's projections: direct / absorbed took 0.6 to 0.9 at 4 in bf16, 1.0 to 1.2 at 8.
ABSORB_FROM = 8

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

        s = vision_proj(v) @ text_proj(l).mT / sqrt(head_dim)                           # per head
        v_out = out_vision_proj(softmax(s, over text) @ values_text_proj(l))
        l_out = out_text_proj(softmax(s, over vision).mT @ values_vision_proj(v))

    Vision only ever meets weights, so where that takes fewer products (text_tokens * (v_dim -
    head_dim) < v_dim * head_dim), vision has 8 times the tokens of text or more, and on a CPU they
    are multiplied into text instead, in fp32 or wider, and nothing of vision is projected: the same
    function, its gradients too, with a fraction of what is kept for backward. torch.compile and
    torch.export take any number of vision tokens for many. Layers that are more than `nn.Linear`
    (adapters, hooks) are called as they are.

    The original subtracts the largest score of the whole batch and clamps to +-50000: the softmax
    is the same as long as no score lies 50000 below the largest; `exact_clamp` reproduces it. A
    token without a key gives the output bias, not NaN.

    Args:
        v_dim, l_dim: widths of vision and text.
        embed_dim: joint width; divisible by `num_heads`.
        dropout: probability on the attention weights, in training.
        exact_clamp: the original's equation to the letter; stores the scores.
        backend: a fusedmm backend name, None for the first that accepts.
    Raises: ValueError, embed_dim not divisible.
    Source: GLIP, arXiv:2112.03857; Grounding DINO, arXiv:2303.05499.
    """

    # On the class, so that an original whose class is exchanged for this one has them too.
    backend: str | None = None
    output_attentions = False
    exact_clamp = False

    def __init__(
        self,
        v_dim: int,
        l_dim: int,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.1,
        *,
        exact_clamp: bool = False,
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
        self.exact_clamp = exact_clamp
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

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[tuple[Tensor, Tensor | LazyMap | None], tuple[Tensor, Tensor | LazyMap | None]]:
        """Attends both ways.

        Args:
            vision_features: [B, M, v_dim]; text_features: [B, N, l_dim].
            vision_attention_mask, text_attention_mask: [B, M], [B, N] bool, True = padding.
            output_attentions: compute the maps, M x N of memory; default the attribute of that
                name, False: they are computed when read.
        Returns: ((v_out [B, M, v_dim], map), (l_out [B, N, l_dim], map)); the maps, without
            dropout, are [B * H, M, N] and [B * H, N, M], as in the original; None where
            torch.compile or torch.export traces and output_attentions is False.
        """
        x, y = vision_features, text_features
        keep_x, keep_y = (
            None if m is None else ~m.bool() for m in (vision_attention_mask, text_attention_mask)
        )
        attend = self._direct
        if self.exact_clamp:
            attend = self._stored
        elif self._absorbs(x, y):
            attend = self._absorbed
        p = self.dropout if self.training else 0.0
        out_x, out_y = attend(x, y, keep_x, keep_y, p)

        def map_x() -> Tensor:
            return masked_softmax(self._scores(x, y)[0], keep_y).flatten(0, 1)

        def map_y() -> Tensor:
            return masked_softmax(self._scores(x, y)[1], keep_x).flatten(0, 1)

        if self.output_attentions if output_attentions is None else output_attentions:
            return (out_x, map_x()), (out_y, map_y())
        if torch.compiler.is_compiling():
            return (out_x, None), (out_y, None)
        return (out_x, LazyMap(map_x)), (out_y, LazyMap(map_y))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, tokens, head_dim]

    def _merge(self, layer: nn.Module, o: Tensor) -> Tensor:
        return project(o.transpose(1, 2).flatten(2), layer)[0]

    def _direct(self, x, y, keep_x, keep_y, p: float) -> tuple[Tensor, Tensor]:
        qk_x, v_x = map(self._heads, project(x, self.vision_proj, self.values_vision_proj))
        qk_y, v_y = map(self._heads, project(y, self.text_proj, self.values_text_proj))
        o_x, o_y = bi_attention(
            qk_x, qk_y, v_x, v_y,
            mask_x=keep_x, mask_y=keep_y, scale=self.scale, dropout_p=p, backend=self.backend,
        )  # fmt: skip
        return self._merge(self.out_vision_proj, o_x), self._merge(self.out_text_proj, o_y)

    def _absorbs(self, x: Tensor, y: Tensor) -> bool:
        C, d = x.shape[-1], self.head_dim
        if not (C <= d or y.shape[1] * (C - d) < C * d):
            return False
        if not torch.compiler.is_compiling() and x.shape[1] < ABSORB_FROM * y.shape[1]:
            return False
        layers = self.children()
        return x.device.type == "cpu" and all(plain(m) and m.bias is not None for m in layers)

    def _absorbed(self, x, y, keep_x, keep_y, p: float) -> tuple[Tensor, Tensor]:
        """Per head, with q = x @ wq.mT + bq and k, v those of text: s = x @ (k @ wq).mT + k @ bq,
        o = p_x @ (v @ wo.mT), which is summed over heads, and o_y = (p_y @ x) @ wv.mT + bv."""
        dtype = torch.promote_types(y.dtype, torch.float32)

        def weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            w, b = layer.weight.to(dtype), layer.bias.to(dtype)
            return w.unflatten(0, (self.num_heads, -1)), b.unflatten(0, (self.num_heads, -1))

        with torch.autocast(x.device.type, enabled=False):
            text = y.to(dtype)
            key, value = (
                self._heads(linear(text, (m.weight.to(dtype), m.bias.to(dtype))))
                for m in (self.text_proj, self.values_text_proj)
            )  # [B, H, N, d]
            key = key * self.scale
            wq, bq = weights(self.vision_proj)  # [H, d, C], [H, d]
            k, bias = key @ wq, (key @ bq[..., None]).squeeze(-1)
            wo = self.out_vision_proj.weight.to(dtype).unflatten(1, (self.num_heads, -1))
            v = value @ wo.permute(1, 2, 0)  # [B, H, N, C]
        stream = x
        if p:  # a column of ones: its score is the bias, its z what dropout leaves of sum(p_y)
            stream, k, bias = F.pad(x, (0, 1), value=1.0), torch.cat([k, bias[..., None]], -1), None
        o, z = fusion_attention(
            stream, k.to(x.dtype), v.to(x.dtype),
            mask_x=keep_x, mask_y=keep_y, bias=bias, dropout_p=p, backend=self.backend,
        )  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            wv, bv = weights(self.values_vision_proj)
            o_y, bv = (
                z[..., : x.shape[-1]].to(dtype) @ wv.mT,
                bv[:, None],
            )  # [B, H, N, d], [H, 1, d]
            if p:
                bv = z[..., -1:].to(dtype) * bv
            elif keep_x is not None:
                bv = keep_x.any(-1)[:, None, None, None] * bv
            merged = (o_y + bv).transpose(1, 2).flatten(2)
            last = self.out_text_proj
            out_y = linear(merged, (last.weight.to(dtype), last.bias.to(dtype)))
        return o + self.out_vision_proj.bias.to(o.dtype), out_y.to(o.dtype)

    def _scores(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, H, M, N] for softmax over text, and [B, H, N, M] for softmax over vision."""
        q, k = self._heads(self.vision_proj(x) * self.scale), self._heads(self.text_proj(y))
        s = q @ k.mT
        if not self.exact_clamp:
            return s, s.mT
        s = (s - s.max()).clamp(-CLAMP, CLAMP)
        return s, (s.mT - s.mT.amax(-1, keepdim=True)).clamp(-CLAMP, CLAMP)

    def _stored(self, x, y, keep_x, keep_y, p: float) -> tuple[Tensor, Tensor]:
        s_x, s_y = self._scores(x, y)
        p_x, p_y = (
            F.dropout(masked_softmax(s, keep), p) for s, keep in ((s_x, keep_y), (s_y, keep_x))
        )
        o_x = p_x @ self._heads(self.values_text_proj(y))
        o_y = p_y @ self._heads(self.values_vision_proj(x))
        return self._merge(self.out_vision_proj, o_x), self._merge(self.out_text_proj, o_y)


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
