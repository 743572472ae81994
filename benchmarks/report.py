"""python -m benchmarks.report: tables and pictures from benchmarks/results/, nothing measured.

Tables replace what stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->` in
README.md and docs/benchmarks.md; pictures go to docs/benchmarks/. Lost shapes are in bold.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import cases
from .measure import ROOT
from .run import QUIET, RESULTS

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PICTURES = ROOT / "docs" / "benchmarks"
MODES = {"fwd": "forward", "fwdbwd": "forward + backward"}
# One colour a peer on every picture (Okabe and Ito's palette, safe for colour blindness).
COLOURS = {
    "ours": "#D55E00",
    "eager": "#0072B2",
    "compiled": "#009E73",
    "sdpa x2": "#CC79A7",
    "flex x2": "#E69F00",
    "hf grounding dino": "#56B4E9",
    "lucidrains": "#999999",
    "open_clip": "#56B4E9",
    "linear_ce x2": "#CC79A7",
    "linear_ce chunked x2": "#E69F00",
}
Result = dict[str, Any]


def load(machine: str) -> dict[str, Result]:
    """Results of a machine by op, in the order of cases.OPS."""
    paths = {op: RESULTS / machine / f"{op}.json" for op in cases.OPS}
    return {op: json.loads(p.read_text()) for op, p in paths.items() if p.exists()}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table, text left and numbers right."""
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, rule, *rows))


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1.0 else f"{1e3 * seconds:.0f}"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def timed(result: Result, group: str = "model") -> list[Result]:
    """Records with times, in the order of cases.py."""
    order = [c.name for c in cases.CASES[result["op"]]]
    found = [r for r in result["records"] if r["group"] == group and "times" in r]

    def place(r: Result) -> tuple:
        return order.index(r["case"]), r["dtype"] != "fp32", r["mode"], r["threads"]

    return sorted(found, key=place)


def ratio_text(r: Result) -> str:
    """Ratio to the best peer, bold where it is lost; where ours is wrong, that."""
    if "ours" not in r["times"]:
        return "**not timed**"
    if "ratio" not in r:
        return "-"
    return f"{r['ratio']:.2f}" if r["ratio"] >= 1 else f"**{r['ratio']:.2f}**"


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(results: dict[str, Result]) -> str:
    """Geometric mean and worst ratio by op, mode, dtype and threads, beside the target."""
    head = ("op", "mode", "dtype", "threads", "shapes", "geometric mean", "target", "worst")
    rows = []
    for op, result in results.items():
        groups: dict[tuple, list[Result]] = {}
        for r in timed(result):
            groups.setdefault((r["mode"], r["dtype"], r["threads"]), []).append(r)
        for (mode, dtype, threads), records in sorted(groups.items(), key=_group_order):
            ratios = {r["case"]: r["ratio"] for r in records if "ratio" in r}
            if not ratios:
                continue
            target = cases.TARGETS.get((op, mode), {}).get(dtype)
            worst = min(ratios, key=ratios.__getitem__)
            rows.append(
                (
                    op,
                    MODES[mode],
                    dtype,
                    str(threads),
                    str(len(ratios)),
                    f"{mean(list(ratios.values())):.2f}",
                    f"{target}" if target else "-",
                    f"{ratios[worst]:.2f} ({worst})",
                )
            )
    return table(head, rows)


def _group_order(item: tuple) -> tuple:
    mode, dtype, threads = item[0]
    return mode, dtype != "fp32", threads


