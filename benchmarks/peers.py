"""What a user could run instead of each op: plain, compiled and fused PyTorch, and other packages.

A peer is `build(case, mode) -> run(*tensors) -> tuple of outputs`, tensors in the order of the op's
signature; `Skip` says why it cannot take a case. Packages that are not installed are skipped.
"""

import dataclasses
import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedmm
from fusedmm import testing

from .cases import BenchCase

Run = Callable[..., tuple[Tensor, ...]]

# Copies of the score matrix that eager forward + backward keeps alive at once (p, ds, and the
# results being written), and the share of the memory a peer may take before it is skipped.
_SCORE_COPIES = 6
_MEMORY_SHARE = 0.5
_CHUNKED_SCORES = 8192**2  # what F.linear_cross_entropy's chunks take seconds for


class Skip(Exception):
    """A peer that does not apply; the text says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """`stores_scores`: needs O(M * N) memory, skipped where that does not fit.
    `token_major`: takes inputs laid out as [B, n, H, D], as a projection leaves them.
    `devices`: where it is a choice of its own."""

    name: str
    ops: tuple[str, ...]
    build: Callable[[BenchCase, str], Run]
    stores_scores: bool = True
    token_major: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def make(self, case: BenchCase, mode: str, itemsize: int) -> Run:
        """The callable for a case, or Skip."""
        if case.op not in self.ops:
            raise Skip(f"does not compute {case.op}")
        need = _SCORE_COPIES * case.scores() * itemsize
        if self.stores_scores and need > _MEMORY_SHARE * _memory(case.device):
            raise Skip(f"would store scores of about {need / 2**30:.0f} GiB")
        return self.build(case, mode)

    def lay_out(self, case: testing.Case) -> testing.Case:
        """Inputs as this peer's users have them."""
        if not self.token_major:
            return case
        moved = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in case.tensors.items()}
        return dataclasses.replace(case, tensors=moved)


def _memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    with open("/proc/meminfo") as f:
        return 1024.0 * int(f.readline().split()[1])


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"{name.split('.')[0]} is not installed ({error})") from error


def _ours(backend: str | None) -> Callable[[BenchCase, str], Run]:
    def build(case: BenchCase, mode: str) -> Run:
        op, options = getattr(fusedmm, case.op), case.options()

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = op(*tensors, **options, backend=backend)
            return out if isinstance(out, tuple) else (out,)

        return run

    return build


def _bi_attention(qk_x: Tensor, qk_y: Tensor, v_x: Tensor, v_y: Tensor) -> tuple[Tensor, ...]:
    s = (qk_x * qk_x.shape[-1] ** -0.5) @ qk_y.mT  # [B, H, M, N]
    return s.softmax(-1) @ v_y, s.mT.softmax(-1) @ v_x


def _co_attention(q_x, k_x, v_x, q_y, k_y, v_y) -> tuple[Tensor, ...]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v

    return attend(q_x, k_y, v_y), attend(q_y, k_x, v_x)


