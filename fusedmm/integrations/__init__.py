"""Drop-ins for loaded models of other libraries, never imported on their own account."""

from .patch import patch, unpatch

__all__ = ["patch", "unpatch"]
