"""Pictures of the benchmarks, from results made up here."""

import pytest

plt = pytest.importorskip("matplotlib.pyplot")

from matplotlib.colors import to_hex  # noqa: E402

from benchmarks import report  # noqa: E402


def test_the_legend_has_the_colours_of_the_bars(monkeypatch, tmp_path):
    """flex x2 has no backward, and the panel without its bars once took its colour away."""

    def record(mode: str, *names: str) -> dict:
        times = {name: {"p50": 1.0 + i} for i, name in enumerate(("ours", *names))}
        return {"case": "lxmert", "group": "model", "dtype": "fp32", "mode": mode, "threads": 2,
                "times": times, "ratio": 2.0, "best_peer": names[0], "skipped": {}}  # fmt: skip

    monkeypatch.setattr(report, "PICTURES", tmp_path)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    records = [record("fwd", "eager", "flex x2"), record("fwdbwd", "eager")]
    report.bars("bi_attention", {"op": "bi_attention", "records": records}, plt)
    legend = plt.gcf().legends[0]
    shown = {t.get_text(): h for t, h in zip(legend.texts, legend.legend_handles, strict=True)}
    for name in ("eager", "flex x2"):
        assert to_hex(shown[name].get_facecolor()) == report.COLOURS[name].lower()
    monkeypatch.undo()
    plt.close("all")
