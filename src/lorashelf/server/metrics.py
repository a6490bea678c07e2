"""What Prometheus is told: requests, tokens, times, and the state of the model's queue."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..serving.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, scheduler: Scheduler) -> None:
        held = self._registry = CollectorRegistry()
        self.requests = Counter("lorashelf_requests", "Requests by task and status", ["task", "status"], registry=held)
        self.tokens = Counter("lorashelf_tokens", "Tokens of prompts and answers", ["task", "kind"], registry=held)
        self.first = Histogram(
            "lorashelf_first_token_seconds", "Until the first token", buckets=_SECONDS, registry=held
        )
        self.whole = Histogram("lorashelf_request_seconds", "Until the last token", buckets=_SECONDS, registry=held)
        self.ready = Gauge("lorashelf_shelf_ready", "Whether /readyz found the shelf in order", registry=held)
        read: dict[str, tuple[str, Callable[[], float]]] = {
            "lorashelf_rows_running": ("Texts that are being continued", lambda: scheduler.running),
            "lorashelf_requests_waiting": ("Requests that wait for a row", lambda: scheduler.waiting),
            "lorashelf_forward_passes": ("Forward passes that continued texts", lambda: scheduler.steps["steps"]),
            "lorashelf_rows_continued": ("Rows in those passes", lambda: scheduler.steps["rows"]),
        }
        for name, (text, value) in read.items():
            Gauge(name, text, registry=held).set_function(value)

    def count(self, task: str, status: str) -> None:
        """Count a request; the task is empty if it is not known."""
        self.requests.labels(task, status).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
