"""python -m benchmarks.dropin: models and their modules before and after fusedmm, checked, then
timed in turns; writes benchmarks/results/<machine>/dropin.json and the tables of docs/drop_in.md.

A module is also compared with itself under torch.compile. Weights are random, configs those of the
published models unless a case says otherwise. `--table` only writes the tables.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedmm
from fusedmm.nn.co_attention import STANDARD

from . import measure, run
from .report import milliseconds, size, table

PAGE = measure.ROOT / "docs" / "drop_in.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Pair:
    """The original and its replacement, and how either is called: call(module, *inputs)."""

    before: nn.Module
    after: nn.Module
    inputs: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair by name. `shape` is for the reader; `compiled`: also compare with torch.compile."""

    name: str
    shape: str
    make: Callable[[torch.dtype], Pair]
    compiled: bool = False
    dtypes: tuple[str, ...] = ("fp32",)
    modes: tuple[str, ...] = ("fwd", "fwdbwd")


def _patched(module: nn.Module) -> nn.Module:
    after = copy.deepcopy(module)
    if not fusedmm.patch(after, verbose=False):
        raise RuntimeError("dropin: patch found nothing to replace")
    return after


def _floating(module: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> tuple:
    return module.to(dtype), *(t.to(dtype) for t in inputs)


def _fusion(dtype: torch.dtype) -> Pair:
    from transformers import GroundingDinoConfig
    from transformers.models.grounding_dino import modeling_grounding_dino as hf

    module = hf.GroundingDinoBiMultiHeadAttention(GroundingDinoConfig())
    inputs = torch.randn(1, 13294, 256), torch.randn(1, 256, 256)
    module, *inputs = _floating(module, dtype, *inputs)
    return Pair(module, _patched(module), tuple(inputs), lambda m, v, t: [o for o, _ in m(v, t)])


def _vilbert(dtype: torch.dtype) -> Pair:
    sizes = (1024, 1024, 768, 3072, 1024, 8)
    before = fusedmm.nn.BertConnectionLayer(*sizes, attention_backend=STANDARD)
    after = fusedmm.nn.BertConnectionLayer(*sizes)
    after.load_state_dict(before.state_dict())
    inputs = tuple(torch.randn(64, 36, n).to(dtype) for n in (1024, 768))
    call = lambda m, x, y: m(x, None, y, None)  # noqa: E731
    return Pair(before.to(dtype), after.to(dtype), inputs, call)


def _lxmert_layer(dtype: torch.dtype) -> Pair:
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

    module, x, y = _floating(
        LxmertXLayer(LxmertConfig()).eval(), dtype, *torch.randn(2, 64, 36, 768)
    )

    def call(m: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        return [o[0] for o in m.cross_att(x, None, y, None)]

    return Pair(module, _patched(module), (x, y), call)


def _detector(family: str, dtype: torch.dtype) -> Pair:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")()
    model = getattr(transformers, f"{family}ForObjectDetection")(config).eval()
    with torch.no_grad():  # the initial layer scale of 1e-4 would hide the fusion
        for name, p in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                p.fill_(1.0)
    ids = torch.randint(1000, 9000, (1, 32))
    ids[:, 0], ids[:, 4::5], ids[:, -1] = 101, 1012, 102

    def call(m: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        out = m(pixel_values=pixels, input_ids=ids)
        # Untrained heads leave boxes at their proposals: what was fused is looked at as well.
        return (
            out.pred_boxes,
            out.encoder_last_hidden_state_vision,
            out.encoder_last_hidden_state_text,
        )

    model, images = _floating(model, dtype, torch.randn(1, 3, 320, 448))
    return Pair(model, _patched(model), (images,), call)


def _lightglue(dtype: torch.dtype) -> Pair:
    from transformers import LightGlueConfig, LightGlueForKeypointMatching

    config = LightGlueConfig(depth_confidence=-1.0, width_confidence=-1.0, filter_threshold=0.0)
    config.keypoint_detector_config.max_keypoints = 512
    config.keypoint_detector_config.keypoint_threshold = 0.0
    model = LightGlueForKeypointMatching(config).eval()
    call = lambda m, pair: (m(pair).matching_scores,)  # noqa: E731
    model, pair = _floating(model, dtype, torch.rand(1, 2, 3, 240, 320))
    return Pair(model, _patched(model), (pair,), call)


def _lxmert(dtype: torch.dtype) -> Pair:
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    model = LxmertForQuestionAnswering(LxmertConfig()).eval()
    ids, boxes = torch.randint(1, 30000, (8, 20)), torch.rand(8, 36, 4)

    def call(m: nn.Module, features: Tensor) -> tuple[Tensor, ...]:
        out = m(input_ids=ids, visual_feats=features, visual_pos=boxes.to(features))
        return (out.question_answering_score,)

    model, features = _floating(model, dtype, torch.randn(8, 36, 2048))
    return Pair(model, _patched(model), (features,), call)


class _Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from open_clip import CLIP, ClipLoss

        self.model = CLIP(
            embed_dim=256,
            vision_cfg={"image_size": 32, "layers": 1, "width": 128, "patch_size": 16},
            text_cfg={"context_length": 8, "vocab_size": 100, "width": 128, "heads": 2,
                      "layers": 1},
        )  # fmt: skip
        self.loss = ClipLoss()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return (self.loss(*self.model(images, texts)),)


def _clip(dtype: torch.dtype) -> Pair:
    step, images = _floating(_Step(), dtype, torch.randn(4096, 3, 32, 32))
    texts = torch.randint(1, 100, (4096, 8))
    return Pair(step, _patched(step), (images,), lambda m, images: m(images, texts))


CASES = (
    Case("Grounding DINO fusion attention", "1x13294x256, 256 channels, 4 heads", _fusion, True,
         ("fp32", "bf16")),
    Case("ViLBERT connection layer", "64x36x36", _vilbert, True, ("fp32", "bf16")),
    Case("LXMERT cross-attention", "64x36x36", _lxmert_layer, True, ("fp32", "bf16")),
    Case("Grounding DINO detection", "1 image 320x448, 32 words",
         lambda d: _detector("GroundingDino", d), modes=("fwd",)),
    Case("MM Grounding DINO detection", "1 image 320x448, 32 words",
         lambda d: _detector("MMGroundingDino", d), modes=("fwd",)),
    Case("LightGlue matching", "1 pair 240x320, 512 keypoints", _lightglue, modes=("fwd",)),
    Case("LXMERT question answering", "8 x 20 words x 36 boxes", _lxmert),
    Case("CLIP training step", "4096 pairs, one-layer towers of width 128", _clip,
         modes=("fwdbwd",)),
)  # fmt: skip


def _steps(pair: Pair, module: nn.Module, mode: str) -> Callable[[], None]:
    if mode == "fwd":

        def forward() -> None:
            with torch.no_grad():
                pair.call(module, *pair.inputs)

        return forward
    leaves = [t.clone().requires_grad_() for t in pair.inputs]

    def both() -> None:
        outputs = pair.call(module, *leaves)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        for t in (*leaves, *module.parameters()):
            t.grad = None

    return both


def difference(pair: Pair) -> float:
    """Largest difference of an output, over the largest magnitude of that output."""
    with torch.no_grad():
        before, after = (pair.call(m, *pair.inputs) for m in (pair.before, pair.after))
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(after, before, strict=True)
    )


def record(case: Case, dtype: str, mode: str, threads: int, seconds: float) -> dict:
    """One row: times before and after, difference of the outputs."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    torch.manual_seed(0)
    pair = case.make(DTYPES[dtype])
    out = {"case": case.name, "shape": case.shape, "dtype": dtype, "mode": mode}
    out |= {"threads": threads, "difference": difference(pair)}
    if out["difference"] > (2e-3 if dtype == "fp32" else 5e-2):
        raise RuntimeError(f"dropin: {case.name} {dtype}: outputs differ by {out['difference']}")
    calls = {"before": _steps(pair, pair.before, mode), "after": _steps(pair, pair.after, mode)}
    if case.compiled:
        compiled = dataclasses.replace(pair, call=lambda m, *inputs: m(*inputs))
        calls["compiled"] = _steps(compiled, _Compiled(pair), mode)
    with measure.Others() as others:
        times = measure.interleaved(calls, seconds)
    out["times"] = {name: measure.percentile(t, 0.5) for name, t in times.items()}
    out["others"] = others.share
    rest = [t for name, t in out["times"].items() if name != "after"]
    return {**out, "ratio": min(rest) / out["times"]["after"]}


class _Compiled(nn.Module):
    """The original's call under torch.compile, as a module with its parameters."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.original = pair.before
        self._call = torch.compile(lambda *inputs: tuple(pair.call(pair.before, *inputs)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._call(*inputs)


def memory_here(case: Case, dtype: str, mode: str, which: str) -> dict[str, int]:
    """Growth of the resident peak over a call after the first, and bytes kept for backward."""
    pair = case.make(DTYPES[dtype])
    module = getattr(pair, which)
    setattr(pair, "after" if which == "before" else "before", None)
    call = _steps(pair, module, mode)
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = measure._status("VmRSS")
    call()
    found = {"peak": max(measure._status("VmHWM") - before, 0)}
    if mode == "fwdbwd":
        own = {t.untyped_storage().data_ptr() for t in module.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = pair.call(module, *(t.clone().requires_grad_() for t in pair.inputs))
        del outputs
        found["saved"] = sum(n for pointer, n in kept.items() if pointer not in own)
    return found


def memory(case: Case, dtype: str, mode: str, threads: int) -> dict[str, dict[str, int]]:
    """memory_here before and after, each in a fresh process."""
    found = {}
    for which in ("before", "after"):
        asked = json.dumps([case.name, dtype, mode, threads, which])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.dropin", "--memory", asked],
            capture_output=True, text=True, cwd=measure.ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        found[which] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rows(records: list[dict]) -> list[list[str]]:
    order = {c.name: i for i, c in enumerate(CASES)}
    rows = []
    for r in sorted(records, key=lambda r: (order[r["case"]], r["dtype"] != "fp32", r["mode"])):
        times, memory = r["times"], r.get("memory", {})
        peaks = [size(memory[w]["peak"]) if memory else "" for w in ("before", "after")]
        saved = [size(memory[w]["saved"]) if "saved" in memory.get(w, {}) else ""
                 for w in ("before", "after")]  # fmt: skip
        rows.append([
            r["case"], r["shape"], r["dtype"],
            {"fwd": "forward", "fwdbwd": "forward + backward"}[r["mode"]], str(r["threads"]),
            milliseconds(times["before"]),
            milliseconds(times["compiled"]) if "compiled" in times else "",
            milliseconds(times["after"]), f"{r['ratio']:.2f}", " -> ".join(filter(None, peaks)),
            " -> ".join(filter(None, saved)), f"{r['difference']:.0e}", f"{r['others']:.0%}",
        ])  # fmt: skip
    return rows


def write_tables() -> None:
    """The tables of docs/drop_in.md from the results of every machine."""
    parts = []
    for path in sorted(run.RESULTS.glob("*/dropin.json")):
        result = json.loads(path.read_text())
        machine, versions = result["machine"], result["versions"]
        parts.append(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch "
            f"{machine['torch']}, " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".\n"
        )
        head = ["", "shape", "dtype", "mode", "threads", "before ms", "compiled ms", "after ms",
                "ratio", "peak memory", "kept for backward", "difference",
                "other work"]  # fmt: skip
        parts.append(table(head, _rows(result["records"])))
    begin, end = "<!-- dropin -->", "<!-- /dropin -->"
    text = "\n".join([begin, *parts, end])
    page = re.sub(f"{begin}.*{end}", lambda _: text, PAGE.read_text(), flags=re.S)
    PAGE.write_text(page)


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropin", description=__doc__)
    parser.add_argument("--cases", help="part of a case's name")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1.0, help="a call")
    parser.add_argument("--quick", action="store_true", help="a few calls; nothing is saved")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    if args.memory:
        name, dtype, mode, threads, which = json.loads(args.memory)
        torch.set_num_threads(threads)
        case = next(c for c in CASES if c.name == name)
        sys.stdout.write(json.dumps(memory_here(case, dtype, mode, which)) + "\n")
        return
    for case in () if args.table else CASES:
        if args.cases and args.cases.lower() not in case.name.lower():
            continue
        for dtype in case.dtypes:
            for mode in case.modes:
                r = record(case, dtype, mode, args.threads, 0.0 if args.quick else args.seconds)
                if not args.quick:
                    r["memory"] = memory(case, dtype, mode, args.threads)
                    _save(r)
                shown = {k: f"{1e3 * t:.4g} ms" for k, t in r["times"].items()}
                sys.stdout.write(f"{case.name} {dtype} {mode} {shown} ratio {r['ratio']:.2f}"
                                 f" {r.get('memory', '')} others {r['others']:.0%}\n")  # fmt: skip
                sys.stdout.flush()
    if not args.quick:
        write_tables()


def _save(r: dict) -> None:
    info = run.machine()
    path = run.RESULTS / run.slug(info) / "dropin.json"
    old = json.loads(path.read_text())["records"] if path.exists() else []
    versions = {n: importlib.metadata.version(n) for n in ("transformers", "open_clip_torch")}
    r["commit"] = run._commit()
    result = {"machine": info, "versions": versions, "records": run.merge(old, [r])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