def times_table(result: Result) -> str:
    """Every timed shape: ours, the best peer, and how near the machine's ceiling."""
    head = (
        "case", "mode", "dtype", "threads", "ours ms (p20-p80)", "best peer", "its ms", "ratio",
        "GFLOP/s", "of FMA peak",
    )  # fmt: skip
    rows = []
    for r in timed(result):
        best, ours = r.get("best_peer"), r["times"].get("ours")
        spread = "-"
        if ours:
            p20, p50, p80 = (milliseconds(ours[p]) for p in ("p20", "p50", "p80"))
            spread = f"{p50} ({p20}-{p80})"
        rows.append(
            (
                f"{r['case']} {r['shape']}",
                r["mode"],
                r["dtype"],
                str(r["threads"]),
                spread,
                best or "none fits",
                milliseconds(r["times"][best]["p50"]) if best else "-",
                ratio_text(r),
                f"{r['flops'] / 1e9:.0f}" if ours else "-",
                f"{r['share_of_peak']:.0%}" if ours else "-",
            )
        )
    return table(head, rows)


def peers_table(result: Result) -> str:
    """Milliseconds of every peer at one thread count, the largest."""
    records = timed(result)
    names = list(dict.fromkeys(n for r in records for n in (*r["times"], *r["skipped"])))
    most = max((r["threads"] for r in records), default=0)
    rows = []
    for r in records:
        if r["threads"] == most:
            cells = (r["times"].get(n) for n in names)
            shown = [milliseconds(t["p50"]) if t else "-" for t in cells]
            rows.append((f"{r['case']} {r['mode']} {r['dtype']}", *shown))
    return f"Milliseconds (p50), {most} threads.\n\n" + table(("case", *names), rows)


