"""Drop-ins for loaded models of other libraries, never imported on their own account."""

from .patch import patch, unpatch


def register_attention() -> None:
    """Makes `attn_implementation="fusedmm"` known to Transformers' models.

        fusedmm.integrations.register_attention()
        model = AutoModel.from_config(config, attn_implementation="fusedmm")
        model.set_attn_implementation("fusedmm")                # a loaded one

    Raises: ImportError, Transformers is not installed.
    """
    from . import transformers

    transformers.register()


__all__ = ["patch", "register_attention", "unpatch"]
