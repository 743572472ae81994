"""What needs Transformers' own classes: layers that call their attention twice, a cross attention
of image pairs, and the attention function `attn_implementation="fusedmm"`.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.lightglue import modeling_lightglue
from transformers.models.lxmert import modeling_lxmert

from ..nn import LxmertCrossAttention
from ..nn.masks import keep_or_bias
from ..nn.project import project
from ..ops.attention import attention
from ..ops.co_attention import co_attention


class LxmertXLayer(modeling_lxmert.LxmertXLayer):
    """Transformers' cross-modality layer with both directions of its attention in one call."""

    def cross_att(
        self,
        lang_input: Tensor,
        lang_attention_mask: Tensor | None,
        visual_input: Tensor,
        visual_attention_mask: Tensor | None,
        output_x_attentions: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """((language,) and its map if asked for, (vision,)), arguments as in the original."""
        attention = self.visual_attention
        args = (lang_input, visual_input, lang_attention_mask, visual_attention_mask)
        if isinstance(attention, LxmertCrossAttention):
            return attention.both(*args, output_attentions=output_x_attentions)
        return super().cross_att(
            lang_input, lang_attention_mask, visual_input, visual_attention_mask,
            output_x_attentions,
        )  # fmt: skip


class LightGlueCrossAttention(modeling_lightglue.LightGlueAttention):
    """The cross attention of a LightGlueTransformerLayer, whose batch holds the images of a pair
    one after the other and whose encoder_hidden_states are those images exchanged."""

    backend: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [2 B, n, width], None); with output_attentions the original's."""
        heads = self.config.num_attention_heads == self.config.num_key_value_heads
        if encoder_hidden_states is None or kwargs.get("output_attentions") or not heads:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, encoder_hidden_states,
                encoder_attention_mask, **kwargs,
            )  # fmt: skip
        qkv = [
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [2 B, H, n, D]
            for t in project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        ]
        keep, bias = keep_or_bias(type(self).__name__, encoder_attention_mask, qkv[0])
        first, second = ([t[side::2] for t in qkv] for side in (0, 1))
        o = co_attention(
            *first, *second,
            mask_x=None if keep is None else keep[1::2],
            mask_y=None if keep is None else keep[0::2],
            bias_xy=None if bias is None else bias[0::2],
            bias_yx=None if bias is None else bias[1::2],
            scale=self.scaling, dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )  # fmt: skip
        joined = torch.stack(o, 1).flatten(0, 1).transpose(1, 2).flatten(2)
        return project(joined, self.o_proj)[0], None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`fusedmm.ops.attention` as Transformers' models call their attention.

    What it lacks goes to "sdpa": causal attention without a mask, grouped keys and values, caches.

    Args:
        query, key, value: [B, H, M, D], [B, H, N, D], [B, H, N, Dv].
        attention_mask: additive or bool, True = keep, broadcastable to [B, H, M, N].
    Returns: (output [B, M, H, Dv], None); there are no maps.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extras = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    grouped = query.shape[1] != key.shape[1] or getattr(module, "num_key_value_groups", 1) > 1
    if (causal and attention_mask is None and query.shape[2] > 1) or grouped or extras:
        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    keep, bias = None, attention_mask
    if bias is not None and bias.dtype == torch.bool:
        if bias.shape == (query.shape[0], 1, 1, key.shape[2]):
            keep, bias = bias[:, 0, 0], None
        else:
            zero = query.new_zeros(()).expand(bias.shape)
            bias = zero.masked_fill(~bias, torch.finfo(query.dtype).min)
    o = attention(query, key, value, mask=keep, bias=bias, scale=scaling, dropout_p=dropout)
    return o.transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes `attn_implementation="fusedmm"` known to Transformers' models."""
    AttentionInterface.register("fusedmm", attention_forward)
    AttentionMaskInterface.register("fusedmm", sdpa_mask)
