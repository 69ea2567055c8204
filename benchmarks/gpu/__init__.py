"""What can be said of CUDA: counts on tensors without a device, and one script for a machine with a GPU."""
