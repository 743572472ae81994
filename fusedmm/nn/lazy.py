"""Attention maps that cost nothing until something reads them."""

from collections.abc import Callable

from torch import Tensor
from torch.utils._pytree import tree_map


class LazyMap:
    """A tensor that is computed when it is first used: by attribute, index, operator or torch call.

        weights = outputs.attentions[0]                         # nothing computed yet
        weights.shape, weights[0], torch.sum(weights)           # computed once, then kept

    Holds what it is computed from until then. Pickles and copies as the tensor.

    Args:
        compute: returns the map.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._map: Tensor | None = None

    def tensor(self) -> Tensor:
        """The map."""
        if self._compute is not None:
            self._map, self._compute = self._compute(), None
        return self._map

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def read(t: object) -> object:
            return t.tensor() if isinstance(t, cls) else t

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))

    def __reduce_ex__(self, protocol: int):
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.tensor().__deepcopy__(memo)

    def __repr__(self) -> str:
        return "LazyMap(not read)" if self._map is None else repr(self._map)


def _forward(name: str) -> Callable:
    def method(self: LazyMap, *args: object) -> object:
        return getattr(self.tensor(), name)(*args)

    method.__name__ = name
    return method


# Python looks operators up on the class, past __getattr__.
for _name in (
    "__getitem__", "__len__", "__iter__", "__array__", "__eq__", "__lt__", "__gt__", "__le__",
    "__ge__", "__neg__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__",
    "__truediv__", "__rtruediv__", "__matmul__", "__rmatmul__", "__pow__",
):  # fmt: skip
    setattr(LazyMap, _name, _forward(_name))
LazyMap.__hash__ = object.__hash__
