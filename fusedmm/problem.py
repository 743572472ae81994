"""What a call asks for, validated once: frozen dataclasses of sizes, dtype, device and flags.

Below construction no Python re-checks. Backends read a problem to say why they reject it.
"""

import dataclasses

import torch
from torch import Tensor

from . import check


@dataclasses.dataclass(frozen=True)
class Side:
    """One direction of attention: M queries look at N keys."""

    M: int
    N: int
    D: int
    Dv: int
    masked: bool = False
    biased: bool = False

    def __str__(self) -> str:
        return f"M={self.M} N={self.N} D={self.D} Dv={self.Dv}"


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """Both directions of co_attention, bi_attention or fusion_attention."""

    op: str
    B: int
    H: int
    x: Side
    y: Side
    dtype: torch.dtype
    device_type: str
    clamped: bool = False
    dropout: bool = False

    def describe(self) -> str:
        """Sizes for an error text."""
        sides = f"x: {self.x}, y: {self.y}" if self.op == "co_attention" else str(self.x)
        return f"{check.name(self.dtype)} B={self.B} H={self.H} {sides} on {self.device_type}"


@dataclasses.dataclass(frozen=True)
class PairLossProblem:
    """G independent problems of M rows against N columns, width D."""

    op: str
    G: int
    M: int
    N: int
    D: int
    dtype: torch.dtype
    device_type: str
    ids: bool = False
    normalize: bool = False

    def describe(self) -> str:
        """Sizes for an error text."""
        sizes = f"G={self.G} M={self.M} N={self.N} D={self.D}"
        return f"{check.name(self.dtype)} {sizes} on {self.device_type}"


def co_attention(
    q_x, k_x, v_x, q_y, k_y, v_y, mask_x, mask_y, bias_xy, bias_yx, scale, dropout_p
) -> AttentionProblem:
    """Validates the arguments of co_attention."""
    op = "co_attention"
    named = dict(q_x=q_x, k_x=k_x, v_x=v_x, q_y=q_y, k_y=k_y, v_y=v_y)
    for arg, t in named.items():
        check.floating(op, arg, t)
        check.ndim(op, arg, t, f"B, H, {'M' if arg.endswith('x') else 'N'}, D")
    B, H, M, D_x = q_x.shape
    N, D_y = q_y.shape[2], q_y.shape[3]
    check.shape(op, "k_y", k_y, (B, H, N, D_x), "q_x and q_y")
    check.shape(op, "k_x", k_x, (B, H, M, D_y), "q_y and q_x")
    check.shape(op, "v_x", v_x, (B, H, M, v_x.shape[3]), "q_x")
    check.shape(op, "v_y", v_y, (B, H, N, v_y.shape[3]), "q_y")
    check.shape(op, "q_y", q_y, (B, H, N, D_y), "q_x")
    check.same(op, *named.items())
    check.mask(op, "mask_x", mask_x, (B, M), ("q_x", q_x))
    check.mask(op, "mask_y", mask_y, (B, N), ("q_y", q_y))
    check.bias(op, "bias_xy", bias_xy, (B, H, M, N), ("q_x", q_x))
    check.bias(op, "bias_yx", bias_yx, (B, H, N, M), ("q_y", q_y))
    _common(op, "q_x", min(D_x, D_y), scale, dropout_p)
    return AttentionProblem(
        op,
        B,
        H,
        Side(M, N, D_x, v_y.shape[3], mask_y is not None, bias_xy is not None),
        Side(N, M, D_y, v_x.shape[3], mask_x is not None, bias_yx is not None),
        q_x.dtype,
        q_x.device.type,
        dropout=dropout_p > 0.0,
    )


def bi_attention(
    qk_x, qk_y, v_x, v_y, mask_x, mask_y, bias, clamp, scale, dropout_p
) -> AttentionProblem:
    """Validates the arguments of bi_attention."""
    op = "bi_attention"
    named = dict(qk_x=qk_x, qk_y=qk_y, v_x=v_x, v_y=v_y)
    for arg, t in named.items():
        check.floating(op, arg, t)
        check.ndim(op, arg, t, f"B, H, {'M' if arg.endswith('x') else 'N'}, D")
    B, H, M, D = qk_x.shape
    N = qk_y.shape[2]
    check.shape(op, "qk_y", qk_y, (B, H, N, D), "qk_x")
    check.shape(op, "v_x", v_x, (B, H, M, v_x.shape[3]), "qk_x")
    check.shape(op, "v_y", v_y, (B, H, N, v_y.shape[3]), "qk_y")
    check.same(op, *named.items())
    check.mask(op, "mask_x", mask_x, (B, M), ("qk_x", qk_x))
    check.mask(op, "mask_y", mask_y, (B, N), ("qk_y", qk_y))
    check.bias(op, "bias", bias, (B, H, M, N), ("qk_x", qk_x))
    if clamp is not None:
        check.number(op, "clamp", clamp)
        if clamp <= 0:
            raise check.bad(op, "clamp", "a positive number", clamp)
    _common(op, "qk_x", D, scale, dropout_p)
    biased = bias is not None
    return AttentionProblem(
        op,
        B,
        H,
        Side(M, N, D, v_y.shape[3], mask_y is not None, biased),
        Side(N, M, D, v_x.shape[3], mask_x is not None, biased),
        qk_x.dtype,
        qk_x.device.type,
        clamped=clamp is not None,
        dropout=dropout_p > 0.0,
    )


