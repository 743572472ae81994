"""fusedmm as the attention function of a Transformers model: here CLIP's two towers."""

import torch
from transformers import CLIPConfig, CLIPModel

from fusedmm.integrations import register_attention

register_attention()
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = CLIPConfig(
    text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 16},
    vision_config={**sizes, "image_size": 64, "patch_size": 8},
    projection_dim=32,
)
torch.manual_seed(0)
model = CLIPModel(config).eval()
batch = {"input_ids": torch.randint(1, 100, (4, 16)), "pixel_values": torch.randn(4, 3, 64, 64)}
with torch.no_grad():
    before = model(**batch).logits_per_image
    model.set_attn_implementation("fusedmm")
    after = model(**batch).logits_per_image
print(f"logits {list(after.shape)}, largest difference {(after - before).abs().max():.1e}")
assert torch.allclose(after, before, atol=1e-4)
