"""How a public function reaches its kernels: `plan` validates and chooses a backend, `op` makes a
custom op of a Python body. Both know when their long way is not needed: a plan is remembered by
what it looks at, and in plain eager mode a body runs without the dispatcher in between.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch

_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list}
_plans: dict[tuple, tuple] = {}
_MAX_PLANS = 4096


def plan(op: str, backend: str | None, validate: Callable, *args) -> tuple:
    """(validate(*args), the backend that runs it), remembered by the arguments' metadata."""
    key = None
    if not torch.compiler.is_compiling():
        key = (op, dispatch.wanted(backend), *map(_metadata, args))
        try:
            return _plans[key]
        except KeyError:
            pass
        except TypeError:  # unhashable, as no argument may be: validation says so
            key = None
    asked = validate(*args)
    found = asked, dispatch.select(op, asked, backend)
    if key is not None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = found
    return found


def _metadata(a) -> tuple:
    if isinstance(a, Tensor):
        return a.shape, a.dtype, a.device, a.layout
    return type(a), a


class Op:
    """A custom op, called as a function."""

    def __init__(self, name: str, body: Callable) -> None:
        self._custom = torch.library.custom_op(name, body, mutates_args=())
        self._name, self._body, self._function = name, body, None
        self._setup, self._backward, self._transformed = _no_setup, None, None

    def register_fake(self, fake: Callable) -> Callable:
        """As CustomOpDef's."""
        return self._custom.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As CustomOpDef's."""
        self._custom.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            output = self._body(*args)
            setup_context(ctx, args, output)
            return output

        methods = {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward),
        }
        name = self._name.replace("::", "_")
        self._function = type(name, (torch.autograd.Function,), methods)
        self._setup, self._backward = setup_context, backward

    def register_batch(self) -> None:
        """vmap for an op whose tensors begin with the batch (a bias: with 1 or the batch): it
        joins the batch. With dropout, whose seed is drawn outside, it is refused."""

        def rule(info, in_dims, *args):
            n, B = info.batch_size, None

            def join(a, dim):
                nonlocal B
                if not isinstance(a, Tensor):
                    return a
                a = a.expand(n, *a.shape) if dim is None else a.movedim(dim, 0)
                B = a.shape[1] if B is None else B
                if a.dim() < 3:
                    raise NotImplementedError(f"{self._name}: vmap with dropout")
                if a.shape[1] != B:
                    a = a.expand(n, B, *a.shape[2:])
                return a.flatten(0, 1)

            out = self(*map(join, args, in_dims))
            split = [t.unflatten(0, (n, B)) for t in out]
            return tuple(split), (0,) * len(split)

        self._transform(rule)

    def register_loop(self) -> None:
        """vmap for an op that has no batch to join: one call after another."""

        def rule(info, in_dims, *args):
            def one(i: int) -> tuple:
                at = zip(args, in_dims, strict=True)
                return self(*(t.select(d, i) if isinstance(d, int) else t for t, d in at))

            calls = zip(*map(one, range(info.batch_size)), strict=True)
            out = tuple(torch.stack(results) for results in calls)
            return out, (0,) * len(out)

        self._transform(rule)

    def _transform(self, rule: Callable) -> None:
        """What torch.func sees: torch.library's own Function cannot be under torch.func.grad."""
        self._custom.register_vmap(rule)
        methods = {
            "forward": staticmethod(lambda *args: tuple(self._custom(*args))),
            "setup_context": staticmethod(self._setup),
            "backward": staticmethod(self._backward or self._refuse),
            "vmap": staticmethod(rule),
        }
        name = self._name.replace("::", "_") + "_transformed"
        self._transformed = type(name, (torch.autograd.Function,), methods)

    def _refuse(self, *_):
        raise RuntimeError(f"{self._name} has no derivative")

    def __call__(self, *args):
        if not _eager(args):
            if self._transformed and _in_func_transform():
                return self._transformed.apply(*args)
            if any(map(_dual, args)):
                raise NotImplementedError(
                    f"{self._name}: forward-mode derivatives are not implemented"
                )
            return self._custom(*args)
        if not (torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args)):
            return self._body(*args)
        # An op without a derivative, a backward, raises when it is differentiated.
        return (self._function.apply if self._function else self._custom)(*args)


def _no_setup(ctx, inputs, output) -> None:
    """Keeps nothing."""


def op(name: str) -> Callable[[Callable], Op]:
    """Decorator: the body of custom op `name`, whose inputs it does not change."""
    return lambda body: Op(name, body)


def _eager(args: tuple) -> bool:
    """Whether nobody but autograd watches the call: no tracing, transform, mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not _in_func_transform()
        and _PLAIN.issuperset(map(type, args))
    )


def _dual(a) -> bool:
    """Whether a is a tensor with a tangent, outside of tracing."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0 or not isinstance(a, Tensor):
        return False
    return forward_ad.unpack_dual(a).tangent is not None


def _in_func_transform() -> bool:
    """Whether torch.func (vmap, grad) is at work, outside of tracing."""
    stacked = torch._C._functorch.peek_interpreter_stack() is not None
    return stacked and not torch.compiler.is_compiling()
