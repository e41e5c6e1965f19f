"""The arithmetic of power law graph attention. `reference` is the paper in plain PyTorch."""
