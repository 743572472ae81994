"""Timings, memory and accuracy of fusedmm beside what its users could do instead."""
