"""What is particular to the GPU kernels, Triton's and CUDA's, against the fp64 reference: regimes,
the reference's own dropout mask, chunks of the losses, many heads, offsets beyond 2^31, limits.

The suites in tests/test_<op>.py run on these backends as well.
"""

import harness
import pytest
import torch
from torch import Tensor

import fusedmm

pytestmark = pytest.mark.gpu
triton = pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fusedmm import backends, problem  # noqa: E402
from fusedmm.backends.triton import _pairs  # noqa: E402
from fusedmm.tuning import lookup  # noqa: E402

# Share of the largest magnitude, at least 1: a few roundings of the stored type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)
SMALL = dict(num_warps=4, num_stages=1)


def usable(op: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The GPU backends of this build that have `op`."""
    side = problem.Side(16, 16, 64, 64)
    if op.endswith("attention"):
        asked = problem.AttentionProblem(op, 1, 1, side, side, dtype, "cuda")
    else:
        asked = problem.PairLossProblem(op, 1, 16, 16, 64, dtype, "cuda")
    return [name for name in ("triton", "cuda") if not backends.reject(name, op, asked)]


def on_each(*ops: str):
    """Parametrises a test over `ops` and the backends that have them."""
    return pytest.mark.parametrize("op, backend", [(op, b) for op in ops for b in usable(op)])


def on_each_dtype(dtypes: tuple[torch.dtype, ...], *ops: str):
    """As on_each, times the dtypes that each backend takes."""
    cells = [(op, b, dtype) for dtype in dtypes for op in ops for b in usable(op, dtype)]
    return pytest.mark.parametrize("op, backend, dtype", cells)


def outcome(op, tensors, options, backend: str, device: str, dtype) -> list[Tensor]:
    """Outputs, then the gradients of every tensor, on the CPU in fp64."""
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors.values()]
    torch.manual_seed(5)
    move = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in options.items()}
    named = dict(zip(tensors, leaves, strict=True))
    out = getattr(fusedmm, op)(**named, **move, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(6)
    upstream = [torch.randn(o.shape, generator=g).bfloat16().to(o) for o in outs]
    upstream = [torch.where(o.isfinite(), u, 0.0) for o, u in zip(outs, upstream, strict=True)]
    grads = torch.autograd.grad(outs, leaves, upstream)
    return [t.detach().cpu().double() for t in (*outs, *grads)]


def check(
    op: str, backend: str, tensors: dict[str, Tensor], options: dict, dtype: torch.dtype
) -> None:
    """`backend` in `dtype` against the reference in fp64 on the same numbers."""
    tensors = {k: t.to(dtype) for k, t in tensors.items()}
    got = outcome(op, tensors, options, backend, "cuda", dtype)
    want = outcome(op, tensors, options, "reference", "cpu", torch.float64)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        same = g == w  # -inf
        size = max(1.0, w[w.isfinite()].abs().max().item()) if w.isfinite().any() else 1.0
        error = torch.where(same, 0.0, (g - w).abs())
        assert error.max() <= TOLERANCE[dtype] * size, f"{op}: result {i}: {error.max():.3g}"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(op: str, B, H, M, N, D, Dx, Dy, bias=None) -> dict[str, Tensor]:
    if op == "bi_attention":
        sizes = dict(qk_x=(M, D), qk_y=(N, D), v_x=(M, Dx), v_y=(N, Dy))
    else:
        sizes = dict(q_x=(M, D), k_x=(M, D), v_x=(M, Dx), q_y=(N, D), k_y=(N, D), v_y=(N, Dy))
    tensors = {k: randn(B, H, *s, seed=i) for i, (k, s) in enumerate(sizes.items())}
    if bias is not None:
        b = randn(*(n if on else 1 for n, on in zip((B, H, M, N), bias, strict=True)), seed=9)
        tensors |= {"bias": b} if op == "bi_attention" else {"bias_xy": b, "bias_yx": b.mT.clone()}
    return tensors


def masks(B: int, M: int, N: int) -> dict[str, Tensor]:
    """Random, one batch item without any key."""
    g = torch.Generator().manual_seed(8)
    mask_x, mask_y = torch.rand(B, M, generator=g) > 0.4, torch.rand(B, N, generator=g) > 0.4
    mask_x[-1] = mask_y[-1] = False
    return dict(mask_x=mask_x, mask_y=mask_y)


# Whichever stream is short; one tile, three ragged tiles of 32 in several chunks, both long.
# Compiled tiles are larger: three of them, and more keys than a resident stream may have.
REGIMES = {
    "tiny": (36, 36),
    "y_resident": (75, 20),
    "x_resident": (20, 75),
    "long": (75, 70),
    "longer": (140, 150),
}


@pytest.fixture
def small_tiles():
    """Tiles of 32, so that three of them are a small problem, and short streams up to 32."""
    kernels = ("attend_fwd", "attend_dq", "attend_dkv", "attend_dbias", "delta", "owner_bwd",
               "dbias", "resident_fwd", "resident_bwd", "stats", "ds", "gemm")  # fmt: skip
    tile = dict(BLOCK_M=32, BLOCK_N=32, **SMALL)
    saved = dict(lookup._forced)
    for op in ("co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss"):
        for kernel in kernels:
            depth = dict(BLOCK_D=32) if kernel in ("stats", "ds", "gemm") else {}
            lookup._forced[op, kernel] = tile | depth
    yield
    lookup._forced.clear()
    lookup._forced.update(saved)


@pytest.mark.parametrize("regime", REGIMES)
@on_each_dtype(DTYPES, "bi_attention", "co_attention")
def test_everything_at_once(op, backend, regime, dtype, small_tiles):
    """Masks, a broadcast bias, the clamp, the reference's dropout, D != Dv, lse."""
    M, N = REGIMES[regime]
    options = dict(return_lse=True, dropout_p=0.3, scale=0.4, **masks(2, M, N))
    if op == "bi_attention":
        options["clamp"] = 1.5
    check(op, backend, streams(op, 2, 2, M, N, 24, 40, 16, bias=(1, 1, 0, 1)), options, dtype)


@pytest.mark.parametrize("regime", REGIMES)
@on_each_dtype(DTYPES, "bi_attention", "co_attention")
def test_nothing_at_all(op, backend, regime, dtype):
    M, N = REGIMES[regime]
    check(op, backend, streams(op, 1, 2, 2 * M, 2 * N, 64, 64, 64), dict(return_lse=True), dtype)


@on_each_dtype(DTYPES, "contrastive_loss", "sigmoid_loss")
@pytest.mark.parametrize("workspace", [1, 2**20], ids=["chunks", "whole"])
def test_losses_in_chunks(op, backend, workspace, dtype, monkeypatch, small_tiles):
    """Chunks of one tile's rows give what one chunk gives; both L2-normalise."""
    monkeypatch.setattr(_pairs, "WORKSPACE", workspace)
    tensors = dict(x=randn(2, 75, 40, seed=1), y=randn(2, 75, 40, seed=2))
    options = dict(reduction="none", logit_scale=torch.tensor(8.0))
    if op == "sigmoid_loss":
        options["logit_bias"] = -2.0
    for normalize in (False, True):
        check(op, backend, tensors, options | dict(normalize=normalize), dtype)


@on_each_dtype((torch.float32, torch.bfloat16), "bi_attention")
def test_deterministic_across_chunks(op, backend, dtype, small_tiles):
    tensors = streams(op, 1, 1, 150, 30, 32, 32, 32)
    first, again = (outcome(op, tensors, {}, backend, "cuda", dtype) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@on_each("bi_attention")
def test_more_heads_than_a_grid_axis_holds(op, backend):
    tensors = {k: t.bfloat16() for k, t in streams(op, 65537, 1, 1, 2, 8, 8, 8).items()}
    o_x, _ = fusedmm.bi_attention(*(t.cuda() for t in tensors.values()), backend=backend)
    want, _ = fusedmm.bi_attention(*tensors.values(), backend="reference")
    torch.testing.assert_close(o_x.cpu(), want, atol=4e-2, rtol=0)


@on_each("bi_attention")
def test_offsets_beyond_int32(op, backend):
    """Rows 2^31 elements apart."""
    stride = 2**31 // 16 + 64
    try:
        wide = torch.empty(17 * stride, dtype=torch.float16, device="cuda")
    except torch.OutOfMemoryError:
        pytest.skip("needs 4.6 GB of device memory")
    q = wide.as_strided((1, 1, 17, 16), (0, 0, stride, 1))
    q.copy_(randn(1, 1, 17, 16, seed=1))
    got = fusedmm.bi_attention(q, q, q, q, backend=backend)
    want = fusedmm.bi_attention(*[q.contiguous()] * 4, backend=backend)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@on_each("bi_attention", "co_attention")
def test_limits_are_named(op, backend):
    x = torch.zeros(1, 1, 4, 300, device="cuda")
    count = 4 if op == "bi_attention" else 6
    with pytest.raises(NotImplementedError, match=f"{backend}: D or Dv of 300 above 256"):
        getattr(fusedmm, op)(*[x] * count, backend=backend)
    x = x[..., :8].double()
    with pytest.raises(NotImplementedError, match="float64 not in float32, float16, bfloat16"):
        getattr(fusedmm, op)(*[x] * count, backend=backend)


def test_compiled_kernels_come_first():
    x = torch.randn(1, 1, 20, 16, device="cuda").bfloat16()
    want = usable("bi_attention")[-1]
    with harness.recorded("bi_attention") as calls:
        fusedmm.bi_attention(x, x, x, x)
    assert calls["_fwd"][-1] == want


def test_tables_have_every_kernel():
    """Each row names a tile, its evidence, and both precisions up to the widest head."""
    for op in ("co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss"):
        rows = lookup._rows(op, "default")
        assert all(row["evidence"] for row in rows)
        for kernel in {row["kernel"] for row in rows}:
            assert {row["bits"] for row in rows if row["kernel"] == kernel} == {16, 32}
