"""Kernels and the layers that call them: quantised linears, paged attention, fused decoding, training."""