def _contrastive(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
    s = logit_scale.to(x.dtype) * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return ((F.cross_entropy(s.float(), target) + F.cross_entropy(s.T.float(), target)) / 2,)


def _sigmoid(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, ...]:
    s = (x @ y.T).float() * logit_scale + logit_bias
    z = 2 * torch.eye(len(x), device=x.device) - 1
    return (-F.logsigmoid(z * s).sum() / len(x),)


_PLAIN: dict[str, Run] = {
    "bi_attention": _bi_attention,
    "co_attention": _co_attention,
    "contrastive_loss": _contrastive,
    "sigmoid_loss": _sigmoid,
}


def _eager(case: BenchCase, mode: str) -> Run:
    options = case.options()
    if not options:
        return _PLAIN[case.op]
    names = testing.POSITIONAL[case.op]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:  # matches given: the general form
        named = dict(zip(names, tensors, strict=True))
        return testing.eager(testing.Case(case.op, named, options, tensors[0].dtype))

    return run


def _compiled(case: BenchCase, mode: str) -> Run:
    return torch.compile(_eager(case, mode), dynamic=False)


def _two_calls(attend: Callable[[Tensor, Tensor, Tensor], Tensor], op: str) -> Run:
    if op == "bi_attention":
        return lambda a, b, v_a, v_b: (attend(a, b, v_b), attend(b, a, v_a))
    return lambda q_x, k_x, v_x, q_y, k_y, v_y: (attend(q_x, k_y, v_y), attend(q_y, k_x, v_x))


def _sdpa(*backends: SDPBackend) -> Callable[[BenchCase, str], Run]:
    def build(case: BenchCase, mode: str) -> Run:
        both = _two_calls(F.scaled_dot_product_attention, case.op)
        if not backends:
            return both

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(list(backends)):
                return both(*tensors)

        return run

    return build


def _flex(case: BenchCase, mode: str) -> Run:
    if mode != "fwd" and case.device == "cpu":
        raise Skip("FlexAttention has no backward on CPU")
    flex = _import("torch.nn.attention.flex_attention").flex_attention
    return _two_calls(torch.compile(flex, dynamic=False), case.op)


class _Given(nn.Module):
    """Stands in for a projection: hands out a tensor [B, n, H * D] that was set before."""

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _merge(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)  # [B, H, n, D] -> [B, n, H * D]


def _split(t: Tensor, H: int) -> Tensor:
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


def _module(module: nn.Module, projections: tuple[str, ...], H: int, pick: Callable) -> Run:
    """A package's attention module with its projections replaced by the op's inputs."""
    given = [_Given() for _ in projections]
    for name, stub in zip(projections, given, strict=True):
        setattr(module, name, stub)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        for stub, t in zip(given, tensors, strict=True):
            stub.value = _merge(t)
        out = pick(module(given[0].value, given[1].value))
        return tuple(_split(o, H) for o in out)

    return run


def _grounding_dino(case: BenchCase, mode: str) -> Run:
    source = _import("transformers.models.grounding_dino.modeling_grounding_dino")
    s = case.shape
    width = s.H * s.D
    config = SimpleNamespace(
        d_model=1,
        encoder_ffn_dim=2 * width,
        encoder_attention_heads=2 * s.H,
        fusion_dropout=0.0,
    )
    module = source.GroundingDinoBiMultiHeadAttention(config)
    module.out_vision_proj = module.out_text_proj = nn.Identity()
    names = ("vision_proj", "text_proj", "values_vision_proj", "values_text_proj")
    return _module(module, names, s.H, lambda out: (out[0][0], out[1][0]))


def _lucidrains(case: BenchCase, mode: str) -> Run:
    source = _import("bidirectional_cross_attention")
    s = case.shape
    module = source.BidirectionalCrossAttention(dim=1, heads=s.H, dim_head=s.D)
    module.to_out = module.context_to_out = nn.Identity()
    names = ("to_qk", "context_to_qk", "to_v", "context_to_v")
    return _module(module, names, s.H, lambda out: out)


def _open_clip(case: BenchCase, mode: str) -> Run:
    if case.features and any(k in ("positives", "ids") for k, _ in case.features):
        raise Skip("one problem with row i matching column i only")
    source = _import("open_clip.loss")
    loss = source.ClipLoss() if case.op == "contrastive_loss" else source.SigLipLoss()
    return lambda *tensors: (loss(*tensors),)


def _linear_cross_entropy(options: bool) -> Callable[[BenchCase, str], Run]:
    def build(case: BenchCase, mode: str) -> Run:
        if case.shape.lead:
            raise Skip("one problem with row i matching column i only")
        if not hasattr(F, "linear_cross_entropy"):
            raise Skip("this torch has no F.linear_cross_entropy")
        if options and case.scores() > _CHUNKED_SCORES:
            raise Skip("not run beyond 8192 x 8192: it would take longer than all the rest")
        chunks = {"options": nn.LinearCrossEntropyOptions()} if options else {}

        def run(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
            scale, target = logit_scale.to(x.dtype), torch.arange(len(x), device=x.device)
            loss_x = F.linear_cross_entropy(x * scale, y, target, **chunks)
            return ((loss_x + F.linear_cross_entropy(y * scale, x, target, **chunks)) / 2,)

        return run

    return build


def _liger(case: BenchCase, mode: str) -> Run:
    if case.shape.lead:
        raise Skip("one problem with row i matching column i only")
    source = _import("liger_kernel.ops.fused_linear_cross_entropy")
    loss = source.LigerFusedLinearCrossEntropyFunction.apply

    def run(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
        scale, target = logit_scale.to(x.dtype), torch.arange(len(x), device=x.device)
        return ((loss(x * scale, y, target)[0] + loss(y * scale, x, target)[0]) / 2,)

    return run


def _siglip_kernel(case: BenchCase, mode: str) -> Run:
    if case.options():
        raise Skip("one problem with row i matching column i only")
    loss = _import("siglip_kernel").fused_siglip_loss
    return lambda x, y, scale, bias: (loss(x, y, scale.log(), bias),)


_ALL = tuple(_PLAIN)
_GPU = ("cuda",)
PEERS = (
    Peer("ours", _ALL, _ours(None), stores_scores=False),
    Peer("ours in Triton", _ALL, _ours("triton"), stores_scores=False, devices=_GPU),
    Peer("eager", _ALL, _eager),
    Peer("compiled", _ALL, _compiled),
    Peer("sdpa x2", testing.ATTENTIONS, _sdpa(), stores_scores=False),
    Peer("cudnn x2", testing.ATTENTIONS, _sdpa(SDPBackend.CUDNN_ATTENTION), False, devices=_GPU),
    Peer("flex x2", testing.ATTENTIONS, _flex, stores_scores=False),
    Peer("hf grounding dino", ("bi_attention",), _grounding_dino, token_major=True),
    Peer("lucidrains", ("bi_attention",), _lucidrains, token_major=True),
    Peer("open_clip", testing.LOSSES, _open_clip),
    Peer("linear_ce x2", ("contrastive_loss",), _linear_cross_entropy(False)),
    Peer("linear_ce chunked x2", ("contrastive_loss",), _linear_cross_entropy(True), False),
    Peer("liger x2", ("contrastive_loss",), _liger, stores_scores=False, devices=_GPU),
    Peer("siglip-kernel", ("sigmoid_loss",), _siglip_kernel, stores_scores=False, devices=_GPU),
)


def select(op: str, names: list[str] | None, device: str = "cpu") -> list[Peer]:
    """Peers of an op by name, ours first; default all of `device`."""
    peers = [p for p in PEERS if op in p.ops and device in p.devices]
    known = {p.name for p in PEERS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"peers: expected some of {sorted(known)}, got {name!r}")
    return [p for p in peers if names is None or p.name in names or p.name == "ours"]
