"""Shapes of real models, the work each op needs on them, and the speed the project aims at.

A case is an op and a shape with a name; groups: "model" (tables), "sweep" (curves against N),
"overhead" (cost of a call). Inputs come from fusedmm.testing.make_case.
"""

import dataclasses
from typing import Any

import torch

from fusedmm import testing
from fusedmm.testing import AttentionShape, PairShape

OPS = ("bi_attention", "co_attention", "contrastive_loss", "sigmoid_loss")

# GEMMs over the whole score matrix that no schedule avoids: forward, forward + backward.
PASSES = {
    "bi_attention": {"fwd": 3, "fwdbwd": 10},
    "co_attention": {"fwd": 4, "fwdbwd": 14},
    "contrastive_loss": {"fwd": 1, "fwdbwd": 4},
    "sigmoid_loss": {"fwd": 1, "fwdbwd": 4},
}

# Geometric mean of (best peer / ours) over the "model" cases; worst case in WORST.
TARGETS = {
    ("bi_attention", "fwd"): {"fp32": 2.5, "bf16": 1.6},
    ("bi_attention", "fwdbwd"): {"fp32": 2.5, "bf16": 1.6},
    ("co_attention", "fwd"): {"fp32": 1.7, "bf16": 1.3},
    ("co_attention", "fwdbwd"): {"fp32": 1.7, "bf16": 1.3},
    ("contrastive_loss", "fwdbwd"): {"fp32": 1.8, "bf16": 1.3},
    ("sigmoid_loss", "fwdbwd"): {"fp32": 1.8, "bf16": 1.3},
}
WORST = {"fp32": 1.1, "bf16": 1.0}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A named call. `check` is the shape to compare with fp64 where the full one would not fit."""

    name: str
    op: str
    shape: AttentionShape | PairShape
    group: str = "model"
    features: tuple[tuple[str, Any], ...] = ()
    check: AttentionShape | PairShape | None = None
    device: str = "cpu"

    def make(self, dtype: str, full: bool = True) -> testing.Case:
        """The inputs, at the full shape or at the one to check."""
        shape = self.shape if full or self.check is None else self.check
        features = dict(self.features)
        return testing.make_case(self.op, shape, DTYPES[dtype], device=self.device, **features)

    def options(self) -> dict[str, Any]:
        """What the op takes beside tensors with gradients."""
        return self.make("fp32").options if self.features else {}

    def scores(self) -> int:
        """Entries of the score matrix over all batches and heads."""
        s = self.shape
        lead = s.B * s.H if isinstance(s, AttentionShape) else _product(s.lead)
        return lead * s.M * s.N

    def flop(self, mode: str) -> float:
        """Needed FLOP; D == Dv in every case."""
        return PASSES[self.op][mode] * 2.0 * self.scores() * self.shape.D

    def traffic(self, mode: str, dtype: str) -> float:
        """Bytes that every schedule moves: inputs read and outputs written, once each."""
        s = self.shape
        lead = s.B * s.H if isinstance(s, AttentionShape) else _product(s.lead)
        reads = {"bi_attention": 2, "co_attention": 3}.get(self.op, 1)
        writes = 1 if self.op in testing.ATTENTIONS else 0
        if mode == "fwdbwd":  # inputs again, outputs and their gradients in, gradients out
            reads, writes = 2 * reads + 2 * writes, writes + reads
        return (reads + writes) * lead * (s.M + s.N) * s.D * DTYPES[dtype].itemsize


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_ATTENTION = {
    "grounding-dino": AttentionShape(1, 4, 13294, 256, 256, 256),
    "grounding-dino-4k": AttentionShape(1, 4, 4000, 256, 256, 256),
    "lightglue": AttentionShape(1, 4, 2048, 2048, 64, 64),
    "bixt": AttentionShape(16, 6, 3136, 64, 32, 32),
    "vilbert": AttentionShape(64, 8, 36, 36, 128, 128),
    "lxmert": AttentionShape(32, 12, 36, 20, 64, 64),
    "generic": AttentionShape(8, 12, 1024, 256, 64, 64),
}
_SWEEP = (512, 1024, 2048, 4096, 8192)
CLIP = (("logit_scale", 50.0),)
SIGLIP = (("logit_scale", 10.0), ("logit_bias", -10.0))


def _attention(op: str) -> list[BenchCase]:
    cases = [BenchCase(name, op, shape) for name, shape in _ATTENTION.items()]
    small = AttentionShape(1, 1, 8, 8, 8, 8)
    cases.append(BenchCase("overhead", op, small, "overhead"))
    for n in _SWEEP:
        shape = AttentionShape(1, 1, n, n, 64, 64)
        cases.append(BenchCase(f"n-{n}", op, shape, "sweep"))
    return cases


def _loss(op: str, sizes: dict[str, int], features: tuple, region: tuple) -> list[BenchCase]:
    cases = []
    for name, n in sizes.items():
        # Beyond 8k rows fp64 eager no longer fits: the same features are checked on fewer.
        check = PairShape(2000, 2000, 512) if n > 8192 else None
        cases.append(BenchCase(name, op, PairShape(n, n, 512), "model", features, check))
    words = PairShape(49, 32, 256, (64,))
    cases.append(BenchCase("region-word", op, words, "model", region))
    cases.append(BenchCase("overhead", op, PairShape(8, 8, 8), "overhead", features))
    for n in _SWEEP:
        cases.append(BenchCase(f"n-{n}", op, PairShape(n, n, 256), "sweep", features))
    return cases


CASES: dict[str, tuple[BenchCase, ...]] = {
    "bi_attention": tuple(_attention("bi_attention")),
    "co_attention": tuple(_attention("co_attention")),
    "contrastive_loss": tuple(
        _loss(
            "contrastive_loss",
            {"clip-4k": 4096, "clip-8k": 8192, "clip-32k": 32768},
            CLIP,
            (("positives", "repeated"),),
        )
    ),
    "sigmoid_loss": tuple(_loss("sigmoid_loss", {"siglip-8k": 8192}, SIGLIP, (("ids", 40),))),
}


def select(op: str, names: list[str] | None) -> list[BenchCase]:
    """Cases by name or group; default all models and the overhead. Other ops' names are fine."""
    wanted = names or ["model", "overhead"]
    known = {word for cases in CASES.values() for c in cases for word in (c.name, c.group)}
    for name in wanted:
        if name not in known:
            raise ValueError(f"cases: expected some of {sorted(known)}, got {name!r}")
    return [c for c in CASES[op] if c.name in wanted or c.group in wanted]
