"""Backend "triton": kernels for CUDA devices, compiled at first use."""
