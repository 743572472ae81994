"""A compact numeric check of the cpu backend on the instruction set that FUSEDMM_CPU_ISA forces.

Run as a script with the set's name: the choice is made once a process.
"""

import sys

import torch

from fusedmm import _C
from fusedmm.testing import (
    ATTENTIONS,
    DTYPES,
    POSITIONAL,
    AttentionShape,
    PairShape,
    assert_no_worse_than_eager,
    make_case,
)

# More than one tile and a ragged end both ways, narrow, and wide enough for several blocks of D.
ATTENTION_SHAPES = (AttentionShape(2, 1, 131, 197, 33, 20), AttentionShape(1, 1, 37, 101, 200, 256))
PAIR_SHAPES = (PairShape(197, 197, 33, (2,)), PairShape(101, 101, 515))


def main(isa: str) -> None:
    """Raises where a result breaks the bound."""
    assert _C.cpu_isa() == isa, f"asked for {isa}, got {_C.cpu_isa()}"
    for op in POSITIONAL:
        for dtype in DTYPES:
            for shape in ATTENTION_SHAPES if op in ATTENTIONS else PAIR_SHAPES:
                features = {"normalize": True}
                if op in ATTENTIONS:
                    features = {"mask": True, "return_lse": True, "bias": (1, 1, shape.M, 1)}
                assert_no_worse_than_eager(make_case(op, shape, dtype, **features), "cpu")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    main(sys.argv[1])
