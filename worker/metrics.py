"""Metrics: all of them, in one place.

Label values come from closed sets only (states, datasets, error reasons, task names), never from data: no
tenant, no connector, no key, no name.
"""

from __future__ import annotations

from enum import StrEnum
from threading import Thread
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from worker.errors import Misconfigured

_STOP_S: Final = 5.0


class Result(StrEnum):
    """How an observation ended, as far as the fetch task knows."""

    QUIET = "quiet"
    PUBLISHED = "published"
    REFUSED = "refused"
    FAILED = "failed"


class Effect(StrEnum):
    """What the writer did with an observation; `returned`: of another base, its part is fetched again."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    RETURNED = "returned"


class Outcome(StrEnum):
    """How a Celery task ended."""

    DONE = "done"
    RETRIED = "retried"
    FAILED = "failed"


REQUESTS: Final = Counter(
    "rollcall_provider_requests",
    "Answers of the provider, by what they were found to mean",
    ["dataset", "finding"],
)
REQUEST_SECONDS: Final = Histogram(
    "rollcall_provider_request_seconds",
    "From asking the provider to the last byte",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
OBSERVATIONS: Final = Counter(
    "rollcall_observations", "Observations made by the fetchers, by `Result`", ["dataset", "result"]
)
EVENTS_PUBLISHED: Final = Counter("rollcall_events_published", "Events published to the streams", ["dataset"])
OBSERVATIONS_SETTLED: Final = Counter(
    "rollcall_observations_settled", "Observations the writer is done with, by `Effect`", ["effect"]
)
APPLY_SECONDS: Final = Histogram(
    "rollcall_apply_seconds",
    "One transaction of the writer",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
PARTS: Final = Gauge("rollcall_parts", "Parts in the ledger, by status", ["status"])
RUNS_FINISHED: Final = Counter("rollcall_runs_finished", "Runs that reached a final status", ["kind", "status"])
TRANSITIONS: Final = Counter(
    "rollcall_connector_transitions", "Connectors that changed status, by the new one", ["status", "reason"]
)
DEAD_LETTERS: Final = Counter("rollcall_dead_letters", "Events that cannot be applied", ["reason"])
STREAM_ENTRIES: Final = Gauge("rollcall_stream_entries", "Entries in an event stream", ["partition"])
TASK_SECONDS: Final = Histogram(
    "rollcall_task_seconds",
    "Celery tasks, by `Outcome`",
    ["task", "outcome"],
    buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
LOOP_LAG_SECONDS: Final = Histogram(
    "rollcall_loop_lag_seconds",
    "How late the event loop runs a callback that is due",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
)


class Server:
    """A running metrics endpoint; whoever called `serve` closes it."""

    def __init__(self, httpd: WSGIServer, thread: Thread) -> None:
        self._httpd = httpd
        self._thread = thread

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._httpd.server_port

    def close(self) -> None:
        """Stop answering and free the port."""
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join(_STOP_S)


def serve(port: int, host: str = "127.0.0.1") -> Server:
    """Serve the metrics over HTTP from a thread; port 0 takes a free one.

    Raises:
        Misconfigured: the port is taken or the host is not ours.

    """
    try:
        return Server(*start_http_server(port, addr=host))
    except OSError as error:
        raise Misconfigured(
            "metrics_port_unusable",
            f"cannot serve metrics on {host}:{port} ({error.strerror}): set another ROLLCALL_METRICS_PORT",
        ) from error
