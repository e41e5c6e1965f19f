"""What `ops.decode` hands out to: plain PyTorch in `reference`, Triton kernels in the others."""
