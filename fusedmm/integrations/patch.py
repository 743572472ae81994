"""patch() and unpatch(): exchanges the classes of a model's attention and loss modules, in place.

A replacement has the parameters, submodules and attributes of what it replaces under the same
names, so exchanging the class is the whole swap: parameters, hooks, device, optimiser state and
state_dict stay what they are, and it survives deepcopy, pickling and wrapping.
"""

import importlib

from torch import nn

# (module, class) of the original -> (module, class) of the replacement; exact classes only, since
# a subclass may have changed the equation.
_HF = "transformers.models"
_NN = "fusedmm.nn"
_REPLACEMENTS = {
    (f"{_HF}.grounding_dino.modeling_grounding_dino", "GroundingDinoBiMultiHeadAttention"): (
        _NN,
        "BiMultiHeadAttention",
    ),
    (
        f"{_HF}.mm_grounding_dino.modeling_mm_grounding_dino",
        "MMGroundingDinoBiMultiHeadAttention",
    ): (
        _NN,
        "BiMultiHeadAttention",
    ),
    (f"{_HF}.lxmert.modeling_lxmert", "LxmertCrossAttentionLayer"): (_NN, "LxmertCrossAttention"),
    (f"{_HF}.lxmert.modeling_lxmert", "LxmertXLayer"): (
        "fusedmm.integrations.transformers",
        "LxmertXLayer",
    ),
    ("open_clip.loss", "ClipLoss"): (_NN, "ClipLoss"),
    ("open_clip.loss", "SigLipLoss"): (_NN, "SigLipLoss"),
}
_ORIGINAL = "_fusedmm_original"


def patch(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Puts fusedmm's modules in the place of those a loaded model came with, in place.

        replaced = fusedmm.patch(model)                         # {"encoder.layers.0...attn": class}
        fusedmm.unpatch(model)

    Replaces Transformers' Grounding DINO and MM Grounding DINO fusion attention and LXMERT
    cross-attention, and open_clip's ClipLoss and SigLipLoss. The fusion attention's maps are None
    until `output_attentions = True` is set on the replaced module.

    Args:
        model: any module, a loss too; it may itself be what is replaced.
    Returns: the original class by the module's name in `model` ("" for itself); empty where nothing
        is known or everything is patched already.
    Raises: TypeError, not a module.
    """
    _check("patch", model)
    replaced = {}
    for name, module in model.named_modules():
        original = type(module)
        target = _REPLACEMENTS.get((original.__module__, original.__qualname__))
        if target is not None:
            module.__class__ = getattr(importlib.import_module(target[0]), target[1])
            setattr(module, _ORIGINAL, original)
            replaced[name] = original
    return replaced


def unpatch(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Undoes `patch`: every replaced module is of its original class again.

    Args:
        model: a patched module, a copy of one, or one that contains it.
    Returns: the class restored by the module's name in `model`.
    Raises: TypeError, not a module.
    """
    _check("unpatch", model)
    restored = {}
    for name, module in model.named_modules():
        original = module.__dict__.get(_ORIGINAL)
        if original is not None:
            delattr(module, _ORIGINAL)
            module.__class__ = original
            restored[name] = original
    return restored


def _check(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: expected a torch.nn.Module, got {type(model).__name__}")
