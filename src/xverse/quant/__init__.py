"""INT8 and INT4 quantisation: rounding, GPTQ, equalisation, calibration and the parity report."""
