"""What makes other programs know PLDR-LLMs."""
