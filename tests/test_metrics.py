"""fusedmm.metrics against torchmetrics on the same data, and the cases where they must differ."""

import re

import pytest
import torch

from fusedmm import metrics


def data(M=40, N=60, D=8, n_ids=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, D, generator=generator) for n in (M, N))
    ids_x, ids_y = (torch.randint(0, n_ids, (n,), generator=generator) for n in (M, N))
    return x, y, ids_x, ids_y


def judged(x, y, ids_x, ids_y):
    """preds, target, indexes as torchmetrics wants them: the whole matrix, flat, preds positive
    (its average precision drops items of non-positive score)."""
    s = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
    target = ids_x[:, None] == ids_y
    indexes = torch.arange(len(x))[:, None].expand_as(s)
    return s.double().flatten() + 2.0, target.flatten(), indexes.flatten()


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("n_ids", [3, 13, 70])
def test_agrees_with_torchmetrics(k, n_ids):
    retrieval = pytest.importorskip("torchmetrics.retrieval", reason="torchmetrics not installed")
    x, y, ids_x, ids_y = data(n_ids=n_ids)
    preds, target, indexes = judged(x, y, ids_x, ids_y)
    got = metrics.retrieval_metrics(x, y, ids_x=ids_x, ids_y=ids_y, k=(k,))
    for name, metric in (
        (f"recall@{k}", retrieval.RetrievalRecall(top_k=k, empty_target_action="skip")),
        (f"precision@{k}", retrieval.RetrievalPrecision(top_k=k, empty_target_action="skip")),
        (f"hit_rate@{k}", retrieval.RetrievalHitRate(top_k=k, empty_target_action="skip")),
        ("map", retrieval.RetrievalMAP(empty_target_action="skip")),
    ):
        expected = metric(preds, target, indexes=indexes).item()
        assert got[name] == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("k", [1, 3])
def test_zero_shot_agrees_with_torchmetrics(k):
    functional = pytest.importorskip(
        "torchmetrics.functional.classification", reason="torchmetrics not installed"
    )
    x, classes, _, _ = data(M=200, N=11)
    labels = torch.randint(0, 11, (200,), generator=torch.Generator().manual_seed(4))
    logits = (
        torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(classes, dim=1).T
    )
    expected = functional.multiclass_accuracy(logits, labels, 11, average="micro", top_k=k)
    assert metrics.zero_shot_accuracy(x, classes, labels, k=k).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


@pytest.mark.parametrize("M", [7, 8])
def test_median_rank_is_numpys(M):
    x, y, _, _ = data(M=M, N=M)
    rows, ranks = metrics.relevant_ranks(x, y)
    s = x @ y.T
    expected = 1 + (s >= s.diagonal()[:, None]).sum(1) - 1
    assert metrics.median_rank(rows, ranks).item() == expected.double().quantile(0.5).item()


def test_median_takes_the_best_of_several():
    rows, ranks = torch.tensor([0, 0, 1, 2]), torch.tensor([9, 4, 2, 0])
    assert metrics.median_rank(rows, ranks).item() == 3.0


def test_matches_by_id():
    _, _, ids_x, ids_y = data(n_ids=5)
    rows, cols = metrics.matches_by_id(ids_x, ids_y)
    expected = (ids_x[:, None] == ids_y).nonzero()
    assert torch.equal(torch.stack([rows, cols], 1), expected)


def test_chunks_of_pairs_change_nothing(monkeypatch):
    x, y, ids_x, ids_y = data(n_ids=4)
    whole = metrics.relevant_ranks(x, y, ids_x=ids_x, ids_y=ids_y)
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    for a, b in zip(whole, metrics.relevant_ranks(x, y, ids_x=ids_x, ids_y=ids_y), strict=True):
        assert torch.equal(a, b)


def test_a_constant_model_scores_nothing():
    x, y = torch.ones(20, 4), torch.ones(20, 4)
    got = metrics.retrieval_metrics(x, y, k=(1, 5))
    assert got["recall@1"] == got["recall@5"] == 0.0 and got["median_rank"] == 20.0
    assert metrics.zero_shot_accuracy(x, y, torch.arange(20)).item() == 0.0


def test_a_perfect_model_scores_all():
    x = torch.eye(6)
    got = metrics.retrieval_metrics(x, x, k=(1,))
    assert got == {
        "recall@1": 1.0, "hit_rate@1": 1.0, "precision@1": 1.0, "map": 1.0, "median_rank": 1.0
    }  # fmt: skip


X = torch.zeros(3, 2)
IDS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: metrics.relevant_ranks(X, X, ids_x=IDS), "ids_y: expected both ids or none"),
        (lambda: metrics.relevant_ranks(X, X, ids_x=IDS, ids_y=IDS, positives=IDS),
         "positives: expected None, since ids are given"),
        (lambda: metrics.relevant_ranks(X, X, ids_x=IDS[:2], ids_y=IDS),
         "ids_x: expected shape [3] to match x, got [2]"),
        (lambda: metrics.retrieval_metrics(X, X, positives=IDS + 3, k=(5,)),
         "relevant_ranks: positives: expected indices in [0, 3), the rows of y, got 3"),
        (lambda: metrics.zero_shot_accuracy(X, X, IDS - 1, k=5),
         "zero_shot_accuracy: labels: expected indices in [0, 3), the rows of classes, got -1"),
        (lambda: metrics.recall_at_k(IDS, IDS, 0),
         "recall_at_k: k: expected an integer of at least 1, got 0"),
        (lambda: metrics.retrieval_metrics(X, torch.zeros(4, 2)),
         "retrieval_ranks: y: expected as many rows as x, 3, got 4"),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
