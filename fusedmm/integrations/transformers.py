"""What needs Transformers' own classes: the LXMERT layer, which calls its attention twice."""

from torch import Tensor
from transformers.models.lxmert import modeling_lxmert

from ..nn import LxmertCrossAttention


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
