"""Retrieval and matching figures on a split, each beside what guessing would give.

Ranks come from fusedmm.metrics, tile by tile; a tie counts against the model. Left out: captions by
several people, which this data does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedmm import metrics

RECALLS = (1, 5, 10)


@torch.no_grad()
def in_batches(function, *columns: Tensor, size: int = 256) -> Tensor:
    """Apply `function` to slices of the columns and join the results as fp32 on the CPU."""
    out = [
        function(*(c[i : i + size] for c in columns)).float().cpu()
        for i in range(0, len(columns[0]), size)
    ]
    return torch.cat(out)


@dataclass(frozen=True)
class Figure:
    """One measured number beside what guessing gives.

    `chance_is` says what the guess is. `unit` is "%" (values in 0..1), or shown as it stands.
    """

    name: str
    value: float
    chance: float
    chance_is: str
    count: int
    unit: str = "%"
    lower_is_better: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)

    def shown(self, value: float) -> str:
        """A value of this figure as text."""
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.3g} {self.unit}".strip()


@dataclass(frozen=True)
class Retrieval:
    """One direction: recall at 1, 5, 10, median rank (1 = best), and the same for chance."""

    count: int
    recall: dict[int, float]
    median_rank: float
    chance_recall: dict[int, float]
    chance_median_rank: float

    def lift(self, k: int = 10) -> float:
        """How many times chance the recall at k is."""
        return self.recall[k] / self.chance_recall[k]

    def as_dict(self) -> dict[str, float]:
        """Flat, for metrics.json."""
        return {
            "count": self.count,
            **{f"recall_at_{k}": v for k, v in self.recall.items()},
            "median_rank": self.median_rank,
            **{f"chance_recall_at_{k}": v for k, v in self.chance_recall.items()},
            "chance_median_rank": self.chance_median_rank,
        }


def retrieval(queries: Tensor, items: Tensor) -> Retrieval:
    """Query i looks for item i among all items by cosine similarity.

    rank[i] = 1 + the number of other items that score at least as high as item i

    Args:
        queries, items: [N, D], not necessarily normalised.
    """
    rows, ranks = metrics.relevant_ranks(queries, items, normalize=True)
    n = len(rows)
    return Retrieval(
        count=n,
        recall={k: metrics.hit_rate_at_k(rows, ranks, k).item() for k in RECALLS},
        median_rank=metrics.median_rank(rows, ranks).item(),
        chance_recall={k: min(k, n) / n for k in RECALLS},
        chance_median_rank=(n + 1) / 2,
    )


def labelled(images: Tensor, texts: Tensor, labels: list[str]) -> dict[str, dict[str, float]]:
    """Figures where every row of a label is right: retrieval both ways, and zero-shot accuracy.

    Args:
        images, texts: [N, D]; labels: of row i in both. A label's classifier is the mean direction
            of its texts.
    """
    names = {name: i for i, name in enumerate(sorted(set(labels)))}
    ids = torch.tensor([names[name] for name in labels])
    classes = torch.zeros(len(names), texts.shape[1]).index_add(
        0, ids, torch.nn.functional.normalize(texts.float(), dim=-1)
    )
    both = {"text_to_image": (texts, images), "image_to_text": (images, texts)}
    out = {
        way: metrics.retrieval_metrics(x, y, ids_x=ids, ids_y=ids, k=RECALLS)
        for way, (x, y) in both.items()
    }
    out["zero_shot"] = {
        f"accuracy@{k}": metrics.zero_shot_accuracy(images, classes, ids, k=k).item()
        for k in RECALLS
    }
    out["zero_shot"] |= {f"chance@{k}": min(k, len(names)) / len(names) for k in RECALLS}
    return out


def hardest_others(scores: Tensor, forbidden: Tensor, count: int) -> Tensor:
    """For each row the `count` best-scoring columns that are not forbidden, [N, count].

    Args:
        scores: [N, N]; forbidden: [N, N] bool, True where a column is a true match of the row.
    """
    return scores.masked_fill(forbidden, float("-inf")).topk(count, dim=1).indices


def text_overlap(written: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """How much written texts share with one reference each: (BLEU-4 in 0..100, ROUGE-L F1 in 0..1).

    BLEU is sacrebleu's corpus score with add-one smoothing, for names are shorter than four words;
    ROUGE-L is the mean of rouge-score's.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    lower = [r.lower() for r in references]
    bleu = sacrebleu.corpus_bleu(
        list(written), [lower], smooth_method="add-k", smooth_value=1.0, lowercase=True
    )
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(r, w)["rougeL"].fmeasure for r, w in zip(lower, written, strict=True)]
    return bleu.score, sum(scores) / max(1, len(scores))
