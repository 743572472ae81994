"""Cases, plain eager versions of the four ops and the error bound they are held to; used by tests
and benchmarks. Eager in the input dtype is what the ops compete with, eager in fp64 is the truth:
max|op - fp64| <= 2 * max|eager(dtype) - fp64| + tol(dtype), for outputs and every gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedmm

NEG_INF = float("-inf")

# Share of max|fp64| that an op may be off beyond twice eager's own error: 16-bit types about half
# a unit in the last place of the stored result, fp32 some 60 units for another order of summation.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

POSITIONAL = {
    "co_attention": ("q_x", "k_x", "v_x", "q_y", "k_y", "v_y"),
    "bi_attention": ("qk_x", "qk_y", "v_x", "v_y"),
    "contrastive_loss": ("x", "y", "logit_scale"),
    "sigmoid_loss": ("x", "y", "logit_scale", "logit_bias"),
}
ATTENTIONS = ("co_attention", "bi_attention")
LOSSES = ("contrastive_loss", "sigmoid_loss")


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """M tokens of x, N of y, width D of queries and keys, Dv of values."""

    B: int
    H: int
    M: int
    N: int
    D: int
    Dv: int

    def __str__(self) -> str:
        return f"{self.B}x{self.H}x{self.M}x{self.N}-D{self.D}-Dv{self.Dv}"


@dataclasses.dataclass(frozen=True)
class PairShape:
    """M rows of x against N rows of y, width D, batched over `lead`."""

    M: int
    N: int
    D: int
    lead: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "x".join(map(str, (*self.lead, self.M, self.N))) + f"-D{self.D}"


# Tiles are at most 128 x 128 on every backend: 300 spans three of them and ends in a ragged one.
ATTENTION_SHAPES = {
    "aligned": AttentionShape(1, 2, 128, 256, 64, 64),
    "three_tiles": AttentionShape(1, 2, 300, 277, 64, 64),
    "ragged_all": AttentionShape(2, 3, 101, 67, 33, 20),
    "narrow_long": AttentionShape(1, 1, 389, 35, 8, 1),
    "short_wide": AttentionShape(1, 1, 37, 401, 1, 256),
    "wide": AttentionShape(1, 1, 131, 97, 256, 200),
    "vilbert": AttentionShape(3, 2, 36, 36, 128, 128),
    "head80": AttentionShape(1, 1, 97, 129, 80, 80),
    "one_row": AttentionShape(2, 2, 1, 300, 64, 33),
    "one_column": AttentionShape(2, 1, 290, 1, 20, 64),
    "one_by_one": AttentionShape(1, 1, 1, 1, 8, 8),
}
PAIR_SHAPES = {
    "aligned": PairShape(256, 256, 64),
    "three_tiles": PairShape(301, 301, 64),
    "ragged_all": PairShape(67, 67, 33, (2, 3)),
    "narrow": PairShape(389, 389, 1),
    "wide": PairShape(131, 131, 256),
    "wider": PairShape(45, 45, 515),
    "head200": PairShape(97, 97, 200, (2,)),
    "one_row": PairShape(1, 1, 20),
    "two_rows": PairShape(2, 2, 8, (3,)),
}
SHAPES: dict[str, dict[str, Any]] = {
    "co_attention": ATTENTION_SHAPES,
    "bi_attention": ATTENTION_SHAPES,
    "contrastive_loss": PAIR_SHAPES,
    "sigmoid_loss": PAIR_SHAPES,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: tensors that can take a gradient in the order of the op's signature, and the rest.

    `dtype` is that of the data; `at` gives the same numbers in a higher precision. `floor` is the
    least magnitude that tolerances refer to, for gradients that are zero by identity or underflow.
    """

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dtype: torch.dtype
    floor: float = 1e-6

    def at(self, dtype: torch.dtype) -> "Case":
        """The same values in `dtype`."""
        return dataclasses.replace(self, tensors={k: t.to(dtype) for k, t in self.tensors.items()})

    def leaves(self) -> "Case":
        """The same case on new tensor objects that require a gradient."""
        fresh = {k: t.detach().requires_grad_() for k, t in self.tensors.items()}  # keeps strides
        return dataclasses.replace(self, tensors=fresh)

    def replace(self, **changes: Any) -> "Case":
        """Another value for some tensors or options."""
        tensors = {k: changes.pop(k, t) for k, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, options={**self.options, **changes})

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Positional and keyword arguments of the op."""
        positional = POSITIONAL[self.op]
        keywords = {k: t for k, t in self.tensors.items() if k not in positional}
        return [self.tensors[k] for k in positional], {**keywords, **self.options}


def fused(case: Case, backend: str | None = None) -> tuple[Tensor, ...]:
    """What the library returns, always as a tuple."""
    args, keywords = case.arguments()
    out = getattr(fusedmm, case.op)(*args, **keywords, backend=backend)
    return out if isinstance(out, tuple) else (out,)


def eager(case: Case) -> tuple[Tensor, ...]:
    """What plain PyTorch returns in the dtype of the case's tensors, score matrix and all."""
    args, keywords = case.arguments()
    return _EAGER[case.op](*args, **keywords)