def skips_table(result: Result) -> str:
    """Why a peer has no number, each reason once."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for r in timed(result):
        for name, why in r["skipped"].items():
            reasons.setdefault((name, why.replace("|", "/")), set()).add(r["case"])
    rows = [(name, why, ", ".join(sorted(at))) for (name, why), at in sorted(reasons.items())]
    return table(("peer", "reason", "cases"), rows) if rows else "Every peer ran on every shape."


def memory_table(result: Result) -> str:
    """Peak growth and saved bytes of one forward + backward."""
    models = {c.name: c for c in cases.CASES[result["op"]] if c.group == "model"}
    records = [r for r in result["memory"] if r["case"] in models and r["mode"] == "fwdbwd"]
    names = list(dict.fromkeys(n for r in records for n in r["peers"]))
    rows = []
    for r in sorted(records, key=lambda r: (list(models).index(r["case"]), r["dtype"] != "fp32")):
        cells = [f"{r['case']} {r['dtype']}"]
        for n in names:
            m = r["peers"].get(n, {"skip": ""})
            if "skip" in m:
                cells.append("-")
            else:
                saved = f" ({size(m['saved_bytes'])})" if "saved_bytes" in m else ""
                cells.append(size(m["peak_bytes"]) + saved)
        rows.append(cells)
    if not rows:
        return "Not measured."
    return table(("case", *names), rows)


def overhead_table(results: dict[str, Result]) -> str:
    """Microseconds of a call on next to nothing."""
    rows = []
    for op, result in results.items():
        for r in timed(result, "overhead"):
            if "ours" in r["times"] and r["dtype"] == "fp32" and r["threads"] == 1:
                others = [f"{n} {1e6 * t['p50']:.0f}" for n, t in r["times"].items() if n != "ours"]
                ours = f"{1e6 * r['times']['ours']['p50']:.0f}"
                rows.append((op, MODES[r["mode"]], ours, ", ".join(others)))
    return table(("op", "mode", "ours us", "peers us"), rows)


def scaling_table(results: dict[str, Result]) -> str:
    """How much faster the largest number of threads is than one: ours, and peers in those cells."""
    rows = []
    for op, result in results.items():
        cells: dict[tuple, dict[int, dict]] = {}
        for r in timed(result):
            key = (r["mode"], r["dtype"], r["case"])
            cells.setdefault(key, {})[r["threads"]] = r["times"]
        for mode in MODES:
            for dtype in cases.DTYPES:
                ours: dict[str, float] = {}
                peers: list[float] = []
                for key, times in cells.items():
                    if key[:2] != (mode, dtype) or 1 not in times:
                        continue
                    one, many = times[1], times[max(times)]
                    gains = {n: one[n]["p50"] / many[n]["p50"] for n in one if n in many}
                    if max(times) > 1 and "ours" in gains:
                        ours[key[2]] = gains.pop("ours")
                        peers += gains.values()
                if ours:
                    low = min(ours, key=ours.__getitem__)
                    rows.append((
                        op, MODES[mode], dtype, f"{mean(list(ours.values())):.2f}",
                        f"{mean(peers):.2f}" if peers else "-", f"{ours[low]:.2f} ({low})",
                    ))  # fmt: skip
    return table(("op", "mode", "dtype", "geometric mean", "peers'", "worst"), rows)


def profile_table(machine: str) -> str:
    """Where the time goes, of benchmarks.profile."""
    path = RESULTS / machine / "profile.json"
    if not path.exists():
        return "Not measured."
    kept = json.loads(path.read_text())
    rows, parts = [], list(kept["rows"][0]["shares"])
    for r in kept["rows"]:
        shares = [f"{r['shares'][part]:.0%}" for part in parts]
        rate = f"{r['products_of_peak']:.0%}"
        name = f"{r['op']} {r['case']} {r['mode']}"
        rows.append(
            (name, r["dtype"], str(r["threads"]), milliseconds(r["seconds"]), *shares, rate)
        )
    head = ("case", "dtype", "threads", "ms", *parts, "products, of FMA peak")
    return f"`{kept['command'].strip()}` at {kept['commit']}.\n\n" + table(head, rows)


def provenance(results: dict[str, Result]) -> str:
    """Machine, versions, commits and the commands that measured."""
    first = next(iter(results.values()))
    lines = [f"- {key}: {value}" for key, value in first["machine"].items()]
    for result in results.values():
        used = {r["run"] for r in (*result["records"], *result["memory"])}
        for i in sorted(used):
            run = result["runs"][i]
            extras = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
            tail = f"; {extras}" if extras else ""
            lines.append(f"- `{run['command']}` at {run['commit']}, {run['date']}{tail}")
    shares = [r.get("others", math.nan) for v in results.values() for r in timed(v)]
    noisy = sorted(share for share in shares if share > QUIET)
    unknown = sum(map(math.isnan, shares))
    if noisy or unknown:
        text = (
            f"other work took more than {QUIET:.0%} of the cores in {len(noisy)} of {len(shares)}"
        )
        text += f" timings (median {noisy[len(noisy) // 2]:.0%})" if noisy else " timings"
        text += f", and how much it took in {unknown} is not known" if unknown else ""
        lines.append(f"- **not quiet**: {text}; shares of the peak are too low then")
    return "\n".join(dict.fromkeys(lines))


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Puts each block between its markers, where the page has them."""
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        filled = f"{begin}\n{block}\n{end}"
        text = re.sub(pattern, lambda _, filled=filled: filled, text, flags=re.DOTALL)
    page.write_text(text)


def shown(text: str, *names: str) -> str:
    """Markdown of those pictures that were drawn."""
    drawn = [n for n in names if (PICTURES / n).exists()]
    return "\n".join(f"![{text}]({PICTURES.name}/{n})" for n in drawn)


def blocks(results: dict[str, Result], machine: str) -> dict[str, str]:
    """Every table by the name of its marker."""
    out = {
        "profile": profile_table(machine),
        "summary": summary(results),
        "overhead": overhead_table(results),
        "scaling": scaling_table(results),
        "machine": provenance(results),
        "roofline": shown("Roofline", "roofline.png"),
    }
    makers: dict[str, Callable[[Result], str]] = {
        "times": times_table,
        "peers": peers_table,
        "skips": skips_table,
        "memory": memory_table,
    }
    for op, result in results.items():
        for name, make in makers.items():
            out[f"{op}-{name}"] = make(result)
        names = f"{op}-ratio.png", f"{op}-n.png"
        out[f"{op}-pictures"] = shown(f"{op}: ratio to each peer, time and memory over N", *names)
    return out


