"""What Prometheus can ask: requests, queue, batch, tokens, times, and use of the cache."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """One server's, in a registry of its own; times in seconds."""

    def __init__(self) -> None:
        disable_created_metrics()  # which would double the number of series
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"pldr_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"pldr_{name}_seconds", help, registry=self.registry, buckets=buckets)

        self.http = counter("http_requests", "HTTP requests, by path and status.", "path", "status")
        self.finished = counter("finished", "Texts that ended, by the reason.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.")
        self.generated_tokens = counter("generated_tokens", "Tokens that were generated.")
        self.first_token = histogram("time_to_first_token", "From a text's arrival to its first token.")
        self.token = histogram("time_per_token", "Between two tokens of a text, in the mean.", _STEP_SECONDS)
        self.request = histogram("request", "From a text's arrival to its end.")
        self.step = histogram("step", "One step of the engine.", _STEP_SECONDS)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A number that is asked for when Prometheus asks."""
        Gauge(f"pldr_{name}", help, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)
