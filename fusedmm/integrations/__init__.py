"""Drop-ins for loaded models of other libraries, which are imported only where a model is theirs."""

from .patch import patch, unpatch

__all__ = ["patch", "unpatch"]