def bars(op: str, result: Result, plt) -> None:
    """Time of every peer over ours, one panel a dtype and mode; 1 is ours, below 1 a loss."""
    most = max(r["threads"] for r in timed(result))
    records = [r for r in timed(result) if r["threads"] == most and "ours" in r["times"]]
    names = [n for n in COLOURS if n != "ours" and any(n in r["times"] for r in records)]
    modes = [m for m in MODES if any(r["mode"] == m and "ratio" in r for r in records)]
    if not modes:
        return
    panels = [(d, m) for m in modes for d in cases.DTYPES]
    size = (12, 3.75 * len(modes))
    figure, axes = plt.subplots(len(modes), 2, figsize=size, squeeze=False, layout="constrained")
    for ax, (dtype, mode) in zip(axes.flat, panels, strict=True):
        shown = [r for r in records if (r["dtype"], r["mode"]) == (dtype, mode)]
        shown = [r for r in shown if "ratio" in r]
        width = 0.8 / max(len(names), 1)
        for k, name in enumerate(names):
            at = [i for i, r in enumerate(shown) if name in r["times"]]
            height = [shown[i]["times"][name]["p50"] / shown[i]["times"]["ours"]["p50"] for i in at]
            place = [i - 0.4 + (k + 0.5) * width for i in at]
            if at:  # no bars have no colour, in the legend either
                ax.bar(place, height, width, color=COLOURS[name], label=name)
        for i, r in enumerate(shown):
            ax.plot([i - 0.42, i + 0.42], [r["ratio"]] * 2, color="black", linewidth=1.2)
            ax.annotate(
                f"{r['ratio']:.2f}",
                (i + 0.43, r["ratio"]),
                fontsize=8,
                va="center",
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            )
        ax.axhline(1.0, color=COLOURS["ours"], linewidth=1.5, label="ours = 1")
        ax.set_xticks(range(len(shown)), [r["case"] for r in shown], rotation=20, ha="right")
        ax.set_xlim(-0.6, len(shown) - 0.2)
        ax.set_title(f"{MODES[mode]}, {dtype}")
        ax.set_visible(bool(shown))
        ax.set_ylabel("time / ours")
        ax.spines[["top", "right"]].set_visible(False)
    handles = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
    figure.suptitle(f"{op}: time of each peer over ours, {most} threads (number: the best)")
    figure.savefig(PICTURES / f"{op}-ratio.png", dpi=110)
    plt.close(figure)


def against_n(op: str, result: Result, plt) -> None:
    """Time and peak memory of forward + backward against N = M, log axes, with an N^2 line."""
    sizes = {c.name: c.shape.N for c in cases.CASES[op] if c.group == "sweep"}
    times = [r for r in timed(result, "sweep") if r["dtype"] == "fp32" and r["mode"] == "fwdbwd"]
    most = max((r["threads"] for r in times), default=0)
    times = [r for r in times if r["threads"] == most]
    memory = [r for r in result["memory"] if r["case"] in sizes and r["dtype"] == "fp32"]
    memory = [r for r in memory if r["mode"] == "fwdbwd"]
    if not times and not memory:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    series: dict[str, tuple[dict, dict]] = {n: ({}, {}) for n in COLOURS}
    for r in times:
        for name, t in r["times"].items():
            series[name][0][sizes[r["case"]]] = 1e3 * t["p50"]
    for r in memory:
        for name, m in r["peers"].items():
            if m.get("peak_bytes"):
                series[name][1][sizes[r["case"]]] = m["peak_bytes"] / 2**20
    for ax, k, label in ((left, 0, f"ms, {most} threads"), (right, 1, "peak MiB beyond inputs")):
        steepest = 0.0  # of the curves' ends, over N^2
        for name, points in series.items():
            if points[k]:
                x, y = zip(*sorted(points[k].items()), strict=True)
                style = {"linewidth": 2.4, "zorder": 3} if name == "ours" else {"linewidth": 1.4}
                ax.plot(x, y, marker="o", markersize=4, color=COLOURS[name], label=name, **style)
                steepest = max(steepest, y[-1] / x[-1] ** 2)
        xs = sorted(sizes.values())
        if steepest:
            ax.plot(
                xs,
                [1.6 * steepest * x**2 for x in xs],
                color="black",
                linestyle=":",
                label="slope of N²",
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(xs, [str(x) for x in xs])
        ax.set_xlabel("N = M")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8)
    figure.suptitle(f"{op}: forward + backward, fp32")
    figure.savefig(PICTURES / f"{op}-n.png", dpi=110)
    plt.close(figure)


