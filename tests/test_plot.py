"""Attention laid over an image: the tint is where the values are, links frame their patches."""

import pytest
import torch

import fusedmm
from fusedmm import attention_maps, plot

pytest.importorskip("matplotlib", reason="matplotlib not installed")


def colours() -> torch.Tensor:
    """Four coloured quarters: red, green, blue, yellow; [3, 64, 64]."""
    image = torch.zeros(3, 2, 2)
    image[0, 0, 0] = image[1, 0, 1] = image[2, 1, 0] = image[0, 1, 1] = image[1, 1, 1] = 1.0
    return image.repeat_interleave(32, 1).repeat_interleave(32, 2)


def by_products():
    """What the words "red" and "yellow" attend to among 8 x 8 patches, both ways."""
    patches = torch.nn.functional.avg_pool2d(colours(), 8).flatten(1).T  # [64, 3]
    words = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    q, k = ((t - 0.4)[None, None] for t in (words, patches))
    _, _, lse_w, lse_p = fusedmm.bi_attention(q, k, q, k, scale=6.0, return_lse=True)
    links = attention_maps.attention_links(q, k, lse_w, 8, scale=6.0)
    received = attention_maps.attention_received(q, k, lse_w, scale=6.0)
    entropy = attention_maps.attention_entropy(k, q, lse_p, scale=6.0)
    return [t[0, 0] for t in links], received[0, 0], entropy[0, 0]


def quarters(t: torch.Tensor) -> torch.Tensor:
    """Means of the four quarters of [H, W, ...]."""
    h, w = t.shape[0] // 2, t.shape[1] // 2
    return torch.stack([t[:h, :w], t[:h, w:], t[h:, :w], t[h:, w:]]).float().mean((1, 2))


def test_overlay_tints_where_the_values_are():
    image = torch.full((3, 64, 96), 0.5)
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    picture = plot.overlay(image, values)
    assert picture.shape == (256, 384, 3) and picture.dtype == torch.uint8
    grey = quarters(picture.float().std(2)[..., None])[:, 0]
    assert grey[0] > 3 * grey[1:].max(), "only the first quarter is tinted"
    same = plot.overlay((image * 255).to(torch.uint8), values, low=0.0, high=1.0)
    assert (same.int() - picture.int()).abs().max() <= 1
    flat = plot.overlay(image, torch.ones(3, 3), low=1.0, high=2.0)
    assert (flat.int() - 127).abs().max() <= 1, "at `low` nothing is tinted"


def test_words_find_their_colours():
    """Red links to the first quarter alone; the drawn panel is bright there and dark elsewhere."""
    (weights, patches), received, entropy = by_products()
    assert ((patches[0] // 8 < 4) & (patches[0] % 8 < 4)).all()
    maps = {"attention received": received, "entropy of patches": entropy}
    figure = plot.plot_attention(
        colours(), (8, 8), maps=maps, links={"red": (weights[0], patches[0])}
    )
    drawn = {a.get_title(): a for a in figure.axes if a.get_title()}
    assert list(drawn) == ["image", *maps, "red"]
    shown = torch.as_tensor(drawn["red"].images[0].get_array())
    bright = quarters(shown[..., :1])[:, 0]
    assert bright[0] > 0.5 > 100 * bright[1:3].max()
    assert [t.get_text() for t in drawn["red"].texts] == [f"{100 * w:.0f}%" for w in weights[0]]
    assert len(drawn["red"].patches) == 8


def test_writes_a_file(tmp_path):
    path = tmp_path / "a.png"
    plot.plot_attention(colours(), (8, 8)).savefig(path)
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: plot.overlay(torch.zeros(1, 4, 4), torch.zeros(2, 2)),
         r"overlay: image: expected shape \[3, height, width\], got \[1, 4, 4\]"),
        (lambda: plot.plot_attention(colours(), (8, 8), maps={"m": torch.zeros(63)}),
         r"plot_attention: maps\['m'\]: expected shape \[64\] to match grid, got \[63\]"),
        (lambda: plot.plot_attention(
            colours(), (8, 8), links={"w": (torch.ones(2), torch.tensor([0, 64]))}),
         r"plot_attention: links\['w'\]: expected patches in \[0, 64\), got 0 to 64"),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