def output_names(case: Case) -> tuple[str, ...]:
    """Names of what `fused` and `eager` return."""
    if case.op in ATTENTIONS:
        return (
            ("o_x", "o_y", "lse_x", "lse_y") if case.options.get("return_lse") else ("o_x", "o_y")
        )
    if case.op == "contrastive_loss" and case.options.get("reduction") == "none":
        return ("loss_x", "loss_y")
    return ("loss",)


def make_case(
    op: str,
    shape: AttentionShape | PairShape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    seed: int = 0,
    **features: Any,
) -> Case:
    """Random inputs of a shape, rounded to `dtype`. Features not listed are the op's own options.

    Attention: gain (standard deviation of the scores, about), mask (True: random; "dead": also a
    batch item without keys), bias (shape of [B, H, M, N] or a broadcastable one).
    Losses: logit_scale (a number, or "rows" for a tensor per row), logit_bias, fit (y = x + fit *
    noise, so that pairs match well), ids (number of distinct ids), positives ("shuffled" or
    "repeated").
    """
    g = torch.Generator().manual_seed(seed)
    make = _attention_case if op in ATTENTIONS else _pair_case
    case = make(op, shape, dtype, g, features)
    move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    tensors = {k: t.to(device) for k, t in case.tensors.items()}
    return dataclasses.replace(case, tensors=tensors, options=move)


def _attention_case(
    op: str,
    shape: AttentionShape,
    dtype: torch.dtype,
    g: torch.Generator,
    features: dict[str, Any],
) -> Case:
    B, H, M, N, D, Dv = dataclasses.astuple(shape)
    gain = features.pop("gain", 1.0)
    mask, bias = features.pop("mask", False), features.pop("bias", None)
    assert not (mask == "dead" and B == 1), "a case without any key tests nothing"
    sizes = {"x": M, "y": N}
    tensors = {}
    for name in POSITIONAL[op]:
        t = torch.randn(B, H, sizes[name[-1]], Dv if name[0] == "v" else D, generator=g)
        tensors[name] = (t if name[0] == "v" else t * gain**0.5).to(dtype)
    options = dict(features)
    if mask:
        for side, size in sizes.items():
            keep = torch.rand(B, size, generator=g) > 0.3
            keep[:, :1] = True
            if mask == "dead":
                keep[-1:] = False
            options[f"mask_{side}"] = keep
    if bias is not None:
        t = torch.randn(bias, generator=g).to(dtype)
        if op == "bi_attention":
            tensors["bias"] = t
        else:
            tensors["bias_xy"], tensors["bias_yx"] = t, t.mT.clone()
    return Case(op, tensors, options, dtype, floor=1.0 if 1 in (M, N) else 1e-6)


