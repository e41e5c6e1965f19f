"""The embedded server: an OpenAI-compatible HTTP interface to `pldr.engine`, and the way to vLLM's."""
