"""ViLBERT's co-attention block from a config with the original code's names, in place of its own.

`layer.load_state_dict(original.state_dict())` takes the weights of that code's BertConnectionLayer.
"""

from types import SimpleNamespace

import torch

from fusedmm.nn import BertConnectionLayer

config = SimpleNamespace(
    v_hidden_size=128, v_intermediate_size=128, hidden_size=96, intermediate_size=384,
    bi_hidden_size=128, bi_num_attention_heads=8, hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1, hidden_act="gelu",
)  # fmt: skip
torch.manual_seed(0)
layer = BertConnectionLayer.from_config(config)
image, text = torch.randn(4, 37, 128), torch.randn(4, 20, 96)
padding = torch.zeros(4, 1, 1, 20)
padding[1, ..., 12:] = -10000.0  # additive, as the original makes it

image_out, text_out = layer(image, torch.zeros(4, 1, 1, 37), text, padding)
(image_out.square().mean() + text_out.square().mean()).backward()
print(f"image {list(image_out.shape)}, text {list(text_out.shape)}")
text_to_image, image_to_text = layer.biattention.attention_maps(image, None, text, padding)
print(f"weight on padding: {image_to_text[1, ..., 12:].sum():.1e}")
assert image_to_text[1, ..., 12:].sum() < 1e-6
