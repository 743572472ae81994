"""Transformer parts shared by the encoders: a pre-norm residual block, a stack, weight init.

Names follow open_clip (`resblocks.0.attn.in_proj_weight`, `mlp.c_fc`), so its checkpoints map one
to one. Self-attention is torch's own; only what joins two modalities goes through fusedmm.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.nn.co_attention import standard_attention


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection, `softmax(q @ k.T / sqrt(d)) @ v`.

    Args:
        dim: width of tokens in and out.
        heads: number of heads; divides `dim`.
        causal: a token looks at itself and what comes before it only.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"SelfAttention: heads: expected a divisor of {dim}, got {heads}")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, d / H] each
        o = standard_attention(q, k, v, causal=self.causal)
        return self.out_proj(o.transpose(1, 2).reshape(b, n, d))


class ResidualBlock(nn.Module):
    """Pre-norm Transformer block: `x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`."""

    def __init__(
        self, dim: int, heads: int, *, mlp_ratio: float = 4.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, causal=causal)
        self.ln_2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of `layers` residual blocks over [B, N, dim]."""

    def __init__(
        self, dim: int, layers: int, heads: int, *, mlp_ratio: float = 4.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualBlock(dim, heads, mlp_ratio=mlp_ratio, causal=causal) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


def init_transformer(stack: Transformer) -> None:
    """Initialise a stack the way CLIP does: residual branches shrink with depth."""
    layers = len(stack.resblocks)
    for block in stack.resblocks:
        dim = block.ln_1.normalized_shape[0]
        residual_std = dim**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            nn.init.zeros_(linear.bias)


def conv_stem(width: int, patch: int, *, batch_norm: bool = False) -> nn.Sequential:
    """Stride-2 convolutions down to one token per `patch` pixels; learns faster from few pictures.

    Source: Early Convolutions Help Transformers See Better, arXiv:2106.14881.
    """
    depth = patch.bit_length() - 1
    widths = [3, *(max(16, width >> (depth - 1 - i)) for i in range(depth))]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after) if batch_norm else nn.GroupNorm(1, after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 1))
