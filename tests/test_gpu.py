"""What is particular to the GPU kernels, Triton's and CUDA's, against the fp64 reference: regimes,
the reference's own dropout mask, chunks of the losses, many heads, offsets beyond 2^31, limits.

The suites in tests/test_<op>.py run on these backends as well.
"""

import contextlib
import gc
from collections.abc import Iterator

import harness
import pytest
import torch
import vgpu
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmm

pytestmark = pytest.mark.gpu
triton = pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fusedmm import backends, problem  # noqa: E402
from fusedmm.backends.native import extension  # noqa: E402
from fusedmm.backends.triton import _pairs, bi_attention  # noqa: E402
from fusedmm.ops import pairs  # noqa: E402
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


on_cuda = pytest.mark.skipif("cuda" not in usable("sigmoid_loss"), reason="not built")


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
    op: str, backend: str, tensors: dict[str, Tensor], options: dict, dtype: torch.dtype, reach=0
) -> None:
    """`backend` in `dtype` against the reference in fp64 on the same numbers. Scores as large as
    `reach` are rounded by so much that results move."""
    tolerance = TOLERANCE[dtype] + 4 * reach * torch.finfo(torch.float32).eps
    tensors = {k: t.to(dtype) for k, t in tensors.items()}
    got = outcome(op, tensors, options, backend, "cuda", dtype)
    want = outcome(op, tensors, options, "reference", "cpu", torch.float64)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        same = g == w  # -inf
        size = max(1.0, w[w.isfinite()].abs().max().item()) if w.isfinite().any() else 1.0
        error = torch.where(same, 0.0, (g - w).abs())
        assert error.max() <= tolerance * size, f"{op}: result {i}: {error.max():.3g}"


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
# Compiled tiles are larger, and resident streams have up to 256 tokens.
REGIMES = {
    "tiny": (36, 36),
    "y_resident": (75, 20),
    "x_resident": (20, 75),
    "long": (75, 70),
    "longer": (140, 150),
    "longest": (260, 270),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32, so that three of them are a small problem, and short streams up to 32."""
    monkeypatch.setattr(bi_attention, "ROWS", 32)
    kernels = (
        "attend_fwd", "attend_fwd_few", "attend_dq", "attend_dkv", "attend_dbias",
        "owner_bwd", "owner_bwd_few", "dbias", "resident_fwd", "resident_bwd", "stats", "ds",
        "gemm",
    )  # fmt: skip
    tile = dict(BLOCK_M=32, BLOCK_N=32, **SMALL)
    saved = dict(lookup._forced)
    for op in ("co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss"):
        for kernel in kernels:
            depth = dict(BLOCK_D=32) if kernel in ("stats", "ds", "gemm") else {}
            lookup._forced[op, kernel] = tile | depth
        lookup._forced[op, "delta"] = dict(BLOCK_M=32, **SMALL)
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


# What is added to the scores of a key, by its tile of 64.
LEVELS = {
    "climb": [0, 30, 60, 90],
    "fall": [90, 60, 30, 0],
    "leap": [-600, 600, -600, 600],
    "low": [-2000] * 4,
}


@pytest.mark.parametrize("size", [(230, 200), (230, 40)], ids=["long", "resident"])
@pytest.mark.parametrize("levels", LEVELS)
@on_each_dtype(DTYPES, "bi_attention", "co_attention")
def test_references_of_tiles_far_apart(op, backend, dtype, levels, size):
    """What the exponents of a row refer to is taken from its first keys and kept while it serves.
    "low": there are none among these, and then there are, where a reference of 0 does not serve."""
    tensors = streams(op, 2, 1, *size, 32, 32, 32)
    level = torch.tensor(LEVELS[levels]).repeat_interleave(64)
    for name, t in tensors.items():
        if name.startswith(("q", "k")):
            # Two columns: this stream's level, and 1 for that of the other one.
            mine, other = (0, 1) if name[-1] == "x" else (1, 0)
            t[..., mine] = level[: t.shape[2]] if name[0] == "k" or "qk" in name else 0.0
            t[..., other] = 1.0 if name[0] == "q" else 0.0
    options = dict(scale=1.0, return_lse=True)
    if levels == "low":
        kept = torch.arange(230).expand(2, -1) >= torch.tensor([[0], [70]])
        options |= dict(mask_x=kept, mask_y=kept[:, : size[1]])
    check(op, backend, tensors, options, dtype, reach=level.abs().max().item())


@on_each_dtype(DTYPES, "bi_attention")
def test_scores_of_masked_keys_that_climb(op, backend, dtype):
    """Beyond all exponents of the kept ones: they are queries still, and no row refers to them."""
    tensors = streams(op, 1, 1, 200, 40, 32, 32, 32)
    kept = torch.arange(40)[None] < 30
    tensors["qk_x"][..., 0] = torch.tensor([0.0, 300.0, 0.0, 150.0]).repeat_interleave(64)[:200]
    tensors["qk_y"][..., 0] = torch.where(kept[0], 0.0, 1.0)
    options = dict(scale=1.0, return_lse=True, mask_y=kept)
    check(op, backend, tensors, options, dtype, reach=300)


@pytest.mark.parametrize("level, slope", [(50, -1.0), (68, -0.25)], ids=["beyond", "between"])
@on_each_dtype(DTYPES, "bi_attention")
def test_masked_keys_above_all_others_of_a_row(op, backend, dtype, level, slope):
    """By more than exponents of fp32 hold, in rows that are below others by as much."""
    tensors = streams(op, 1, 1, 200, 40, 32, 32, 32)
    kept = torch.arange(40)[None] < 30
    tensors["qk_x"] *= 0.1
    tensors["qk_x"][..., 0] = torch.tensor([1.0, -1.0]).repeat(100) * level
    tensors["qk_y"][..., 0] = torch.where(kept[0], 1.0, slope)
    options = dict(scale=1.0, return_lse=True, mask_y=kept)
    check(op, backend, tensors, options, dtype, reach=level)


@pytest.mark.parametrize("short", [40, 100])
@on_each_dtype(DTYPES, "bi_attention")
def test_columns_that_end_far_from_the_last_tile(op, backend, dtype, short):
    """Their largest scores lie between those of tiles far apart, and some beyond reach of any."""
    tensors = streams(op, 1, 1, 200, short, 32, 32, 32)
    tensors["qk_x"][..., 0] = torch.tensor([100.0, -1.0, 100.0, -2.0]).repeat_interleave(64)[:200]
    tensors["qk_y"][..., 0] = torch.tensor([0.5, 1.0, -1.0, 0.0]).repeat(25)[:short]
    check(op, backend, tensors, dict(scale=1.0, return_lse=True), dtype, reach=100)


@on_cuda
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("short", [20, 50, 100, 200])
@pytest.mark.parametrize("op", ["bi_attention", "co_attention"])
def test_short_streams_of_every_kernel(op, short, D):
    """Every tile of the compiled kernels; last warps have rows past the end, or none."""
    options = dict(return_lse=True, dropout_p=0.2, scale=0.4, **masks(2, 140, short))
    tensors = streams(op, 2, 1, 140, short, D, D, D - 8, bias=(0, 1, 1, 1))
    check(op, "cuda", tensors, options, torch.float16)


@pytest.mark.parametrize("sizes", [(150, 1), (1, 20)], ids=str)
@on_each_dtype(DTYPES, "bi_attention", "co_attention")
def test_one_key(op, backend, dtype, sizes):
    """Whatever its score, its value is the result, to the bit in 16-bit types: the correction of
    the scores' gradients is to cancel."""
    tensors = {k: t.to(dtype) for k, t in streams(op, 1, 2, *sizes, 64, 64, 64).items()}
    o_x, o_y, *_ = outcome(op, tensors, {}, backend, "cuda", dtype)
    one, alone = (o_x, tensors["v_y"]) if sizes[1] == 1 else (o_y, tensors["v_x"])
    atol = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(one, alone.double().expand_as(one), rtol=0, atol=atol)


@on_cuda
@pytest.mark.parametrize("size", [60, 150], ids=["resident", "long"])
@pytest.mark.parametrize("op", ["bi_attention", "co_attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_take_all(op, dtype, size):
    """Where one key's probability is 1 the gradients of its scores cancel, as eager's do: in all
    rows of 16-bit types; in fp32 where the result is the key's value to the bit."""
    tensors = streams(op, 1, 2, size, size, 64, 64, 64)
    partners = [("qk_x", "qk_y")] if op == "bi_attention" else [("q_x", "k_y"), ("q_y", "k_x")]
    for name, other in partners:
        tensors[other] = tensors[other].sign()
        tensors[name] = 1000 * tensors[other]  # scores of 8000 with the same token of the other
    tensors = {k: t.to(dtype) for k, t in tensors.items()}
    grads = dict(zip(tensors, outcome(op, tensors, {}, "cuda", "cuda", dtype)[2:], strict=True))
    for name, grad in grads.items():
        if name[0] in "qk":
            exact = (grad == 0).all(-1).double().mean()
            assert exact >= (0.5 if dtype == torch.float32 else 1.0), f"{name}: {exact:.3f}"


@on_each_dtype((torch.bfloat16,), "bi_attention", "co_attention")
def test_tiles_of_a_full_device(op, backend, dtype, monkeypatch):
    """Larger tiles where enough programs remain for every processor."""
    monkeypatch.setattr(lookup, "processors", lambda index: 1)
    check(op, backend, streams(op, 1, 1, 300, 280, 64, 64, 64), dict(return_lse=True), dtype)


@on_cuda
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("op", ["bi_attention", "co_attention"])
def test_blocks_for_every_multiprocessor(op, D):
    """The compiled kernels' tallest tiles of each width, on a device of up to 132; they end beyond
    the rows."""
    check(op, "cuda", streams(op, 1, 66, 128, 130, D, D, D), {}, torch.bfloat16)


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["bi_attention", "co_attention"])
def test_few_rows_share_their_walks(op, dtype):
    """Blocks of the compiled kernels that see some of the keys each, one share without any kept."""
    options = dict(return_lse=True, dropout_p=0.3, scale=0.4, **masks(2, 2500, 140))
    options["mask_x"][0, :1300] = False
    tensors = streams(op, 2, 2, 2500, 140, 72, 80, 66, bias=(1, 1, 0, 1))
    check(op, "cuda", tensors, options, dtype)


@pytest.mark.parametrize("sizes", [(150, 100), (150, 140)], ids=["resident", "long"])
@on_each("bi_attention")
def test_devices_with_less_shared_memory(op, backend, sizes, monkeypatch):
    """Tiles that take no more than the 99 KiB of sm_86 and sm_89."""
    if backend != "triton" or not vgpu.active():
        pytest.skip("counts the shared memory of Triton kernels on the virtual GPU")
    if torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("Triton makes other code for sm_90, whose devices have 227 KiB")
    monkeypatch.setattr(lookup, "shared", lambda index: 99 * 1024)
    monkeypatch.setattr(lookup, "processors", lambda index: 1)
    lookup._nearest.cache_clear()
    for width in (64, 128, 256):
        with vgpu.profile() as p:
            check(op, backend, streams(op, 1, 1, *sizes, *[width] * 3), {}, torch.bfloat16)
        assert max(r["smem"] + r["static_smem"] for r in p.launches) <= 99 * 1024
    lookup._nearest.cache_clear()


@contextlib.contextmanager
def workspace(backend: str, size: int) -> Iterator[None]:
    """No more than `size` bytes, or one tile's rows, for a loss's chunk."""
    if backend == "triton":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_pairs, "WORKSPACE", size)
            yield
        return
    before = extension._C_cuda.pair_workspace(size)
    try:
        yield
    finally:
        extension._C_cuda.pair_workspace(before)


@on_each_dtype(DTYPES, "contrastive_loss", "sigmoid_loss")
@pytest.mark.parametrize("size", [1, 2**20], ids=["chunks", "whole"])
def test_losses_in_chunks(op, backend, size, dtype, small_tiles):
    """Chunks of one tile's rows give what one chunk gives; both L2-normalise."""
    tensors = dict(x=randn(2, 150, 40, seed=1), y=randn(2, 150, 40, seed=2))
    options = dict(reduction="none", logit_scale=torch.tensor(8.0))
    if op == "sigmoid_loss":
        options["logit_bias"] = -2.0
    ids = torch.randint(60, (2, 150), generator=torch.Generator().manual_seed(3))
    for features in ({}, {"normalize": True}, {"ids_x": ids, "ids_y": ids.flip(0)}):
        with workspace(backend, size):
            check(op, backend, tensors, options | features, dtype)


@pytest.mark.parametrize("rows, columns", [(200, 200), (20, 8200)], ids=str)
@pytest.mark.parametrize("levels", ["climb", "leap"])
@on_each_dtype((torch.float32, torch.bfloat16), "contrastive_loss")
def test_scores_of_tiles_far_apart(op, backend, dtype, levels, rows, columns):
    """Beyond the reach of one reference for a tile's rows and columns; parts of few rows, many of
    them."""
    x, y = randn(rows, 32, seed=1) / 4, randn(columns, 32, seed=2) / 4
    level = torch.tensor(LEVELS[levels]).repeat_interleave(48)
    x[:, 0], x[:, 1] = level.repeat(2)[:rows], 1.0
    y[:, 0], y[:, 1] = 1.0, level.repeat(columns // 192 + 1)[:columns]
    options = dict(reduction="none", logit_scale=1.0)
    if rows < columns:
        options |= dict(direction="x", positives=torch.arange(rows))
    check(op, backend, dict(x=x, y=y), options, dtype, reach=2 * level.abs().max().item())


@on_each_dtype((torch.float32, torch.bfloat16), "contrastive_loss", "sigmoid_loss")
def test_losses_need_no_room_for_scores(op, backend, dtype, monkeypatch):
    """At the peak of forward and backward less than half of what s takes."""
    rows = 1536
    tensors = dict(x=randn(rows, 16, seed=1).to(dtype), y=randn(rows, 16, seed=2).to(dtype))
    options = dict(logit_scale=8.0) | (dict(logit_bias=-2.0) if op == "sigmoid_loss" else {})
    monkeypatch.setattr(pairs, "KEEP_BYTES", 2**17)
    with workspace(backend, 2**17):
        # Torch's products keep a workspace from their first call on.
        outcome(op, {k: t[:9] for k, t in tensors.items()}, options, backend, "cuda", dtype)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(op, tensors, options, backend, "cuda", dtype)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < rows * rows * dtype.itemsize / 2


@on_each_dtype(DTYPES, "contrastive_loss", "sigmoid_loss")
@pytest.mark.parametrize("D", [7, 33, 120, 200, 256, 300], ids=str)
def test_losses_of_any_width(op, backend, D, dtype):
    """Every compiled width, and beyond the widest; blocks that share a walk."""
    tensors = dict(x=randn(1, 70, D, seed=1), y=randn(1, 600, D, seed=2))
    tensors = {k: torch.nn.functional.normalize(t, dim=-1) for k, t in tensors.items()}
    ids = dict(ids_x=torch.arange(70)[None], ids_y=torch.arange(600)[None] % 90)
    options = dict(reduction="none", logit_scale=torch.full((1, 70), 9.0), **ids)
    if op == "sigmoid_loss":
        options["logit_bias"] = -2.0
    check(op, backend, tensors, options, dtype)


def products(run):
    """What `run` returns and how many products it leaves to torch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = run()
    names = ("aten::bmm", "aten::baddbmm")  # the virtual GPU calls the CPU's within
    outermost = (e for e in profile.events() if getattr(e.cpu_parent, "name", "") not in names)
    return out, sum(e.name in names for e in outermost)


@on_cuda
@pytest.mark.parametrize("rows, kept", [(63, 0), (64, 1), (255, 3), (256, 4), (10**6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["contrastive_loss", "sigmoid_loss"])
def test_backward_multiplies_only_what_was_not_kept(op, dtype, rows, kept, monkeypatch):
    """Room for `rows` products of rows holds `kept` of six chunks: 64, 64 and 22 rows twice."""
    leaves = [randn(2, 150, 264, seed=i).mul(0.1).to("cuda", dtype) for i in range(2)]
    leaves = [t.requires_grad_() for t in (*leaves, torch.tensor(8.0, device="cuda"))]
    options = dict(backend="cuda") | (dict(logit_bias=-2.0) if op == "sigmoid_loss" else {})

    def forward() -> Tensor:
        return getattr(fusedmm, op)(*leaves, **options)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    with workspace("cuda", 1):
        loss = forward()
        want = [loss, *backward()]
        monkeypatch.setattr(pairs, "KEEP_ROWS", 150)
        monkeypatch.setattr(pairs, "KEEP_BYTES", rows * 4 * 152)
        loss, count = products(forward)
        assert count == 6
        for _ in range(2):
            grads, count = products(backward)
            assert count == 3 * 6 - kept
            for got, w in zip((loss, *grads), want, strict=True):
                assert torch.equal(got, w)
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            loss = forward()
        assert torch.cuda.memory_allocated() - before < 4 * 152, "kept without need"


@on_cuda
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(y=t["y"][..., :8]), "internal: y: expected shape"),
        (lambda t: t.update(y=t["y"].half()), "internal: y: dtype or device"),
        (lambda t: t.update(y=t["y"].cpu()), "internal: y: dtype or device"),
        (lambda t: t.update(x=t["x"].double(), y=t["y"].double()), "internal: dtype Double"),
        (lambda t: t.update(x=t["x"][0]), "internal: x, y: expected 3 dimensions"),
        (lambda t: t.update(scale=t["scale"].expand(3)), "internal: logit_scale: expected shape"),
        (lambda t: t.update(positives=t["positives"].int()), "internal: positives: int64"),
        (lambda t: t.update(positives=t["positives"][:, 1:]), "internal: positives: expected"),
        (lambda t: t.update(ids_x=t["positives"]), "internal: ids_x, ids_y: one without"),
    ],
)
def test_wrong_calls_of_the_raw_losses_are_refused(change, message):
    x = randn(2, 20, 16, seed=1).cuda()
    named = dict(x=x, y=x, scale=x.new_ones(1), positives=torch.arange(20).expand(2, 20).cuda())
    named |= dict(ids_x=None, ids_y=None)
    ops = torch.ops._fusedmm_C
    ops.contrastive_loss_fwd(*named.values(), False, True, True, True)
    change(named)
    with pytest.raises(RuntimeError, match=message):
        ops.contrastive_loss_fwd(*named.values(), False, True, True, True)
    bias = x.new_zeros(1)
    scores = [named.pop(k) for k in ("x", "y", "scale")]
    with pytest.raises(RuntimeError, match=message):
        ops.sigmoid_loss_fwd(*scores, bias, *named.values(), True)


@on_cuda
def test_losses_without_memory_leave_torch_usable():
    """In the middle of forward, and of backward; afterwards the same call succeeds."""
    x, y = (randn(64, 100_000, seed=i).half().cuda().requires_grad_() for i in range(2))

    def loss() -> Tensor:
        return fusedmm.contrastive_loss(x, y, 10.0, normalize=True, backend="cuda")

    with harness.device_memory(20), pytest.raises(torch.OutOfMemoryError):
        loss()
    value = loss()
    with harness.device_memory(60), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(value, (x, y), retain_graph=True)
    assert torch.equal(loss(), value)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (x, y)))


@on_each_dtype((torch.float32, torch.bfloat16), "bi_attention")
def test_deterministic_across_chunks(op, backend, dtype, small_tiles):
    tensors = streams(op, 1, 1, 150, 30, 32, 32, 32)
    first, again = (outcome(op, tensors, {}, backend, "cuda", dtype) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


class Transfers(TorchDispatchMode):
    """The operators that would wait for the device or copy between it and the host; not inside
    our own, whose seed lies on the host: `watched` looks into those."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, leaves = func.overloadpacket.__name__, pytree.tree_leaves((args, kwargs, out))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        moves = "copy" in name or any(t.dim() for t in tensors if not t.is_cuda)
        waits = name in self.WAITS or (
            name.startswith("index") and any(t.dtype == torch.bool for t in tensors)
        )
        if (moves and len(devices) > 1) or (waits and "cuda" in devices):
            self.seen += [str(func)] if func.namespace not in ("fusedmm", "_fusedmm_C") else []
        return out

    def watched(self, run):
        def within(*args):
            with self:
                return run(*args)

        return within


@on_each_dtype(
    (torch.float32, torch.bfloat16), "bi_attention", "co_attention", "contrastive_loss",
    "sigmoid_loss",
)  # fmt: skip
def test_nothing_that_a_graph_cannot_capture(op, backend, dtype, monkeypatch):
    """No wait, no copy to or from the host, the same allocations at every call."""
    if op.endswith("attention"):
        tensors = streams(op, 2, 2, 300, 40, 32, 32, 32)
        options = {k: t.cuda() for k, t in masks(2, 300, 40).items()} | dict(dropout_p=0.1)
    else:
        tensors, options = {k: randn(150, 64, seed=i) for i, k in enumerate("xy")}, {}
        tensors |= dict(logit_scale=torch.tensor(8.0))
        if op == "sigmoid_loss":
            tensors |= dict(logit_bias=torch.tensor(-2.0))
    monkeypatch.setattr(pairs, "KEEP_ROWS", 1)
    leaves = {k: t.to("cuda", dtype).requires_grad_() for k, t in tensors.items()}
    if not op.endswith("attention"):
        leaves |= {k: t.detach().float().requires_grad_() for k, t in leaves.items() if not t.dim()}

    def call() -> tuple[int, int]:
        before = torch.cuda.memory_stats()
        outs = getattr(fusedmm, op)(**leaves, **options, backend=backend)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs])
        after = torch.cuda.memory_stats()
        names = ("allocation.all.allocated", "segment.all.allocated")
        return tuple(after[k] - before[k] for k in names)

    call()
    first = call()
    assert first == call() and first[1] == 0
    transfers, module = Transfers(), backends.load(backend, op)
    for name in ("fwd", "bwd"):
        monkeypatch.setattr(module, name, transfers.watched(getattr(module, name)))
    with transfers:
        call()
    assert not transfers.seen


def test_transfers_are_seen():
    with Transfers() as transfers:
        x = torch.ones(3, device="cuda")
        _ = x.sum().item(), x.cpu(), torch.tensor([1.0]).cuda(), x[x > 2]
    assert len(transfers.seen) >= 4


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
        keys = [(row["kernel"], row["bits"], row["width"]) for row in rows if "shared" not in row]
        assert len(set(keys)) == len(keys)
        assert all((row["kernel"], row["bits"], row["width"]) in keys for row in rows)
