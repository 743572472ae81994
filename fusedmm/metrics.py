"""Retrieval and zero-shot metrics from ranks alone: the similarity matrix is never stored.

A query's relevant items are named by positives (one each) or by equal ids (any number). Ranks count
ties against the query, so that a constant model scores nothing; torchmetrics breaks ties by order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import check
from .ops.retrieval_ranks import retrieval_ranks

# Pairs whose ranks are computed in one call: bounds the copies of x to this many rows.
_CHUNK = 16384


def matches_by_id(ids_x: Tensor, ids_y: Tensor) -> tuple[Tensor, Tensor]:
    """rows, cols [P] of all pairs with ids_x[row] == ids_y[col], by row, then by column.

    Args:
        ids_x, ids_y: [M], [N] integers, same device.
    Memory: O(M + N + P).
    """
    sorted_y, order = ids_y.sort(stable=True)
    first = torch.searchsorted(sorted_y, ids_x)
    count = torch.searchsorted(sorted_y, ids_x, right=True) - first
    rows = torch.repeat_interleave(count)
    within = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    return rows, order[first[rows] + within]


def relevant_ranks(
    x: Tensor,
    y: Tensor,
    *,
    positives: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """rows, ranks [P] int64 of every relevant item: its query and its 0-based rank among all of y.

    Args:
        x, y: [M, D] queries, [N, D] items.
        positives: [M] int64, the one relevant item of each query; default i.
        ids_x, ids_y: [M], [N] int64, equal ids are relevant; instead of positives.
        normalize, backend: as in retrieval_ranks.
    Raises: ValueError, positives together with ids, one of the ids alone, and what
        retrieval_ranks raises.
    """
    op = "relevant_ranks"
    if (ids_x is None) != (ids_y is None):
        raise check.bad(op, "ids_y" if ids_y is None else "ids_x", "both ids or none", None)
    if ids_x is None:
        _within(op, "positives", positives, y, "y")
        ranks = retrieval_ranks(x, y, positives, normalize=normalize, backend=backend)
        return torch.arange(len(ranks), device=ranks.device), ranks
    if positives is not None:
        raise check.bad(op, "positives", "None, since ids are given", "a tensor")
    check.shape(op, "ids_x", ids_x, x.shape[:1], "x")
    check.shape(op, "ids_y", ids_y, y.shape[:1], "y")
    rows, cols = matches_by_id(ids_x, ids_y)
    ranks = [
        retrieval_ranks(x[r], y, c, normalize=normalize, backend=backend)
        for r, c in zip(rows.split(_CHUNK), cols.split(_CHUNK), strict=True)
    ]
    return rows, torch.cat(ranks)


def recall_at_k(rows: Tensor, ranks: Tensor, k: int) -> Tensor:
    """Mean over queries of the share of their relevant items among the k best; scalar fp32.

    Args:
        rows, ranks: from relevant_ranks. Queries without relevant items do not count.
        k: at least 1.
    """
    hits, count = _per_query(rows, (ranks < _positive("recall_at_k", k)).float())
    return (hits / count).mean()


def hit_rate_at_k(rows: Tensor, ranks: Tensor, k: int) -> Tensor:
    """Share of queries with a relevant item among the k best: "R@k" of image-text papers."""
    hits, _ = _per_query(rows, (ranks < _positive("hit_rate_at_k", k)).float())
    return (hits > 0).float().mean()


def precision_at_k(rows: Tensor, ranks: Tensor, k: int) -> Tensor:
    """Mean over queries of the share of relevant items among the k best; scalar fp32."""
    hits, _ = _per_query(rows, (ranks < _positive("precision_at_k", k)).float())
    return (hits / k).mean()


def mean_average_precision(rows: Tensor, ranks: Tensor) -> Tensor:
    """mAP: mean over queries of the mean, over relevant items, of the precision at their rank."""
    order = ranks.sort(stable=True).indices
    order = order[rows[order].sort(stable=True).indices]  # by query, then by rank
    rows, ranks = rows[order], ranks[order]
    _, count = _per_query(rows, torch.ones_like(ranks, dtype=torch.float32))
    start = (count.cumsum(0) - count).long().repeat_interleave(count.long())
    above = torch.arange(1, len(ranks) + 1, device=ranks.device) - start
    average, count = _per_query(rows, above.float() / (ranks + 1))
    return (average / count).mean()


def median_rank(rows: Tensor, ranks: Tensor) -> Tensor:
    """Median over queries of the 1-based rank of their best relevant item; scalar fp32."""
    queries, at = rows.unique(return_inverse=True)
    best = torch.full_like(queries, torch.iinfo(torch.int64).max)
    best = best.scatter_reduce(0, at, ranks, "amin")
    ordered = best.sort().values.float() + 1.0
    n = len(ordered)
    if n == 0:
        return torch.tensor(float("nan"), dtype=torch.float32, device=ranks.device)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def retrieval_metrics(
    x: Tensor,
    y: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    positives: Tensor | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> dict[str, float]:
    """All retrieval metrics of queries x against items y, by cosine similarity.

    Args:
        x, y, positives, ids_x, ids_y, normalize, backend: as in relevant_ranks.
        k: the cut-offs.
    Returns: "recall@k", "hit_rate@k", "precision@k" for each k, "map" and "median_rank".
    """
    rows, ranks = relevant_ranks(
        x, y, positives=positives, ids_x=ids_x, ids_y=ids_y, normalize=normalize, backend=backend
    )
    values = {}
    for name, metric in (
        ("recall", recall_at_k),
        ("hit_rate", hit_rate_at_k),
        ("precision", precision_at_k),
    ):
        values |= {f"{name}@{n}": metric(rows, ranks, n).item() for n in k}
    values["map"] = mean_average_precision(rows, ranks).item()
    values["median_rank"] = median_rank(rows, ranks).item()
    return values


def zero_shot_accuracy(
    x: Tensor,
    classes: Tensor,
    labels: Tensor,
    *,
    k: int = 1,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Share of rows whose class is among the k most similar class embeddings; scalar fp32.

    Args:
        x: [M, D] embeddings, say of images.
        classes: [C, D] one embedding a class, say the mean over prompts.
        labels: [M] int64 in [0, C).
        k: at least 1.
        normalize, backend: as in retrieval_ranks.
    """
    _within("zero_shot_accuracy", "labels", labels, classes, "classes")
    ranks = retrieval_ranks(x, classes, labels, normalize=normalize, backend=backend)
    return (ranks < _positive("zero_shot_accuracy", k)).float().mean()


def _within(op: str, arg: str, index: Tensor | None, of: Tensor, name: str) -> None:
    """Refuses an index of no row of `of`: beyond the last rank it would count among many best."""
    if index is None or index.numel() == 0:
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= len(of):
        got = low if low < 0 else high
        raise check.bad(op, arg, f"indices in [0, {len(of)}), the rows of {name}", got)


def _positive(op: str, k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k: expected an integer, got {type(k).__name__}")
    if k < 1:
        raise check.bad(op, "k", "an integer of at least 1", k)
    return k


def _per_query(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of values [P] by query, over the queries that occur, ascending."""
    queries, at, count = rows.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(queries)).scatter_add(0, at, values)
    return sums, count.float()
