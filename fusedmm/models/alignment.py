"""Two sets of unimodal embeddings brought together: Procrustes and CCA in closed form, deep CCA.

The closed forms need no step of training; deep CCA trains two small networks on the same
correlation. Left out: kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DeepCCAConfig:
    """Sizes of the two networks."""

    dim_x: int = 128
    dim_y: int = 128
    hidden: int = 256
    dim_out: int = 64
    dropout: float = 0.5


def inverse_root(covariance: Tensor) -> Tensor:
    """covariance^(-1/2) of a positive definite [D, D]."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=1e-8).rsqrt()) @ vectors.T


def covariances(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """(C_xx, C_yy, C_xy) of centred rows; `ridge` times the mean variance is added to the first
    two diagonals."""
    n = len(x) - 1
    c_xx, c_yy = x.T @ x / n, y.T @ y / n
    eye = [torch.eye(len(c), dtype=x.dtype, device=x.device) for c in (c_xx, c_yy)]
    c_xx = c_xx + ridge * c_xx.diagonal().mean() * eye[0]
    c_yy = c_yy + ridge * c_yy.diagonal().mean() * eye[1]
    return c_xx, c_yy, x.T @ y / n


def cca(x: Tensor, y: Tensor, dim: int, *, ridge: float = 1e-2) -> tuple[Tensor, Tensor, Tensor]:
    """Linear maps under which paired rows correlate most.

        T = C_xx^(-1/2) @ C_xy @ C_yy^(-1/2) = U @ diag(rho) @ V.T
        A, B = C_xx^(-1/2) @ U[:, :dim], C_yy^(-1/2) @ V[:, :dim]

    Args:
        x: [N, D], y: [N, E], centred. dim: canonical directions to keep. ridge: see `covariances`.
    Returns: (A [D, dim], B [E, dim], rho [dim]).
    Source: Hotelling, Relations between two sets of variates, Biometrika 1936.
    """
    c_xx, c_yy, c_xy = covariances(x, y, ridge)
    root_x, root_y = inverse_root(c_xx), inverse_root(c_yy)
    u, rho, vh = torch.linalg.svd(root_x @ c_xy @ root_y)
    return root_x @ u[:, :dim], root_y @ vh[:dim].T, rho[:dim]


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The rotation R with the least |x @ R - y|: [N, D], [N, D] -> [D, D], R.T @ R = 1.

        U @ diag(s) @ V.T = x.T @ y;  R = U @ V.T

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    u, _, vh = torch.linalg.svd(x.T @ y)
    return u @ vh


class Tower(nn.Module):
    """A linear map plus a small network beside it: [N, dim] -> [N, dim_out]."""

    def __init__(self, dim: int, config: DeepCCAConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, config.dim_out)
        self.deep = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(dim, config.hidden), nn.GELU(),
            nn.Dropout(config.dropout), nn.Linear(config.hidden, config.dim_out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.deep(x)


class DeepCCA(nn.Module):
    """Two networks trained to maximise the total canonical correlation of their outputs.

        loss = -sum of singular values of C_xx^(-1/2) @ C_xy @ C_yy^(-1/2)

    Args:
        config: sizes.
    Source: Deep Canonical Correlation Analysis (Andrew et al., ICML 2013).
    """

    def __init__(self, config: DeepCCAConfig) -> None:
        super().__init__()
        self.config = config
        self.x, self.y = Tower(config.dim_x, config), Tower(config.dim_y, config)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """[N, dim_x], [N, dim_y] -> [N, dim_out] each."""
        return self.x(x), self.y(y)

    def loss(self, x: Tensor, y: Tensor, *, ridge: float = 1e-2) -> Tensor:
        """Minus the mean canonical correlation of a batch, in -1..0; batches need more rows than
        dim_out. In fp32: it inverts covariances."""
        with torch.autocast(x.device.type, enabled=False):
            a, b = self(x.float(), y.float())
            c_aa, c_bb, c_ab = covariances(a - a.mean(dim=0), b - b.mean(dim=0), ridge)
            t = inverse_root(c_aa) @ c_ab @ inverse_root(c_bb)
            return -torch.linalg.svdvals(t).sum() / self.config.dim_out
