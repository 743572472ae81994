"""LightGlue matching of an image pair before and after fusedmm.patch.

A checkpoint would be `LightGlueForKeypointMatching.from_pretrained(name)`; here random weights of a
small config, so that nothing is downloaded.
"""

import torch
from transformers import LightGlueConfig, LightGlueForKeypointMatching, SuperPointConfig

import fusedmm

detector = SuperPointConfig(
    encoder_hidden_sizes=[16, 16, 32, 32], decoder_hidden_size=32, descriptor_decoder_dim=64,
    max_keypoints=256, keypoint_threshold=0.0,
)  # fmt: skip
config = LightGlueConfig(
    keypoint_detector_config=detector, descriptor_dim=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, depth_confidence=-1.0, width_confidence=-1.0,
    filter_threshold=0.0,
)  # fmt: skip
torch.manual_seed(0)
model = LightGlueForKeypointMatching(config).eval()
pair = torch.rand(1, 2, 3, 240, 320)
with torch.no_grad():
    before = model(pair)
    print(fusedmm.patch(model, verbose=False))
    after = model(pair)
print(f"{int((after.matches[0, 0] >= 0).sum())} matches among {after.matches.shape[-1]} keypoints")
assert torch.equal(after.matches, before.matches)
assert torch.allclose(after.matching_scores, before.matching_scores, atol=1e-5)
