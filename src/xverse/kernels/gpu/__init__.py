"""Triton kernels, for CUDA. Import them only where Triton is installed (``xverse.gpu.has_triton``)."""
