"""INT8 and INT4: methods, quantised layers, and the compiled kernels' Python face."""
