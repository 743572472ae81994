"""patch() and unpatch(): exchanges the classes of a model's attention and loss modules, in place.

A replacement has the parameters, submodules and attributes of what it replaces under the same
names, so exchanging the class is the whole swap: parameters, hooks, device, optimiser state and
state_dict stay what they are, and it survives deepcopy, pickling and wrapping.
"""

import importlib
import sys

from torch import nn

_HF = "transformers.models"
_TRANSFORMERS = "fusedmm.integrations.transformers"
# (module, class) of the original -> (module, class) of the replacement; exact classes only, since
# a subclass may have changed the equation.
_REPLACEMENTS = {
    (f"{_HF}.grounding_dino.modeling_grounding_dino", "GroundingDinoBiMultiHeadAttention"): (
        "fusedmm.nn",
        "BiMultiHeadAttention",
    ),
    (
        f"{_HF}.mm_grounding_dino.modeling_mm_grounding_dino",
        "MMGroundingDinoBiMultiHeadAttention",
    ): ("fusedmm.nn", "BiMultiHeadAttention"),
    (f"{_HF}.lxmert.modeling_lxmert", "LxmertCrossAttentionLayer"): (
        "fusedmm.nn",
        "LxmertCrossAttention",
    ),
    (f"{_HF}.lxmert.modeling_lxmert", "LxmertXLayer"): (_TRANSFORMERS, "LxmertXLayer"),
    ("vilbert.vilbert", "BertBiAttention"): ("fusedmm.integrations.vilbert", "BertBiAttention"),
    ("lightglue.lightglue", "CrossBlock"): ("fusedmm.nn", "LightGlueCrossBlock"),
    ("open_clip.loss", "ClipLoss"): ("fusedmm.nn", "ClipLoss"),
    ("open_clip.loss", "SigLipLoss"): ("fusedmm.nn", "SigLipLoss"),
}
# Classes that are replaced only in the role named: (owner, attribute) -> the class there.
_LIGHTGLUE = f"{_HF}.lightglue.modeling_lightglue"
_ROLES = {
    ((_LIGHTGLUE, "LightGlueTransformerLayer"), "cross_attention"): (
        (_LIGHTGLUE, "LightGlueAttention"),
        (_TRANSFORMERS, "LightGlueCrossAttention"),
    ),
}
_ORIGINAL = "_fusedmm_original"


class Patched(dict[str, type[nn.Module]]):
    """Original classes by module name; `left` tells why other attention modules stayed."""

    left: dict[str, str]

    def __init__(self, replaced: dict[str, type[nn.Module]], left: dict[str, str]) -> None:
        super().__init__(replaced)
        self.left = left

    def __str__(self) -> str:
        lines = [f"fusedmm: replaced {len(self)} modules, left {len(self.left)}"]
        lines += [f"  replaced  {name or '.'}: {kind.__name__}" for name, kind in self.items()]
        lines += [f"  left      {name or '.'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def patch(model: nn.Module, *, verbose: bool = True) -> Patched:
    """Puts fusedmm's modules in the place of those a loaded model came with, in place.

        replaced = fusedmm.patch(model)                         # {"encoder.layers.0...attn": class}
        fusedmm.unpatch(model)

    Replaces Transformers' Grounding DINO and MM Grounding DINO fusion attention, LXMERT and
    LightGlue cross-attention, the original code's attention of ViLBERT and cross block of
    LightGlue, and open_clip's ClipLoss and SigLipLoss.
    The fusion attention's maps are computed when read.

    Args:
        model: any module, a loss too; it may itself be what is replaced, or contain it under any
            wrapper (DDP, PEFT, torch.compile).
        verbose: write what was replaced, what was left and why to stdout.
    Returns: the original class by the module's name in `model` ("" for itself), and as `.left` the
        reason by name for attention modules and losses that stayed; empty where nothing is known or
        everything is patched already.
    Raises: TypeError, not a module.
    """
    _check("patch", model)
    replaced, left, roles = {}, {}, {}
    for module in model.modules():
        for child_name, child in module.named_children():
            role = _ROLES.get((_path(module), child_name))
            if role is not None and role[0] == _path(child):
                roles[child] = role[1]
    for name, module in model.named_modules():
        original = type(module)
        target = roles.get(module) or _REPLACEMENTS.get(_path(module))
        if target is not None:
            module.__class__ = getattr(importlib.import_module(target[0]), target[1])
            setattr(module, _ORIGINAL, original)
            replaced[name] = original
        elif why := _why_left(module):
            left[name] = why
    result = Patched(replaced, left)
    if verbose:
        sys.stdout.write(f"{result}\n")
    return result


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


def _path(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _why_left(module: nn.Module) -> str:
    """Why a module that looks like one of ours stays; "" for others."""
    kind = type(module)
    if kind.__module__.startswith("fusedmm."):
        return ""
    known = {name: path for path, name in _REPLACEMENTS}
    for base in kind.__mro__[1:]:
        if (base.__module__, base.__qualname__) in _REPLACEMENTS:
            return f"{kind.__name__} extends {base.__name__} and may have changed its equation"
    if kind.__name__ in known:
        return f"{kind.__name__} of {kind.__module__} is not that of {known[kind.__name__]}"
    leaf = any(isinstance(child, nn.Linear) for child in module.children())
    if "Attention" not in kind.__name__ or not (leaf or isinstance(module, nn.MultiheadAttention)):
        return ""
    if "Deformable" in kind.__name__:
        return f"{kind.__name__} samples its keys: there are no scores to share"
    return (
        f"{kind.__name__} attends within one stream or one way only; where the model has "
        'attn_implementation, "fusedmm" serves it'
    )


def _check(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: expected a torch.nn.Module, got {type(model).__name__}")
