"""Modules whose parameters carry the names of the model layers they replace."""

from .attention import AdditiveAttention, CoAttention, MultimodalAttention
from .bi_attention import BiAttentionBlock, BiMultiHeadAttention
from .bixt import BiXAttn, BiXAttnBlock
from .co_attention import BertBiAttention, BertConnectionLayer
from .fusion import AttentionFusion, ConcatFusion, GatedFusion
from .lightglue import LightGlueCrossBlock
from .losses import ClipLoss, SigLipLoss
from .lxmert import LxmertCrossAttention

__all__ = [
    "AdditiveAttention",
    "AttentionFusion",
    "BertBiAttention",
    "BertConnectionLayer",
    "BiAttentionBlock",
    "BiMultiHeadAttention",
    "BiXAttn",
    "BiXAttnBlock",
    "ClipLoss",
    "CoAttention",
    "ConcatFusion",
    "GatedFusion",
    "LightGlueCrossBlock",
    "LxmertCrossAttention",
    "MultimodalAttention",
    "SigLipLoss",
]
