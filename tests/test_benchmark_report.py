"""Pictures of the benchmarks, from results made up here."""

import pytest

plt = pytest.importorskip("matplotlib.pyplot")

from matplotlib.colors import to_hex  # noqa: E402

from benchmarks import gpu_times, report  # noqa: E402


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


def gpu_run(commit: str, **milliseconds: dict[str, float]) -> dict:
    """A run of gpu_times: times by case and peer."""

    def times(t: float) -> dict[str, float]:
        return {"device": 1e-3 * t, "call": 2e-3 * t, "memory": 2**20}

    records = [
        {"op": "bi_attention", "case": case, "dtype": "bf16", "mode": "fwd", "shape": "", "run": 0,
         "flop": 2e9, "skipped": {"compiled": "broken"},
         "times": {name: times(t) for name, t in by.items()}}
        for case, by in milliseconds.items()
    ]  # fmt: skip
    machine = {"gpu": "G", "torch": "2", "driver": "5", "bf16_flops": 8e14, "copy_bytes": 3e12}
    run = {"commit": commit, "date": "2026-01-01", "command": ""}
    return {"machine": machine, "runs": [run], "records": records}


def test_a_gpu_run_replaces_what_it_measured():
    """Runs that no record is of any more are forgotten; our other backend is no peer."""
    two = {"ours": 2.0, "ours in Triton": 1.0, "eager": 5.0, "sdpa x2": 3.0}
    new = gpu_run("new", lightglue={"ours": 4.0, "eager": 6.0, "sdpa x2": 3.0})
    old = gpu_times.merge({}, gpu_run("old", lightglue=two, **{"bixt-batch-64": two}))
    both = gpu_times.merge(old, new)
    assert [r["commit"] for r in both["runs"]] == ["old", "new"]
    assert [(r["case"], r["run"]) for r in both["records"]] == [
        ("lightglue", 1), ("bixt-batch-64", 0)
    ]  # fmt: skip
    rows = [line for line in gpu_times.markdown(both).splitlines() if "forward" in line]
    assert "| sdpa x2 | **0.75** | 8 | 6 | **0.75** | 0 |" in rows[0]
    assert "| sdpa x2 | 1.50 | 4 | 6 | 1.50 | 1 |" in rows[1]
    assert "not timed: compiled: broken" in gpu_times.markdown(both)
    both["runs"][1]["archs"] = "9.0a"
    assert "1, 2026-01-01 at new, kernels for 9.0a." in gpu_times.markdown(both)
    again = gpu_times.merge(both, gpu_run("newest", **{"bixt-batch-64": two}))
    assert [r["commit"] for r in again["runs"]] == ["new", "newest"]
