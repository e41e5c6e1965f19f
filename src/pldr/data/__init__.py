"""Text to training sequences."""
