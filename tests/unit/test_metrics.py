"""Metrics: names, units, closed labels, and an endpoint with one owner."""

from __future__ import annotations

import re
from threading import Thread
from typing import Any
from unittest.mock import Mock, create_autospec
from wsgiref.simple_server import WSGIServer

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest

from schemas.connectors import Dataset, PartStatus
from worker import metrics
from worker.errors import Misconfigured

OURS: dict[str, Any] = {
    name: value for name, value in vars(metrics).items() if isinstance(value, Counter | Gauge | Histogram)
}
LABELS = {
    "dataset", "finding", "result", "effect", "status", "kind", "reason", "partition", "task", "outcome"
}  # fmt: skip


@pytest.mark.parametrize("metric", OURS.values(), ids=OURS)
def test_names_and_units(metric: Any) -> None:
    """Every metric is `rollcall_*`, described, and a histogram names its unit."""
    family = metric.describe()[0]
    assert re.fullmatch(r"rollcall_[a-z_]+", family.name)
    assert family.documentation
    assert (family.type == "histogram") == family.name.endswith("_seconds")


@pytest.mark.parametrize("metric", OURS.values(), ids=OURS)
def test_labels_are_closed_sets(metric: Any) -> None:
    """No metric is labelled with a tenant, a connector, a key or a name."""
    assert set(metric._labelnames) <= LABELS


def test_our_words_are_the_label_values() -> None:
    """Enum members label by their value, as contracts and dashboards write them."""
    metrics.OBSERVATIONS.labels(Dataset.USAGE_API_KEY, metrics.Result.QUIET).inc(0)
    metrics.PARTS.labels(PartStatus.WAITING).set(0)
    page = generate_latest().decode()
    assert 'rollcall_observations_total{dataset="usage.api_key",result="quiet"}' in page
    assert 'rollcall_parts{status="waiting"}' in page


def test_the_endpoint_is_local_and_closed_by_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint listens on 127.0.0.1 unless told otherwise; closing stops it and frees the port."""
    httpd, thread = create_autospec(WSGIServer, instance=True), create_autospec(Thread, instance=True)
    httpd.server_port = 9102
    start = Mock(return_value=(httpd, thread))
    monkeypatch.setattr(metrics, "start_http_server", start)
    server = metrics.serve(9102)
    start.assert_called_once_with(9102, addr="127.0.0.1")
    assert server.port == 9102
    server.close()
    httpd.shutdown.assert_called_once_with()
    httpd.server_close.assert_called_once_with()
    thread.join.assert_called_once()


def test_a_taken_port_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port in use is a matter of settings, told by name."""
    monkeypatch.setattr(metrics, "start_http_server", Mock(side_effect=OSError(98, "Address already in use")))
    with pytest.raises(Misconfigured, match=r"127\.0\.0\.1:9102 \(Address already in use\).*METRICS_PORT"):
        metrics.serve(9102)
