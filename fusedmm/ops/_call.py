"""How a public function reaches its kernels: `plan` validates and chooses a backend, `op` makes a
custom op of a Python body. Both know when their long way is not needed: a plan is remembered by
what it looks at, and in plain eager mode a body runs without the dispatcher in between.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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

    def __call__(self, *args):
        if not _eager(args):
            return self._custom(*args)
        if not (torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args)):
            return self._body(*args)
        # An op without a derivative, a backward, raises when it is differentiated.
        return (self._function.apply if self._function else self._custom)(*args)


def op(name: str) -> Callable[[Callable], Op]:
    """Decorator: the body of custom op `name`, whose inputs it does not change."""
    return lambda body: Op(name, body)


def _eager(args: tuple) -> bool:
    """Whether nobody but autograd watches the call: no tracing, transform, mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(a) in _PLAIN for a in args)
    )
