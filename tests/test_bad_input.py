"""Every mistake a caller can make: exception type and exact message, which names op, argument,
expected and got. One table per op; nothing is modified and nothing crashes.
"""

from typing import Any

import pytest
import torch

import fusedmm

F32 = torch.float32


def _attention(op: str) -> tuple[list[str], list[torch.Tensor]]:
    """Names and good tensors: B=2 H=3 M=5 N=4 D=8 Dv=6."""
    sizes = {"x": 5, "y": 4}
    names = ["q_x", "k_x", "v_x", "q_y", "k_y", "v_y"]
    if op == "bi_attention":
        names = ["qk_x", "qk_y", "v_x", "v_y"]
    return names, [torch.zeros(2, 3, sizes[n[-1]], 6 if n[0] == "v" else 8) for n in names]


def _losses(op: str) -> tuple[list[str], list[Any]]:
    """Names and good arguments: M=N=5 D=8."""
    names, values = ["x", "y", "logit_scale"], [torch.zeros(5, 8), torch.zeros(5, 8), 10.0]
    if op == "sigmoid_loss":
        return [*names, "logit_bias"], [*values, -10.0]
    return names, values


def _z(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


IDS = torch.arange(5)
MATE = torch.tensor([1, 0, 3, 2, 4])  # row 4 is its own
OWN = torch.zeros(5, 8)
TWICE = {"x": OWN, "y": OWN, "exclude_self": True}
CO, BI, CON, SIG = "co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss"
BACKENDS = "'cuda', 'triton', 'cpu', 'reference'"
FLOATS = "float32, float16, bfloat16, float64"

# op, changed arguments, exception, message after "op: "
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # Not a tensor, not floating, not ours.
    (CO, {"q_x": None}, TypeError, "q_x: expected a torch.Tensor, got NoneType"),
    (CO, {"v_y": [1.0]}, TypeError, "v_y: expected a torch.Tensor, got list"),
    (CO, {"k_x": _z(2, 3, 5, 8, dtype=torch.int64)}, TypeError,
     "k_x: expected a floating dtype, got int64"),
    (CO, {"q_y": _z(2, 3, 4, 8, dtype=torch.complex64)}, TypeError,
     "q_y: expected a floating dtype, got complex64"),
    (CO, {"q_x": _z(2, 3, 5, 8, dtype=torch.float8_e4m3fn)}, NotImplementedError,
     f"q_x: expected one of {FLOATS}, got float8_e4m3fn"),
    (CO, {"q_x": _z(2, 3, 5, 8).to_sparse()}, NotImplementedError,
     "q_x: expected a strided tensor, got torch.sparse_coo"),
    (BI, {"qk_x": 1.0}, TypeError, "qk_x: expected a torch.Tensor, got float"),
    (BI, {"v_x": _z(2, 3, 5, 6, dtype=torch.bool)}, TypeError,
     "v_x: expected a floating dtype, got bool"),
    (CON, {"x": "rows"}, TypeError, "x: expected a torch.Tensor, got str"),
    (CON, {"y": _z(5, 8, dtype=torch.int32)}, TypeError,
     "y: expected a floating dtype, got int32"),
    (SIG, {"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    (SIG, {"y": _z(5, 8, dtype=torch.float8_e5m2)}, NotImplementedError,
     f"y: expected one of {FLOATS}, got float8_e5m2"),
    # Dimensions and shapes.
    (CO, {"q_x": _z(2, 5, 8)}, ValueError,
     "q_x: expected 4 dimensions [B, H, M, D], got shape [2, 5, 8]"),
    (CO, {"v_y": _z(4, 6)}, ValueError,
     "v_y: expected 4 dimensions [B, H, N, D], got shape [4, 6]"),
    (CO, {"k_y": _z(2, 3, 4, 7)}, ValueError,
     "k_y: expected shape [2, 3, 4, 8] to match q_x and q_y, got [2, 3, 4, 7]"),
    (CO, {"k_x": _z(2, 3, 6, 8)}, ValueError,
     "k_x: expected shape [2, 3, 5, 8] to match q_y and q_x, got [2, 3, 6, 8]"),
    (CO, {"v_x": _z(2, 3, 4, 6)}, ValueError,
     "v_x: expected shape [2, 3, 5, 6] to match q_x, got [2, 3, 4, 6]"),
    (CO, {"v_y": _z(1, 3, 4, 6)}, ValueError,
     "v_y: expected shape [2, 3, 4, 6] to match q_y, got [1, 3, 4, 6]"),
    (CO, {"q_y": _z(3, 3, 4, 8)}, ValueError,
     "q_y: expected shape [2, 3, 4, 8] to match q_x, got [3, 3, 4, 8]"),
    (BI, {"qk_y": _z(2, 3, 4, 7)}, ValueError,
     "qk_y: expected shape [2, 3, 4, 8] to match qk_x, got [2, 3, 4, 7]"),
    (BI, {"qk_y": _z(2, 2, 4, 8)}, ValueError,
     "qk_y: expected shape [2, 3, 4, 8] to match qk_x, got [2, 2, 4, 8]"),
    (BI, {"v_y": _z(2, 3, 5, 6)}, ValueError,
     "v_y: expected shape [2, 3, 4, 6] to match qk_y, got [2, 3, 5, 6]"),
    (BI, {"qk_x": _z(2, 3, 5, 0), "qk_y": _z(2, 3, 4, 0)}, ValueError,
     "qk_x: expected width D of at least 1, got 0"),
    (CON, {"x": _z(8)}, ValueError, "x: expected at least 2 dimensions [..., M, D], got [8]"),
    (CON, {"y": _z(8)}, ValueError, "y: expected at least 2 dimensions [..., N, D], got [8]"),
    (CON, {"y": _z(5, 7)}, ValueError, "y: expected shape [5, 8] to match x, got [5, 7]"),
    (CON, {"x": _z(2, 5, 8)}, ValueError,
     "y: expected shape [2, 5, 8] to match x, got [5, 8]"),
    (CON, {"y": _z(6, 8)}, ValueError, "y: expected as many rows as x, 5, got 6"),
    (SIG, {"y": _z(6, 8)}, ValueError, "y: expected as many rows as x, 5, got 6"),
    (SIG, {"y": _z(5, 4)}, ValueError, "y: expected shape [5, 8] to match x, got [5, 4]"),
    # Dtypes and devices that part.
    (CO, {"v_x": _z(2, 3, 5, 6, dtype=torch.float16)}, ValueError,
     "v_x: expected dtype float32 to match q_x, got float16"),
    (CO, {"k_y": _z(2, 3, 4, 8, device="meta")}, ValueError,
     "k_y: expected device cpu to match q_x, got meta"),
    (BI, {"qk_y": _z(2, 3, 4, 8, dtype=torch.bfloat16)}, ValueError,
     "qk_y: expected dtype float32 to match qk_x, got bfloat16"),
    (BI, {"v_y": _z(2, 3, 4, 6, device="meta")}, ValueError,
     "v_y: expected device cpu to match qk_x, got meta"),
    (CON, {"y": _z(5, 8, dtype=torch.float64)}, ValueError,
     "y: expected dtype float32 to match x, got float64"),
    (SIG, {"y": _z(5, 8, device="meta")}, ValueError,
     "y: expected device cpu to match x, got meta"),
    # Masks and biases.
    (CO, {"mask_x": _z(2, 5)}, ValueError,
     "mask_x: expected dtype bool (True = keep), got float32"),
    (CO, {"mask_y": _z(2, 5, dtype=torch.bool)}, ValueError,
     "mask_y: expected shape [2, 4] to match q_y, got [2, 5]"),
    (CO, {"mask_x": _z(2, 1, 1, 5, dtype=torch.bool)}, ValueError,
     "mask_x: expected shape [2, 5] to match q_x, got [2, 1, 1, 5]"),
    (CO, {"mask_x": [True] * 5}, TypeError, "mask_x: expected a torch.Tensor, got list"),
    (CO, {"mask_y": _z(2, 4, dtype=torch.bool, device="meta")}, ValueError,
     "mask_y: expected device cpu to match q_y, got meta"),
    (CO, {"bias_xy": _z(2, 3, 4, 5)}, ValueError,
     "bias_xy: expected a shape broadcastable to [2, 3, 5, 4], got [2, 3, 4, 5]"),
    (CO, {"bias_yx": _z(4, 5)}, ValueError,
     "bias_yx: expected a shape broadcastable to [2, 3, 4, 5], got [4, 5]"),
    (CO, {"bias_xy": _z(1, 1, 5, 4, dtype=torch.bool)}, TypeError,
     "bias_xy: expected a floating dtype, got bool"),
    (BI, {"mask_x": _z(2, 5, dtype=torch.int64)}, ValueError,
     "mask_x: expected dtype bool (True = keep), got int64"),
    (BI, {"mask_y": _z(1, 4, dtype=torch.bool)}, ValueError,
     "mask_y: expected shape [2, 4] to match qk_y, got [1, 4]"),
    (BI, {"bias": _z(2, 3, 4, 5)}, ValueError,
     "bias: expected a shape broadcastable to [2, 3, 5, 4], got [2, 3, 4, 5]"),
    (BI, {"bias": _z(1, 1, 5, 4, device="meta")}, ValueError,
     "bias: expected device cpu to match qk_x, got meta"),
    # Numbers.
    (CO, {"scale": "1"}, TypeError, "scale: expected a number, got str"),
    (CO, {"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    (CO, {"scale": _z(1)}, TypeError, "scale: expected a number, got Tensor"),
    (CO, {"dropout_p": 1.5}, ValueError, "dropout_p: expected a number in [0, 1], got 1.5"),
    (CO, {"dropout_p": None}, TypeError, "dropout_p: expected a number, got NoneType"),
    (BI, {"dropout_p": -0.1}, ValueError, "dropout_p: expected a number in [0, 1], got -0.1"),
    (BI, {"dropout_p": True}, TypeError, "dropout_p: expected a number, got bool"),
    (BI, {"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    (BI, {"clamp": 0.0}, ValueError, "clamp: expected a positive number, got 0.0"),
    (BI, {"clamp": -1}, ValueError, "clamp: expected a positive number, got -1"),
    (BI, {"clamp": float("inf")}, ValueError, "clamp: expected a finite number, got inf"),
    (BI, {"clamp": (-1, 1)}, TypeError, "clamp: expected a number, got tuple"),
    (CON, {"logit_scale": "10"}, TypeError, "logit_scale: expected a number, got str"),
    (CON, {"logit_scale": None}, TypeError, "logit_scale: expected a number, got NoneType"),
    (CON, {"logit_scale": float("nan")}, ValueError,
     "logit_scale: expected a finite number, got nan"),
    (CON, {"logit_scale": torch.tensor(10)}, TypeError,
     "logit_scale: expected a floating dtype, got int64"),
    (CON, {"logit_scale": _z(4)}, ValueError,
     "logit_scale: expected a scalar or shape [5] to match x, got [4]"),
    (CON, {"logit_scale": _z(5, 5)}, ValueError,
     "logit_scale: expected a scalar or shape [5] to match x, got [5, 5]"),
    (CON, {"logit_scale": _z(1, device="meta")}, ValueError,
     "logit_scale: expected device cpu to match x, got meta"),
    (CON, {"label_smoothing": 1.1}, ValueError,
     "label_smoothing: expected a number in [0, 1], got 1.1"),
    (CON, {"label_smoothing": "0.1"}, TypeError, "label_smoothing: expected a number, got str"),
    (SIG, {"logit_bias": _z(5)}, ValueError, "logit_bias: expected a scalar, got shape [5]"),
    (SIG, {"logit_bias": None}, TypeError, "logit_bias: expected a number, got NoneType"),
    (SIG, {"logit_bias": float("-inf")}, ValueError,
     "logit_bias: expected a finite number, got -inf"),
    (SIG, {"logit_scale": _z(3)}, ValueError,
     "logit_scale: expected a scalar or shape [5] to match x, got [3]"),
    # Indices and words.
    (CON, {"positives": IDS.int()}, ValueError, "positives: expected dtype int64, got int32"),
    (CON, {"positives": IDS[:4]}, ValueError,
     "positives: expected shape [5] to match x, got [4]"),
    (CON, {"positives": list(range(5))}, TypeError,
     "positives: expected a torch.Tensor, got list"),
    (CON, {"positives": IDS + 1}, ValueError, "positives: expected indices in [0, 5), got 5"),
    (CON, {"positives": IDS - 1}, ValueError, "positives: expected indices in [0, 5), got -1"),
    (CON, {"ids_x": IDS}, ValueError,
     "ids_y: expected ids as well, since ids_x is given, got None"),
    (CON, {"ids_y": IDS}, ValueError,
     "ids_x: expected ids as well, since ids_y is given, got None"),
    (CON, {"ids_x": IDS.float(), "ids_y": IDS}, ValueError,
     "ids_x: expected dtype int64, got float32"),
    (CON, {"ids_x": IDS, "ids_y": IDS[:3]}, ValueError,
     "ids_y: expected shape [5] to match y, got [3]"),
    (CON, {"duplicates": "drop"}, ValueError,
     "duplicates: expected one of 'positive', 'ignore', got 'drop'"),
    (CON, {"direction": "xy"}, ValueError, "direction: expected one of 'both', 'x', 'y', got 'xy'"),
    (CON, {"reduction": "avg"}, ValueError,
     "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    (CON, {"reduction": None}, ValueError,
     "reduction: expected one of 'mean', 'sum', 'none', got None"),
    (CON, {"normalize": 1}, TypeError, "normalize: expected a bool, got int"),
    (CON, {"exclude_self": None}, TypeError, "exclude_self: expected a bool, got NoneType"),
    (CON, {"exclude_self": True, "positives": MATE}, ValueError,
     "y: expected the very tensor x, for exclude_self, got another tensor"),
    (CON, {**TWICE, "ids_x": IDS, "ids_y": IDS + 0}, ValueError,
     "ids_y: expected the very tensor ids_x, for exclude_self, got another tensor"),
    (CON, TWICE, ValueError, "positives: expected a tensor, or ids, for exclude_self, got None"),
    (CON, {**TWICE, "positives": MATE, "logit_scale": _z(5)}, ValueError,
     "logit_scale: expected a scalar, for exclude_self, got shape [5]"),
    (CON, {**TWICE, "positives": MATE}, ValueError,
     "positives: expected positives[positives[i]] == i != positives[i], for exclude_self, "
     "got positives[4] = 4"),
    (CON, {**TWICE, "positives": (IDS + 1) % 5}, ValueError,
     "positives: expected positives[positives[i]] == i != positives[i], for exclude_self, "
     "got positives[0] = 1"),
    (SIG, {"ids_x": IDS}, ValueError,
     "ids_y: expected ids as well, since ids_x is given, got None"),
    (SIG, {"ids_x": IDS[:, None], "ids_y": IDS}, ValueError,
     "ids_x: expected shape [5] to match x, got [5, 1]"),
    (SIG, {"reduction": "batchmean"}, ValueError,
     "reduction: expected one of 'mean', 'sum', 'none', got 'batchmean'"),
    (SIG, {"normalize": "yes"}, TypeError, "normalize: expected a bool, got str"),
    # Backends.
    (CO, {"backend": "gpu"}, ValueError, f"backend: expected one of {BACKENDS}, got 'gpu'"),
    (BI, {"backend": ""}, ValueError, f"backend: expected one of {BACKENDS}, got ''"),
    (CON, {"backend": 0}, ValueError, f"backend: expected one of {BACKENDS}, got 0"),
    (SIG, {"backend": "CPU"}, ValueError, f"backend: expected one of {BACKENDS}, got 'CPU'"),
]  # fmt: skip


def _call(op: str, changes: dict[str, Any]) -> Any:
    names, values = _attention(op) if op in (CO, BI) else _losses(op)
    changes = dict(changes)
    args = [changes.pop(n, v) for n, v in zip(names, values, strict=True)]
    return getattr(fusedmm, op)(*args, **changes)


def _name(case: tuple) -> str:
    return f"{case[0]}-" + "-".join(case[1])


@pytest.mark.parametrize(("op", "changes", "error", "message"), CASES, ids=map(_name, CASES))
def test_rejects_bad_input(op, changes, error, message):
    with pytest.raises(error) as caught:
        _call(op, changes)
    assert type(caught.value) is error
    assert str(caught.value) == f"{op}: {message}"


@pytest.mark.parametrize("op", [CO, BI, CON, SIG])
def test_the_good_call_passes(op):
    out = _call(op, {})
    assert all(t.isfinite().all() for t in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("op", [CO, BI, CON, SIG])
def test_options_are_keyword_only(op):
    names, values = _attention(op) if op in (CO, BI) else _losses(op)
    with pytest.raises(TypeError, match="positional argument"):
        getattr(fusedmm, op)(*values, None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        getattr(fusedmm, op)(*values, mask=None)
    assert len(names) == len(values)


def test_errors_come_before_work_under_compile():
    """Shapes are checked while tracing, with the same text."""
    call = torch.compile(fusedmm.bi_attention, backend="eager")
    _, (qk_x, _, v_x, v_y) = _attention(BI)
    with pytest.raises(Exception, match=r"qk_y: expected shape \[2, 3, 4, 8\] to match qk_x"):
        call(qk_x, _z(2, 3, 4, 7), v_x, v_y)


def test_out_of_range_positives_raise_in_compiled_code_too():
    call = torch.compile(fusedmm.contrastive_loss, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8)
    call(x, x, 10.0, positives=IDS)
    with pytest.raises(ValueError, match=r"positives: expected indices in \[0, 5\), got 9"):
        call(x, x, 10.0, positives=IDS + 5)
