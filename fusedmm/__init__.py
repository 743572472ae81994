"""Fused bidirectional co-attention and contrastive losses for PyTorch: the public names."""

from .dispatch import use_backend
from .ops.bi_attention import bi_attention
from .ops.co_attention import co_attention
from .ops.contrastive_loss import contrastive_loss
from .ops.sigmoid_loss import sigmoid_loss

__version__ = "0.1.0"
__all__ = ["bi_attention", "co_attention", "contrastive_loss", "sigmoid_loss", "use_backend"]
