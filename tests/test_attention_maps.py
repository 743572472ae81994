"""Top links, received mass and entropy against the stored map, from both attentions' lse."""

import re

import pytest
import torch

import fusedmm
from fusedmm import attention_maps


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_maps, "_ROWS", 16)
    monkeypatch.setattr(attention_maps, "_COLS", 16)


def streams(M=37, N=50, D=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, D, generator=generator) for n in (M, N)]


def truth(q, k, mask):
    s = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None], float("-inf"))
    return s.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_by_products_of_both_directions(masked):
    x, y = streams()
    mask_x = mask_y = None
    if masked:
        mask_x, mask_y = torch.rand(2, 37) > 0.3, torch.rand(2, 50) > 0.3
        mask_y[1] = False  # the queries of x in batch item 1 attend to nothing
    _, _, lse_x, lse_y = fusedmm.bi_attention(
        x, y, x, y, mask_x=mask_x, mask_y=mask_y, return_lse=True, backend="reference"
    )
    for q, k, lse, mask in ((x, y, lse_x, mask_y), (y, x, lse_y, mask_x)):
        p = truth(q, k, mask)
        weights, keys = attention_maps.attention_links(q, k, lse, 5, mask=mask)
        torch.testing.assert_close(weights, p.topk(5).values, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(p.gather(-1, keys), weights, atol=1e-6, rtol=1e-5)
        mass = attention_maps.attention_received(q, k, lse, mask=mask)
        torch.testing.assert_close(mass, p.sum(-2), atol=1e-5, rtol=1e-5)
        entropy = attention_maps.attention_entropy(q, k, lse, mask=mask)
        expected = -torch.special.xlogy(p, p).sum(-1)
        torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)


def test_equal_weights_by_lowest_key():
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 40, 4)
    lse = (q @ k.mT * 0.5).logsumexp(-1)
    _, keys = attention_maps.attention_links(q, k, lse, 20)
    assert keys[0, 0].tolist() == [list(range(20))] * 2
    entropy = attention_maps.attention_entropy(q, k, lse)
    torch.testing.assert_close(entropy, torch.full((1, 1, 2), 40.0).log())


Q, K, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: attention_maps.attention_links(Q, K, LSE, 6), "n: expected an integer in [1, 5]"),
        (lambda: attention_maps.attention_entropy(Q, K, LSE[:, :1]),
         "attention_entropy: lse: expected shape [1, 2, 3] to match q, got [1, 1, 3]"),
        (lambda: attention_maps.attention_received(Q, K[..., :2], LSE),
         "attention_received: k: expected shape [1, 2, 5, 4] to match q, got [1, 2, 5, 2]"),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
