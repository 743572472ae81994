"""BiXT: latents and patches exchange information through one score matrix, in linear time."""

import torch

from fusedmm.nn import BiXAttnBlock

torch.manual_seed(0)
block = BiXAttnBlock(dim_lat=48, dim_pat=48, dim_attn=48, num_heads=6)
latents, patches = torch.randn(1, 16, 48), torch.randn(8, 196, 48)
new_latents, new_patches = block(latents, patches)
(new_latents.mean() + new_patches.mean()).backward()
print(f"latents {list(new_latents.shape)}, patches {list(new_patches.shape)}")
assert new_latents.shape == (8, 16, 48) and block.attn.rv_patches.weight.grad.isfinite().all()
