"""open_clip's losses around `fusedmm.contrastive_loss` and `fusedmm.sigmoid_loss`: same constructor
and call, no logits in memory. `logit_scale` is the multiplier itself, exp already applied.

With world_size > 1 both run over the default process group. The loss is that of the whole batch,
the same number on every rank, and gradients averaged over ranks (what DDP does) are those of one
process: open_clip's with gather_with_grad=True. With False and local_loss=False its gradients of
the features are 1 / world_size of them.
"""

import torch
from torch import Tensor, nn

from ..ops.contrastive_loss import contrastive_loss
from ..ops.sigmoid_loss import sigmoid_loss


def _group(op: str, world_size: int):
    """The default process group, or None for one process."""
    if world_size == 1:
        return None
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{op}: world_size: expected a process group of {world_size}, got none")
    if dist.get_world_size() != world_size:
        raise ValueError(
            f"{op}: world_size: expected {dist.get_world_size()}, that of the default process "
            f"group, got {world_size}"
        )
    return dist.group.WORLD


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of image and text features, called as open_clip's ClipLoss.

        s = logit_scale * image @ text.T                        # never stored
        loss = (cross_entropy(s, arange) + cross_entropy(s.T, arange)) / 2

    Args:
        local_loss, gather_with_grad: how open_clip would split the work; the whole batch's loss and
            its full gradient in any case.
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of the default process group.
        use_horovod: not supported with world_size > 1.
    Raises: NotImplementedError, horovod. ValueError, no process group of that size.
    Source: CLIP, arXiv:2103.00020.
    """

    # On the class, so that an original whose class is exchanged for this one has them too.
    backend: str | None = None
    use_horovod = False

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of matched rows.

        Args:
            image_features, text_features: [M, D], this rank's rows, normalised by the caller.
            logit_scale: the multiplier, float or scalar tensor.
            logit_bias: added to every logit, which no softmax sees; its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.
        Returns: scalar fp32, in nats.
        """
        if self.use_horovod and self.world_size > 1:
            raise NotImplementedError("ClipLoss: use_horovod: expected False, got True")
        loss = contrastive_loss(
            image_features, text_features, logit_scale,
            group=_group("ClipLoss", self.world_size), backend=self.backend,
        )  # fmt: skip
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss of image and text features, called as open_clip's SigLipLoss.

        s = logit_scale * image @ text.T + logit_bias           # never stored
        loss = softplus(-z * s).sum() / M                       # z = +1 on the diagonal, else -1

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of the default process group. The loss is the mean over its ranks of what
            open_clip returns on each.
        dist_impl: accepted; how towers travel is the op's matter.
        chunk_size: accepted; logits are never stored.
    Raises: ValueError, no process group of that size, unknown dist_impl.
    Source: SigLIP, arXiv:2303.15343.
    """

    # On the class, so that an original whose class is exchanged for this one has it too.
    backend: str | None = None

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                "SigLipLoss: dist_impl: expected None, 'bidir', 'shift', 'reduce' or 'gather', "
                f"got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of all pairs.

        Args:
            image_features, text_features: [M, D], this rank's rows, normalised by the caller.
            logit_scale, logit_bias: the multiplier and what is added to every logit.
            output_dict: return {"contrastive_loss": loss}.
        Returns: scalar fp32, in nats per row.
        """
        loss = sigmoid_loss(
            image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias,
            group=_group("SigLipLoss", self.world_size), backend=self.backend,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss
