"""similarity_topk, retrieval_ranks and dual_softmax_match against their definitions.

Integer-valued inputs make every dot product exact, so that ties are real and results must be equal;
shapes span at least three tiles both ways once the tile is shrunk.
"""

import re

import pytest
import torch

import fusedmm
from fusedmm import attention_maps, metrics
from fusedmm.backends.tiled import tiles

# Not the `backend` of conftest.py: tiles need no extension.
BACKENDS = ["cpu", "reference"]
SHAPES = [(16, 16, 8), (5, 7, 3), (1, 9, 4), (9, 1, 4), (200, 333, 17), (0, 4, 3), (4, 0, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 64)
    monkeypatch.setattr(tiles, "COLS", 64)


def integers(*shape, seed=0, low=-3, high=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def lexicographic_topk(s, k):
    """Top k by (score descending, index ascending), in Python: independent of torch's sorts."""
    rows = [sorted(range(len(r)), key=lambda j: (-r[j], j))[:k] for r in s.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(s.shape[0], k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", BACKENDS)
def test_topk_ties_by_lowest_index(path, shape, dtype):
    M, N, D = shape
    x, y = integers(M, D, dtype=dtype), integers(N, D, seed=1, dtype=dtype)
    s = x.double() @ y.double().T
    for k in {0, min(1, N), min(3, N), N}:
        values, indices = fusedmm.similarity_topk(x, y, k, backend=path)
        expected = lexicographic_topk(s, k)
        assert torch.equal(indices, expected)
        assert values.dtype == torch.float32
        assert torch.equal(values.double(), s.gather(1, expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", BACKENDS)
def test_ranks_count_ties_against(path, shape):
    M, N, D = shape
    x, y = integers(M, D), integers(N, D, seed=1)
    positives = torch.randint(0, max(N, 1), (M,), generator=torch.Generator().manual_seed(2))
    s = (x @ y.T).tolist()
    expected = [
        sum(v >= row[p] for j, v in enumerate(row) if j != p) if p < N else N
        for row, p in zip(s, positives.tolist(), strict=True)
    ]
    ranks = fusedmm.retrieval_ranks(x, y, positives, backend=path)
    assert ranks.dtype == torch.int64 and ranks.tolist() == expected


@pytest.mark.parametrize("path", BACKENDS)
def test_ranks_of_equal_columns_are_equal(path):
    """Copies of the positive must tie bit for bit wherever their tile is, also ragged ones."""
    x = torch.randn(70, 33, generator=torch.Generator().manual_seed(0))
    y = torch.randn(1, 33, generator=torch.Generator().manual_seed(1)).expand(150, 33)
    ranks = fusedmm.retrieval_ranks(x, y, torch.arange(70) * 2, backend=path)
    assert ranks.tolist() == [149] * 70


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_changes_nothing(default):
    g = torch.Generator().manual_seed(0)
    x, y, lse = torch.randn(50, 64, generator=g), torch.randn(50, 64, generator=g), torch.zeros(50)

    def everything():
        q, k, of = x[None, None], y[None, None], lse[None, None]
        return [
            *fusedmm.similarity_topk(x, y, 3),
            fusedmm.retrieval_ranks(x, y),
            *fusedmm.dual_softmax_match(x, y, 1.0),
            metrics.mean_average_precision(*metrics.relevant_ranks(x, y)),
            attention_maps.attention_received(q, k, of),
            attention_maps.attention_entropy(q, k, of),
            *attention_maps.attention_links(q, k, of, 2),
        ]

    want = everything()
    torch.set_default_dtype(default)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.parametrize("path", BACKENDS)
def test_ranks_outside_and_default(path):
    x = integers(4, 6)
    assert fusedmm.retrieval_ranks(x, x, torch.tensor([-1, 4, 9, 2]), backend=path)[
        :3
    ].tolist() == [4, 4, 4]
    eye = torch.eye(5)
    assert fusedmm.retrieval_ranks(eye, eye, backend=path).tolist() == [0] * 5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", BACKENDS)
def test_match_is_mutual_best(path, shape):
    M, N, D = shape
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(M, D, generator=generator), torch.randn(N, D, generator=generator)
    for threshold in (0.0, 0.2):
        pairs, confidence = fusedmm.dual_softmax_match(x, y, 2.0, threshold=threshold, backend=path)
        s = 2.0 * x.double() @ y.double().T
        p = (s - s.logsumexp(0) + s - s.logsumexp(1, keepdim=True)).exp()
        expected = [
            (i, j)
            for i in range(M)
            for j in range(N)
            if p[i, j] > threshold and p[i, j] == p[i].max() and p[i, j] == p[:, j].max()
        ]
        assert [tuple(q) for q in pairs.tolist()] == expected
        torch.testing.assert_close(
            confidence.double(),
            torch.tensor([p[i, j] for i, j in expected], dtype=torch.float64),
            rtol=2e-5,
            atol=0,
        )


@pytest.mark.parametrize("path", BACKENDS)
def test_match_survives_underflow_of_p(path):
    """At scale 1e4 most of p underflows; the mutual best are still the exact pairs."""
    x = torch.nn.functional.normalize(torch.randn(130, 16, generator=torch.Generator()), dim=1)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(5))
    pairs, confidence = fusedmm.dual_softmax_match(x, x[order], 1e4, backend=path)
    assert torch.equal(order[pairs[:, 1]], pairs[:, 0]) and len(pairs) == 130
    assert torch.isfinite(confidence).all() and (confidence > 0.99).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_normalize_is_cosine(dtype):
    x, y = torch.randn(70, 20).to(dtype), torch.randn(80, 20).to(dtype)
    backend = "reference" if dtype == torch.float64 else "cpu"
    values, indices = fusedmm.similarity_topk(x, y, 4, normalize=True, backend=backend)
    s = (
        torch.nn.functional.normalize(x.double(), dim=1)
        @ torch.nn.functional.normalize(y.double(), dim=1).mT
    )
    torch.testing.assert_close(values.double(), s.topk(4).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(s.gather(1, indices), values.double(), atol=1e-6, rtol=0)


def test_leading_dimensions_and_strides():
    x, y = integers(2, 3, 6, 40), integers(2, 3, 6, 90, seed=1)  # transposed below: D = 6
    values, indices = fusedmm.similarity_topk(x.mT, y.mT, 5, backend="cpu")
    ranks = fusedmm.retrieval_ranks(x.mT, y.mT, indices[..., 2].contiguous(), backend="cpu")
    for a in range(2):
        for b in range(3):
            v, i = fusedmm.similarity_topk(x[a, b].T, y[a, b].T, 5, backend="reference")
            assert torch.equal(values[a, b], v) and torch.equal(indices[a, b], i)
            r = fusedmm.retrieval_ranks(x[a, b].T, y[a, b].T, i[:, 2], backend="reference")
            assert torch.equal(ranks[a, b], r)


@pytest.mark.parametrize("path", BACKENDS)
def test_nan_stays_in_its_row_and_never_wins_a_rank(path):
    x, y = integers(80, 5), integers(80, 5, seed=1)
    clean = fusedmm.retrieval_ranks(x, y, backend=path)
    x[3, 2] = float("nan")
    ranks = fusedmm.retrieval_ranks(x, y, backend=path)
    assert ranks[3] == 79
    keep = torch.arange(80) != 3
    assert torch.equal(ranks[keep], clean[keep])
    values, indices = fusedmm.similarity_topk(x, y, 2, backend=path)
    assert values[3].isnan().all() and indices[3].tolist() == [0, 1]
    assert not values[keep].isnan().any()
    pairs, confidence = fusedmm.dual_softmax_match(x, y, 1.0, backend=path)
    assert not confidence.isnan().any()


@pytest.mark.parametrize("normalize", [False, True])
def test_topk_gradcheck(normalize):
    x, y = torch.randn(5, 4).double(), torch.randn(9, 4).double()
    x.requires_grad_(), y.requires_grad_()

    def op(x, y):
        return fusedmm.similarity_topk(x, y, 3, normalize=normalize, backend="reference")[0]

    assert torch.autograd.gradcheck(op, (x, y))


def test_topk_gradient_of_the_tiled_backend():
    x, y = torch.randn(70, 8), torch.randn(90, 8)
    a = [t.clone().requires_grad_() for t in (x, y)]
    b = [t.clone().requires_grad_() for t in (x, y)]
    weight = torch.randn(70, 3)
    (fusedmm.similarity_topk(*a, 3, backend="cpu")[0] * weight).sum().backward()
    ((b[0] @ b[1].T).topk(3).values * weight).sum().backward()
    for got, expected in zip(a, b, strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("path", BACKENDS)
def test_opcheck_compile_and_autocast(path):
    ops = torch.ops.fusedmm
    x, y = integers(6, 4), integers(9, 4, seed=1)
    positives = torch.arange(6)[None]
    torch.library.opcheck(
        ops.similarity_topk_fwd, (x[None].requires_grad_(), y[None], 3, True, path)
    )
    torch.library.opcheck(ops.retrieval_ranks_fwd, (x[None], y[None], positives, False, path))
    torch.library.opcheck(ops.dual_softmax_match_fwd, (x.detach(), y, torch.ones(1), path))
    x = x.detach()
    compiled = torch.compile(
        lambda x, y: fusedmm.similarity_topk(x, y, 3, backend=path),
        fullgraph=True,
        backend="aot_eager",
    )
    for got, expected in zip(
        compiled(x, y), fusedmm.similarity_topk(x, y, 3, backend=path), strict=True
    ):
        assert torch.equal(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = fusedmm.similarity_topk(x * 91, y * 93, 3, backend=path)
    assert values.dtype == torch.float32
    exact = (x * 91).bfloat16().double() @ (y * 93).bfloat16().double().T
    torch.testing.assert_close(values.double(), exact.topk(3).values, rtol=1e-6, atol=0)


def test_confidence_has_no_gradient():
    x = torch.randn(6, 4, requires_grad=True)
    _, confidence = fusedmm.dual_softmax_match(x, x, 3.0)
    assert not confidence.requires_grad


X, Y = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: fusedmm.similarity_topk(X, Y, 6), ValueError,
         "similarity_topk: k: expected an integer in [0, 5] to match the rows of y, got 6"),
        (lambda: fusedmm.similarity_topk(X, Y, True), TypeError,
         "similarity_topk: k: expected an integer, got bool"),
        (lambda: fusedmm.similarity_topk(X, Y[:, :2], 1), ValueError,
         "similarity_topk: y: expected shape [5, 3] to match x, got [5, 2]"),
        (lambda: fusedmm.retrieval_ranks(X, Y), ValueError,
         "retrieval_ranks: y: expected as many rows as x, 4, got 5"),
        (lambda: fusedmm.retrieval_ranks(X, Y, torch.zeros(4)), ValueError,
         "retrieval_ranks: positives: expected dtype int64, got float32"),
        (lambda: fusedmm.dual_softmax_match(X[None], Y[None], 1.0), ValueError,
         "dual_softmax_match: x: expected 2 dimensions [M, D], got shape [1, 4, 3]"),
        (lambda: fusedmm.dual_softmax_match(X, Y, 1.0, threshold=2), ValueError,
         "dual_softmax_match: threshold: expected a number in [0, 1], got 2"),
        (lambda: fusedmm.dual_softmax_match(X, Y, torch.ones(2)), ValueError,
         "dual_softmax_match: scale: expected a scalar, got shape [2]"),
        (lambda: fusedmm.retrieval_ranks(X.double(), X.double(), backend="cpu"),
         NotImplementedError, "cpu: torch.float64 not in float32, float16, bfloat16"),
        (lambda: fusedmm.retrieval_ranks(X, X, backend="triton"),
         NotImplementedError, "triton: inputs are on cpu"),
    ],
)  # fmt: skip
def test_rejects_bad_input(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_memory_stays_below_the_matrix(monkeypatch):
    """The largest tensor that the tiled path creates is a tile or an [M, k] result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    M, N, D, k = 700, 900, 8, 3
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    x, y = torch.randn(M, D), torch.randn(N, D)
    from fusedmm.backends.tiled import dual_softmax_match, retrieval_ranks, similarity_topk

    with Watch():
        similarity_topk.fwd(x[None], y[None], k, False)
        retrieval_ranks.fwd(x[None], y[None], torch.arange(M)[None], False)
        dual_softmax_match.fwd(x, y, torch.ones(1))
    assert 0 < largest <= max(M * k * 8, 64 * 64 * 8, (M + N) * D * 4)
