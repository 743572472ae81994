"""Recipes that train the reference models on real data, and what the command line does with them.

Needs the packages of the `train` extra. Nothing else in fusedmm imports this package.
"""
