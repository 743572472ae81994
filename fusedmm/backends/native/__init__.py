"""Backends "cpu" and "cuda": C++ kernels behind torch.ops._fusedmm_C, one op per call."""