def roofline(results: dict[str, Result], plt) -> None:
    """GFLOP/s of needed FLOP against needed FLOP per compulsory byte, one thread."""
    if not any(r["threads"] == 1 for result in results.values() for r in timed(result)):
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    markers = dict(zip(cases.OPS, "osD^", strict=True))
    for ax, dtype in zip(axes, cases.DTYPES, strict=True):
        peak = bandwidth = 0.0
        low, high = math.inf, 1.0
        for op, result in results.items():
            records = [r for r in timed(result) if r["threads"] == 1 and r["dtype"] == dtype]
            records = [r for r in records if "flops" in r]
            for run in result["runs"]:
                bandwidth = max(bandwidth, run["peaks"].get("1", {}).get("bytes", 0.0))
            for mode in MODES:
                points = [r for r in records if r["mode"] == mode]
                x = [r["flop"] / r["traffic"] for r in points]
                y = [r["flops"] / 1e9 for r in points]
                face = COLOURS["ours"] if mode == "fwd" else COLOURS["eager"]
                label = f"{op}, {MODES[mode]}"
                ax.scatter(x, y, marker=markers[op], color=face, s=34, label=label, zorder=3)
                low, high = min([low, *x]), max([high, *x])
            peak = max([peak, *(r["fma_peak"] / 1e9 for r in records)])
        if not peak:
            ax.set_visible(False)
            continue
        ridge = 1e9 * peak / bandwidth if bandwidth else high
        high = max(2 * high, 4 * ridge)
        xs = [low / 2 * (2 * high / low) ** (i / 200) for i in range(201)]
        roof = [min(peak, x * bandwidth / 1e9) if bandwidth else peak for x in xs]
        ax.plot(xs, roof, color="black", linewidth=1.5)
        ax.annotate(f"FMA peak {peak:.0f} GFLOP/s", (xs[-1], peak), ha="right", va="bottom")
        if bandwidth:
            text = f"memory {bandwidth / 1e9:.0f} GB/s (copy)"
            ax.annotate(text, (xs[8], roof[4]), ha="left", va="top", fontsize=8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("needed FLOP per byte of inputs and outputs")
        ax.set_ylabel("GFLOP/s of needed FLOP")
        ax.set_title(f"{dtype}, 1 thread")
        ax.grid(alpha=0.3, which="both")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(PICTURES / "roofline.png", dpi=110)
    plt.close(figure)


def pictures(results: dict[str, Result]) -> None:
    """All PNGs; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(parents=True, exist_ok=True)
    for op, result in results.items():
        if timed(result):
            bars(op, result, plt)
        against_n(op, result, plt)
    roofline(results, plt)


def main(argv: list[str]) -> None:
    """Fills the pages and draws the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    folders = sorted(p.name for p in RESULTS.iterdir() if p.is_dir()) if RESULTS.exists() else []
    parser.add_argument("--machine", choices=folders, default=folders[0] if folders else None)
    args = parser.parse_args(argv)
    if args.machine is None:
        parser.error(f"no results in {RESULTS.relative_to(ROOT)}: run benchmarks.run first")
    results = load(args.machine)
    pictures(results)
    for page in PAGES:
        if page.exists():
            fill(page, blocks(results, args.machine))


if __name__ == "__main__":
    main(sys.argv[1:])
