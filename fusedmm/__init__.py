"""Fused bidirectional co-attention and contrastive losses for PyTorch: the public names."""

from . import nn
from .dispatch import use_backend
from .integrations import patch, unpatch
from .ops.bi_attention import bi_attention
from .ops.co_attention import co_attention
from .ops.contrastive_loss import contrastive_loss
from .ops.dual_softmax_match import dual_softmax_match
from .ops.retrieval_ranks import retrieval_ranks
from .ops.sigmoid_loss import sigmoid_loss
from .ops.similarity_topk import similarity_topk

__version__ = "0.1.0"
__all__ = [
    "bi_attention",
    "co_attention",
    "contrastive_loss",
    "dual_softmax_match",
    "nn",
    "patch",
    "retrieval_ranks",
    "sigmoid_loss",
    "similarity_topk",
    "unpatch",
    "use_backend",
]
