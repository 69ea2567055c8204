"""Quantisation to 8, 4, 3 and 2 bits: rounding, GPTQ, equalisation, calibration and the parity report."""
