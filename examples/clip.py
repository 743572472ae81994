"""A CLIP training step with open_clip, before and after fusedmm.patch: the same loss and gradients,
the logits never stored.
"""

import torch
from open_clip import CLIP, ClipLoss

import fusedmm

torch.manual_seed(0)
model = CLIP(
    embed_dim=64,
    vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    text_cfg={"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
)
images, texts = torch.randn(256, 3, 32, 32), torch.randint(1, 100, (256, 16))
loss = ClipLoss()


def step() -> list[torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    value = loss(*model(images, texts))
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


before = step()
fusedmm.patch(loss)
after = step()
difference = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
print(f"loss {after[0]:.5f}, largest difference of it and all gradients {difference:.1e}")
assert difference < 1e-5
