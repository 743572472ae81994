"""What the original ViLBERT code calls: its BertBiAttention takes two more arguments and returns a
third value, and keeps dropout in modules of its own."""

from torch import Tensor

from .. import nn
from ..nn.lazy import LazyMap


class BertBiAttention(nn.BertBiAttention):
    """The module of vilbert.vilbert with both directions in one call."""

    attention_backend: str | None = None
    visualization = False

    @property
    def dropout(self) -> float:
        """Of both directions."""
        p1, p2 = self.dropout1.p, self.dropout2.p
        if p1 != p2:
            raise NotImplementedError(
                f"BertBiAttention: dropout2: expected {p1} as dropout1, got {p2}"
            )
        return p1

    def forward(
        self,
        input_tensor1: Tensor,
        attention_mask1: Tensor,
        input_tensor2: Tensor,
        attention_mask2: Tensor,
        co_attention_mask: Tensor | None = None,
        use_co_attention_mask: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, LazyMap] | None]:
        """(context_1, context_2, what visualisation asks for, computed when read). Both
        co-attention arguments go unused, as in the original."""
        streams = (input_tensor1, attention_mask1, input_tensor2, attention_mask2)
        contexts = super().forward(*streams)
        if not self.visualization:
            return *contexts, None

        def heads(layer: str, x: Tensor) -> LazyMap:
            return LazyMap(lambda: self._heads(getattr(self, layer)(x)))

        return *contexts, {
            "attn1": LazyMap(lambda: self.attention_maps(*streams)[0]),
            "queries1": heads("query2", input_tensor2),
            "keys1": heads("key1", input_tensor1),
            "attn2": LazyMap(lambda: self.attention_maps(*streams)[1]),
            "querues2": heads("query1", input_tensor1),  # spelled so there
            "keys2": heads("key2", input_tensor2),
        }
