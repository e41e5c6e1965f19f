"""PLDR-LLMs in other programs."""