def _pair_case(
    op: str, shape: PairShape, dtype: torch.dtype, g: torch.Generator, features: dict[str, Any]
) -> Case:
    M, N, D, lead = shape.M, shape.N, shape.D, shape.lead
    scale, fit = features.pop("logit_scale", 10.0), features.pop("fit", None)
    ids, positives = features.pop("ids", None), features.pop("positives", None)
    x = torch.randn(*lead, M, D, generator=g)
    y = torch.randn(*lead, N, D, generator=g)
    if not features.get("normalize"):
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if fit is not None:
        y = F.normalize(x + fit * y, dim=-1)
    if scale == "rows":
        scale = 5.0 + 10.0 * torch.rand(*lead, M, generator=g)
    # Scale and bias are parameters: fp32 beside 16-bit data.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"x": x.to(dtype), "y": y.to(dtype), "logit_scale": torch.as_tensor(scale).to(exact)}
    if op == "sigmoid_loss":
        tensors["logit_bias"] = torch.tensor(features.pop("logit_bias", -2.0), dtype=exact)
    options = dict(features)
    if ids is not None:
        options["ids_x"] = torch.randint(ids, (*lead, M), generator=g)
        same = M == N  # row i keeps matching column i
        options["ids_y"] = options["ids_x"] if same else torch.randint(ids, (*lead, N), generator=g)
    if positives == "shuffled":
        options["positives"] = torch.rand(*lead, N, generator=g).argsort(-1)[..., :M]
    elif positives == "repeated":
        options["positives"] = torch.randint(max(N // 3, 1), (*lead, M), generator=g)
    return Case(op, tensors, options, dtype, floor=1.0 if M * N <= 4 else 1e-6)


def values_and_grads(
    run: Callable[[Case], tuple[Tensor, ...]], case: Case, seed: int = 1
) -> dict[str, Tensor]:
    """Outputs by name, and gradients as "d" + name under random upstream gradients."""
    case = case.leaves()
    outputs = run(case)
    g = torch.Generator().manual_seed(seed)
    result, ends, upstream = {}, [], []
    for name, out in zip(output_names(case), outputs, strict=True):
        result[name] = out.detach()
        # Rounded to the data's dtype, so that every precision sees the same numbers.
        weight = torch.randn(out.shape, generator=g).to(case.dtype).to(out)
        if out.requires_grad:
            ends.append(out)
            upstream.append(torch.ones_like(out) if out.dim() == 0 else weight)
    leaves = list(case.tensors.values())
    grads = torch.autograd.grad(ends, leaves, upstream, allow_unused=True)
    for name, grad in zip(case.tensors, grads, strict=True):
        result[f"d{name}"] = grad
    return result


def truth(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of eager in fp64."""
    return values_and_grads(eager, case.at(torch.float64))


def max_error(got: Tensor, want: Tensor) -> float:
    """max|got - want|; equal infinities agree, anything else that is not finite is inf."""
    got, want = got.double(), want.double()
    error = torch.where(got == want, 0.0, (got - want).abs())
    return error.nan_to_num(nan=float("inf")).max().item() if error.numel() else 0.0


def bound(name: str, base: Tensor, want: Tensor, case: Case) -> float:
    """The largest error allowed where eager gave `base` and fp64 gives `want`."""
    finite = want[want.isfinite()].abs()
    size = max(finite.max().item() if finite.numel() else 0.0, case.floor)
    return 2.0 * max_error(base, want) + TOLERANCE[case.dtype] * size


def assert_no_worse_than_eager(case: Case, backend: str | None) -> dict[str, float]:
    """Raises AssertionError where an output or gradient breaks the bound; returns the errors."""
    want = truth(case)
    base = values_and_grads(eager, case)
    got = values_and_grads(lambda c: fused(c, backend), case)
    errors = {}
    for name, exact in want.items():
        assert got[name] is not None, f"{case.op} on {backend}: no {name}"
        assert got[name].shape == exact.shape, (
            f"{case.op} on {backend}: {name}: expected shape {list(exact.shape)}, "
            f"got {list(got[name].shape)}"
        )
        errors[name] = max_error(got[name], exact)
        limit = bound(name, base[name], exact, case)
        assert errors[name] <= limit, (
            f"{case.op} on {backend}: {name}: max error {errors[name]:.3g}, allowed {limit:.3g}"
        )
    return errors


def _softmax(s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    if keep is None:
        return s.softmax(-1), s.logsumexp(-1)
    s = s.masked_fill(~keep[:, None, None, :], NEG_INF)  # [B, H, M, N]
    dead = ~keep.any(-1)[:, None, None, None]
    return s.softmax(-1).masked_fill(dead, 0.0), s.logsumexp(-1)


def _eager_co_attention(
    q_x, k_x, v_x, q_y, k_y, v_y, *, mask_x=None, mask_y=None, bias_xy=None, bias_yx=None,
    scale=None, return_lse=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    def attend(q: Tensor, k: Tensor, v: Tensor, keep, bias) -> tuple[Tensor, Tensor]:
        s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        p, lse = _softmax(s if bias is None else s + bias, keep)
        return p @ v, lse

    o_x, lse_x = attend(q_x, k_y, v_y, mask_y, bias_xy)
    o_y, lse_y = attend(q_y, k_x, v_x, mask_x, bias_yx)
    return (o_x, o_y, lse_x, lse_y) if return_lse else (o_x, o_y)


def _eager_bi_attention(
    qk_x, qk_y, v_x, v_y, *, mask_x=None, mask_y=None, bias=None, clamp=None, scale=None,
    return_lse=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    s = qk_x @ qk_y.mT * (qk_x.shape[-1] ** -0.5 if scale is None else scale)
    if clamp is not None:
        s = s.clamp(-clamp, clamp)
    if bias is not None:
        s = s + bias
    p_x, lse_x = _softmax(s, mask_y)
    p_y, lse_y = _softmax(s.mT, mask_x)
    o_x, o_y = p_x @ v_y, p_y @ v_x
    return (o_x, o_y, lse_x, lse_y) if return_lse else (o_x, o_y)


def _pair_scores(x: Tensor, y: Tensor, logit_scale: Tensor, normalize: bool) -> Tensor:
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return x @ y.mT * (logit_scale if logit_scale.dim() == 0 else logit_scale[..., None])


def _eager_contrastive_loss(
    x, y, logit_scale, *, positives=None, ids_x=None, ids_y=None, duplicates="positive",
    direction="both", label_smoothing=0.0, normalize=False, exclude_self=False, reduction="mean",
) -> tuple[Tensor, ...]:  # fmt: skip
    s = _pair_scores(x, y, logit_scale, normalize)  # [..., M, N]
    M, N = s.shape[-2:]
    if positives is not None:
        match = F.one_hot(positives, N).bool()
    elif M == N:
        match = torch.eye(N, dtype=torch.bool, device=s.device).expand(s.shape)
    else:
        match = torch.zeros_like(s, dtype=torch.bool)
    dropped = torch.zeros_like(match)
    if ids_x is not None:
        same = ids_x[..., :, None] == ids_y[..., None, :]
        if duplicates == "positive":
            match = match | same
        else:
            dropped = same & ~match
    if exclude_self:
        own = torch.eye(N, dtype=torch.bool, device=s.device)
        match, dropped = match & ~own, dropped | own

    def rows(s: Tensor, match: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        logp = s.masked_fill(dropped, NEG_INF).log_softmax(-1).masked_fill(dropped, 0.0)
        count = match.sum(-1, keepdim=True)
        target = match.to(s.dtype) / count.clamp_min(1)
        kept = (~dropped).to(s.dtype)
        target = (1 - label_smoothing) * target + label_smoothing * kept / kept.sum(-1, True)
        return -(target * logp).sum(-1) * (count[..., 0] > 0), count[..., 0] > 0

    loss_x, has_x = rows(s, match, dropped)
    loss_y, has_y = rows(s.mT, match.mT, dropped.mT)
    if direction == "x":
        loss_y = torch.zeros_like(loss_y)
    if direction == "y":
        loss_x = torch.zeros_like(loss_x)
    if reduction == "none":
        return loss_x, loss_y
    total_x, total_y = loss_x.sum(), loss_y.sum()
    if reduction == "mean":
        total_x, total_y = total_x / has_x.sum(), total_y / has_y.sum()
    total = total_x + total_y
    return (total / 2 if direction == "both" else total,)


def _eager_sigmoid_loss(
    x, y, logit_scale, logit_bias, *, ids_x=None, ids_y=None, normalize=False, reduction="mean"
) -> tuple[Tensor, ...]:
    s = _pair_scores(x, y, logit_scale, normalize) + logit_bias  # [..., M, N]
    if ids_x is None:
        match = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    else:
        match = ids_x[..., :, None] == ids_y[..., None, :]
    loss = -F.logsigmoid(torch.where(match, s, -s)).sum(-1)
    if reduction == "none":
        return (loss,)
    return (loss.sum() if reduction == "sum" else loss.mean(),)


_EAGER = {
    "co_attention": _eager_co_attention,
    "bi_attention": _eager_bi_attention,
    "contrastive_loss": _eager_contrastive_loss,
    "sigmoid_loss": _eager_sigmoid_loss,
}
