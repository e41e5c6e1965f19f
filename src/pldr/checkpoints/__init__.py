"""Checkpoints: reading them strictly, writing them in each layout, and the certificates beside them."""
