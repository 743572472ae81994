"""BiXT's bidirectional attention of latents and patches around `fusedmm.bi_attention`.

Parameter names are those of the original code (BiXAttn, BiXAttnBlock).
"""

from torch import Tensor, nn

from ..ops.bi_attention import bi_attention
from .bi_attention import DropPath
from .project import project


class BiXAttn(nn.Module):
    """Latents and patches refer to each other through one score matrix.

        r_l, v_l = rv_latents(l);  r_p, v_p = rv_patches(p)     # per head
        s = r_l @ r_p.mT / sqrt(head_dim)
        l_out, p_out = proj_lat(softmax(s) @ v_p), proj_pat(softmax(s.mT) @ v_l)

    Args:
        dim_lat, dim_pat: widths of latents and patches.
        dim_attn: joint width; divisible by `num_heads`.
        rv_bias: whether the projections have a bias.
        attn_drop, proj_drop: dropout on attention weights and on the outputs.
        backend: a fusedmm backend name, None for the first that accepts.
    Raises: ValueError, dim_attn not divisible.
    Source: BiXT, arXiv:2402.12138.
    """

    def __init__(
        self,
        dim_lat: int,
        dim_pat: int,
        dim_attn: int,
        num_heads: int = 8,
        rv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if dim_attn % num_heads:
            raise ValueError(
                f"BiXAttn: num_heads: expected a divisor of dim_attn {dim_attn}, got {num_heads}"
            )
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.backend = backend
        self.rv_latents = nn.Linear(dim_lat, 2 * dim_attn, bias=rv_bias)
        self.rv_patches = nn.Linear(dim_pat, 2 * dim_attn, bias=rv_bias)
        self.proj_lat = nn.Linear(dim_attn, dim_lat)
        self.proj_drop_lat = nn.Dropout(proj_drop)
        self.proj_pat = nn.Linear(dim_attn, dim_pat)
        self.proj_drop_pat = nn.Dropout(proj_drop)

    def forward(self, x_latents: Tensor, x_patches: Tensor) -> tuple[Tensor, Tensor]:
        """[B or 1, M, dim_lat], [B, N, dim_pat] -> ([B, M, dim_lat], [B, N, dim_pat]); one set of
        latents serves the whole batch."""
        latents, patches = (
            project(x, layer)[0].unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            for x, layer in ((x_latents, self.rv_latents), (x_patches, self.rv_patches))
        )
        r_l, v_l = latents.expand(-1, patches.shape[1], -1, -1, -1)
        r_p, v_p = patches
        l_out, p_out = bi_attention(
            r_l, r_p, v_l, v_p,
            dropout_p=self.attn_drop if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        (l_out,) = project(l_out.transpose(1, 2).flatten(2), self.proj_lat)
        (p_out,) = project(p_out.transpose(1, 2).flatten(2), self.proj_pat)
        return self.proj_drop_lat(l_out), self.proj_drop_pat(p_out)


class _Mlp(nn.Module):
    """fc2(drop(gelu(fc1(x)))), with timm's names."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop1(self.act(project(x, self.fc1)[0]))
        return self.drop2(project(hidden, self.fc2)[0])


class BiXAttnBlock(nn.Module):
    """Pre-norm residual block around `BiXAttn`, then a feed-forward per stream.

        dl, dp = attn(norm1_lat(l), norm1_pat(p))
        l, p = l + dl, p + dp
        l, p = l + mlp_lat(norm2_lat(l)), p + mlp_pat(norm2_pat(p))

    Args:
        dim_lat, dim_pat, dim_attn, num_heads, rv_bias, attn_drop, backend: see `BiXAttn`.
        drop: dropout on the outputs of attention and feed-forwards.
        drop_path: probability of dropping a sample's branch, in training.
        lat_mlp_ratio, pat_mlp_ratio: hidden width of the feed-forwards.
    Source: BiXT, arXiv:2402.12138; its layer scale, off there by default, is left out.
    """

    def __init__(
        self,
        dim_lat: int,
        dim_pat: int,
        dim_attn: int,
        num_heads: int,
        rv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        lat_mlp_ratio: float = 4.0,
        pat_mlp_ratio: float = 4.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1_lat = nn.LayerNorm(dim_lat)
        self.norm1_pat = nn.LayerNorm(dim_pat)
        self.attn = BiXAttn(
            dim_lat, dim_pat, dim_attn, num_heads, rv_bias, attn_drop, drop, backend=backend
        )
        self.drop_path = DropPath(drop_path)
        self.norm2_lat = nn.LayerNorm(dim_lat)
        self.mlp_lat = _Mlp(dim_lat, int(dim_lat * lat_mlp_ratio), drop)
        self.norm2_pat = nn.LayerNorm(dim_pat)
        self.mlp_pat = _Mlp(dim_pat, int(dim_pat * pat_mlp_ratio), drop)

    def forward(self, x_latents: Tensor, x_patches: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes as in `BiXAttn.forward`."""
        dl, dp = self.attn(self.norm1_lat(x_latents), self.norm1_pat(x_patches))
        latents, patches = x_latents + self.drop_path(dl), x_patches + self.drop_path(dp)
        return (
            latents + self.drop_path(self.mlp_lat(self.norm2_lat(latents))),
            patches + self.drop_path(self.mlp_pat(self.norm2_pat(patches))),
        )
