"""LXMERT question answering: a fine-tuning step on a patched model, and its attention maps.

A checkpoint would be `LxmertForQuestionAnswering.from_pretrained(name)`; here random weights of a
small config, so that nothing is downloaded.
"""

import torch
from transformers import LxmertConfig, LxmertForQuestionAnswering

import fusedmm

config = LxmertConfig(
    vocab_size=500, hidden_size=96, num_attention_heads=4, l_layers=2, x_layers=2, r_layers=2,
    intermediate_size=192, visual_feat_dim=128, num_qa_labels=10,
)  # fmt: skip
torch.manual_seed(0)
model = LxmertForQuestionAnswering(config)
batch = {
    "input_ids": torch.randint(1, 500, (8, 12)),
    "visual_feats": torch.randn(8, 36, 128),
    "visual_pos": torch.rand(8, 36, 4),
}
answers = torch.randint(0, 10, (8,))

with torch.no_grad():
    before = model.eval()(**batch).question_answering_score
    fusedmm.patch(model)
    out = model(**batch, output_attentions=True)
assert torch.allclose(out.question_answering_score, before, atol=1e-5)
print(f"cross-attention maps: {[list(m.shape) for m in out.cross_encoder_attentions]}")

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(5):
    score = model(**batch).question_answering_score
    loss = torch.nn.functional.cross_entropy(score, answers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
