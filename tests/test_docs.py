"""The equations in the public docstrings, executed as they stand, against the reference in fp64:
documentation and definition cannot part.
"""

import inspect
import re
import textwrap

import pytest
import torch

import fusedmm
from fusedmm.testing import (
    LOSSES,
    POSITIONAL,
    AttentionShape,
    PairShape,
    fused,
    make_case,
    output_names,
)


def equations(op: str) -> str:
    """The first indented block of an op's docstring."""
    doc = textwrap.dedent(inspect.getdoc(getattr(fusedmm, op)))
    block = re.search(r"\n\n((?:    .*\n)+)", doc).group(1)
    return textwrap.dedent(block)


@pytest.mark.parametrize("op", POSITIONAL)
def test_docstring_is_what_the_reference_computes(op):
    if op in LOSSES:
        case = make_case(op, PairShape(7, 7, 5), torch.float64)
    elif op == "co_attention":
        case = make_case(
            op, AttentionShape(2, 3, 7, 5, 4, 6), torch.float64, bias=(2, 3, 7, 5), scale=0.3
        )
    else:
        case = make_case(
            op, AttentionShape(2, 3, 7, 5, 4, 6), torch.float64, bias=(2, 1, 7, 1), scale=0.3,
            clamp=0.2,
        )  # fmt: skip
    softmax = lambda s, dim=-1: s.softmax(dim)  # noqa: E731
    names = {"torch": torch, "softmax": softmax, "softplus": torch.nn.functional.softplus}
    names.update(case.tensors, **case.options)
    source = equations(op)
    exec(compile(source, op, "exec"), names)
    assert source.count("=") >= 2
    for name, got in zip(output_names(case), fused(case, "reference"), strict=True):
        torch.testing.assert_close(got, names[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [*POSITIONAL, "use_backend"])
def test_docstring_names_every_argument(op):
    function = getattr(fusedmm, op)
    doc = inspect.getdoc(function)
    for part in ("Args:", "Raises:"):
        assert part in doc
    arguments = doc.split("Args:")[1].split("Returns:")[0]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", arguments), name


@pytest.mark.parametrize("op", POSITIONAL)
def test_signature_is_the_contract(op):
    """Names, order, defaults and what is keyword-only."""
    spelled = {
        "co_attention": "q_x, k_x, v_x, q_y, k_y, v_y, *, mask_x=None, mask_y=None, bias_xy=None, "
        "bias_yx=None, scale=None, dropout_p=0.0, return_lse=False, backend=None",
        "bi_attention": "qk_x, qk_y, v_x, v_y, *, mask_x=None, mask_y=None, bias=None, clamp=None, "
        "scale=None, dropout_p=0.0, return_lse=False, backend=None",
        "contrastive_loss": "x, y, logit_scale, *, positives=None, ids_x=None, ids_y=None, "
        "duplicates='positive', direction='both', label_smoothing=0.0, normalize=False, "
        "exclude_self=False, reduction='mean', group=None, backend=None",
        "sigmoid_loss": "x, y, logit_scale, logit_bias, *, ids_x=None, ids_y=None, "
        "normalize=False, reduction='mean', group=None, backend=None",
    }
    signature = inspect.signature(getattr(fusedmm, op))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    got = str(inspect.Signature(plain)).strip("()")
    assert got == spelled[op]
