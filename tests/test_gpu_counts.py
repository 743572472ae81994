"""What benchmarks/gpu_counts.py reads out of a disassembly."""

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_counts  # noqa: E402

CODE = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDL R3, [R1+0x4] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDL R2, [R1] ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
"""


def test_spills_in_loops_are_told_from_those_around_them():
    """A jump backwards is a loop only where control comes back to where it jumps from."""
    looping = [line for block in gpu_counts._looping(CODE) for line in block]
    assert len(looping) == 2 and "LDL R3" in looping[0]
