"""Grounding DINO (and MM Grounding DINO) detection before and after fusedmm.patch.

A checkpoint would be `GroundingDinoForObjectDetection.from_pretrained(name)`; here random weights
of a small config, so that nothing is downloaded.
"""

import time

import torch
from transformers import BertConfig, GroundingDinoConfig, SwinConfig
from transformers import GroundingDinoForObjectDetection as Detector

import fusedmm

config = GroundingDinoConfig(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
    encoder_attention_heads=8, num_queries=50, num_feature_levels=3,
    text_config=BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2),
    backbone_config=SwinConfig(
        image_size=256, window_size=4, embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
        out_features=["stage2", "stage3", "stage4"],
    ),
)  # fmt: skip
torch.manual_seed(0)
model = Detector(config).eval()
with torch.no_grad():  # a new layer scale hides its branch; a trained one does not
    for name, p in model.named_parameters():
        if name.endswith(("vision_param", "text_param")):
            p.fill_(1.0)
images = torch.randn(2, 3, 256, 256)
words = torch.tensor([[101, 4937, 1012, 3899, 1012, 102], [101, 4937, 1012, 102, 0, 0]])


@torch.no_grad()
def detect() -> tuple[torch.Tensor, float]:
    """Boxes [B, queries, 4] and the time they took."""
    start = time.perf_counter()
    boxes = model(
        pixel_values=images, input_ids=words, attention_mask=(words > 0).long()
    ).pred_boxes
    return boxes, time.perf_counter() - start


detect()
before, slow = detect()
print(fusedmm.patch(model, verbose=False))
detect()
after, fast = detect()
print(f"before {1e3 * slow:.0f} ms, after {1e3 * fast:.0f} ms, boxes {list(after.shape)}")
print(f"largest difference of a box {(after - before).abs().max():.1e}")
assert torch.allclose(after, before, atol=1e-4)
