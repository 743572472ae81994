"""The classic fusion layers: two feature vectors, or token streams of one length, in; one out."""

import torch
from torch import Tensor, nn


class ConcatFusion(nn.Module):
    """Concatenation and one linear layer: `fc([x, y])`.

    Args:
        dim_x, dim_y: widths of the two inputs.
        dim_out: width of the result.
    Source: early fusion, as in arXiv:1705.09406 section 6.
    """

    def __init__(self, dim_x: int, dim_y: int, dim_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim_x + dim_y, dim_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., dim_x], [..., dim_y] -> [..., dim_out]."""
        return self.fc(torch.cat([x, y], dim=-1))


class GatedFusion(nn.Module):
    """Gated multimodal unit: a gate per feature chooses between the two modalities.

        h_x, h_y = tanh(fc_x(x)), tanh(fc_y(y))
        z = sigmoid(gate([x, y]))
        o = z * h_x + (1 - z) * h_y

    Args:
        dim_x, dim_y: widths of the two inputs.
        dim_out: width of the result.
    Source: arXiv:1702.01992.
    """

    def __init__(self, dim_x: int, dim_y: int, dim_out: int) -> None:
        super().__init__()
        self.fc_x = nn.Linear(dim_x, dim_out)
        self.fc_y = nn.Linear(dim_y, dim_out)
        self.gate = nn.Linear(dim_x + dim_y, dim_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., dim_x], [..., dim_y] -> [..., dim_out]."""
        z = torch.sigmoid(self.gate(torch.cat([x, y], dim=-1)))
        h_x, h_y = torch.tanh(self.fc_x(x)), torch.tanh(self.fc_y(y))
        return torch.lerp(h_y, h_x, z)


class AttentionFusion(nn.Module):
    """A weight per modality, from one scoring layer: the weighted mean of the two projections.

        h_x, h_y = fc_x(x), fc_y(y)
        a = softmax([score(tanh(h_x)), score(tanh(h_y))])
        o = a[0] * h_x + a[1] * h_y

    Args:
        dim_x, dim_y: widths of the two inputs.
        dim_out: width of the result.
    Source: attention pooling (arXiv:1512.08756) over the two modalities.
    """

    def __init__(self, dim_x: int, dim_y: int, dim_out: int) -> None:
        super().__init__()
        self.fc_x = nn.Linear(dim_x, dim_out)
        self.fc_y = nn.Linear(dim_y, dim_out)
        self.score = nn.Linear(dim_out, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., dim_x], [..., dim_y] -> [..., dim_out]."""
        h = torch.stack([self.fc_x(x), self.fc_y(y)], dim=-2)  # [..., 2, dim_out]
        a = self.score(torch.tanh(h)).softmax(dim=-2)  # [..., 2, 1]
        return (a * h).sum(dim=-2)
