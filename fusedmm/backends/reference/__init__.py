"""The definition of every op in plain torch, with hand-derived backwards: oracle and documentation.

Computes in fp32 (fp64 for fp64 inputs) and stores the whole score matrix.
"""