def attention(q, k, v, mask, bias, scale, dropout_p) -> AttentionProblem:
    """Validates the arguments of attention, a co_attention with an empty side."""
    op = "attention"
    for arg, t, dims in (("q", q, "B, H, M, D"), ("k", k, "B, H, N, D"), ("v", v, "B, H, N, Dv")):
        check.floating(op, arg, t)
        check.ndim(op, arg, t, dims)
    B, H, M, D = q.shape
    N, Dv = k.shape[2], v.shape[3]
    check.shape(op, "k", k, (B, H, N, D), "q")
    check.shape(op, "v", v, (B, H, N, Dv), "k")
    check.same(op, ("q", q), ("k", k), ("v", v))
    check.mask(op, "mask", mask, (B, N), ("k", k))
    check.bias(op, "bias", bias, (B, H, M, N), ("q", q))
    _common(op, "q", D, scale, dropout_p)
    sides = Side(M, N, D, Dv, mask is not None, bias is not None), Side(0, 0, D, Dv)
    return AttentionProblem(
        "co_attention", B, H, *sides, q.dtype, q.device.type, dropout=dropout_p > 0.0
    )


def fusion_attention(x, k, v, mask_x, mask_y, bias, dropout_p) -> AttentionProblem:
    """Validates the arguments of fusion_attention."""
    op = "fusion_attention"
    for arg, t, dims in (("x", x, "B, M, D"), ("k", k, "B, H, N, D"), ("v", v, "B, H, N, Dv")):
        check.floating(op, arg, t)
        check.ndim(op, arg, t, dims)
    B, M, D = x.shape
    H, N, Dv = k.shape[1], k.shape[2], v.shape[3]
    check.shape(op, "k", k, (B, H, N, D), "x")
    check.shape(op, "v", v, (B, H, N, Dv), "k")
    check.same(op, ("x", x), ("k", k), ("v", v))
    check.mask(op, "mask_x", mask_x, (B, M), ("x", x))
    check.mask(op, "mask_y", mask_y, (B, N), ("k", k))
    if bias is not None:
        check.floating(op, "bias", bias)
        check.shape(op, "bias", bias, (B, H, N), "k")
        check.device(op, ("x", x), ("bias", bias))
    _common(op, "x", D, None, dropout_p)
    return AttentionProblem(
        op,
        B,
        H,
        Side(M, N, D, Dv, mask_y is not None, bias is not None),
        Side(N, M, D, D, mask_x is not None, bias is not None),
        x.dtype,
        x.device.type,
        dropout=dropout_p > 0.0,
    )


def _common(op: str, arg: str, D: int, scale, dropout_p) -> None:
    if D < 1:
        raise check.bad(op, arg, "width D of at least 1", D)
    if scale is not None:
        check.number(op, "scale", scale)
    check.fraction(op, "dropout_p", dropout_p)


def pair_loss(
    op: str, x: Tensor, y: Tensor, logit_scale, positives, ids_x, ids_y, normalize, square: bool
) -> PairLossProblem:
    """Validates what the two losses share; `square` demands M == N."""
    lead = _pairs(op, x, y)
    M, N, D = x.shape[-2], y.shape[-2], x.shape[-1]
    if isinstance(logit_scale, Tensor):
        check.floating(op, "logit_scale", logit_scale)
        check.device(op, ("x", x), ("logit_scale", logit_scale))
        if logit_scale.numel() != 1 and tuple(logit_scale.shape) != (*lead, M):
            expected = f"a scalar or shape {[*lead, M]} to match x"
            raise check.bad(op, "logit_scale", expected, list(logit_scale.shape))
    else:
        check.number(op, "logit_scale", logit_scale)
    check.flag(op, "normalize", normalize)
    if (ids_x is None) != (ids_y is None):
        given, other = ("ids_x", "ids_y") if ids_y is None else ("ids_y", "ids_x")
        raise check.bad(op, other, f"ids as well, since {given} is given", None)
    for arg, t, size, partner in (
        ("positives", positives, M, "x"),
        ("ids_x", ids_x, M, "x"),
        ("ids_y", ids_y, N, "y"),
    ):
        _integers(op, arg, t, (*lead, size), partner, x)
    if square and M != N:
        raise check.bad(op, "y", f"as many rows as x, {M}", N)
    G = 1
    for n in lead:
        G *= n
    return PairLossProblem(
        op, G, M, N, D, x.dtype, x.device.type, ids=ids_x is not None, normalize=normalize
    )


def _integers(op: str, arg: str, t, expected, partner: str, x: Tensor) -> None:
    if t is None:
        return
    check.is_tensor(op, arg, t)
    if t.dtype != torch.int64:
        raise check.bad(op, arg, "dtype int64", check.name(t.dtype))
    check.shape(op, arg, t, expected, partner)
    check.device(op, ("x", x), (arg, t))


def _pairs(op: str, x, y) -> tuple[int, ...]:
    """Checks x [..., M, D] against y [..., N, D]; returns the leading dimensions."""
    for arg, t in (("x", x), ("y", y)):
        check.floating(op, arg, t)
        if t.dim() < 2:
            rows = "M" if arg == "x" else "N"
            raise check.bad(op, arg, f"at least 2 dimensions [..., {rows}, D]", list(t.shape))
    check.shape(op, "y", y, (*x.shape[:-2], y.shape[-2], x.shape[-1]), "x")
    check.same(op, ("x", x), ("y", y))
    return tuple(x.shape[:-2])
