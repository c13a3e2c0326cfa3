"""The message that the README tells a backend to write by hand is one that our Celery takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from amqp.basic_message import Message as AmqpMessage
from celery import Celery
from celery.worker.request import Request
from kombu import Consumer
from kombu.transport.pyamqp import Message as KombuAmqpMessage
from pydantic import SecretStr

from schemas.messages import RequestSync
from tasks import sync
from tasks.app import SYNC, app, configure
from tests.fixtures.broker import forget_connections
from worker.settings import Settings

LIST = f"{SYNC}"
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ENVELOPE, PROPERTIES = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL))
ARGUMENTS = json.loads(ENVELOPE["body"])[1]


@pytest.fixture
def celery(redis_url: str) -> Iterator[Celery]:
    """Our app with the run's Valkey as its broker."""
    configure(Settings(redis_url=SecretStr(redis_url)))
    app.loader.import_default_modules()
    yield app
    forget_connections()


def run(message: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let Celery's own worker code run the message's task; return which of our recipes it called."""
    called: list[str] = []
    monkeypatch.setattr(sync.bridge, "run", lambda name, _work, **_options: called.append(name))
    request = Request(message, app=app)
    request.execute()
    assert request.name == "rollcall.request_sync"
    assert request.args == []
    RequestSync.model_validate(request.kwargs)
    return called


def receive(celery: Celery) -> list[Any]:
    """Take what waits in the queue, as a worker does."""
    received: list[Any] = []
    with celery.connection_for_read() as connection:
        queue = celery.amqp.queues[SYNC]
        with Consumer(connection, [queue], on_message=received.append, accept=["json"]):
            connection.drain_events(timeout=5)
        for message in received:
            message.ack()
    return received


def test_the_readme_shows_every_argument() -> None:
    """The example has all fields of the message's model, and the model takes it."""
    assert set(ARGUMENTS) == set(RequestSync.model_fields)
    RequestSync.model_validate(ARGUMENTS)
    table = README[README.index("| argument | value |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(RequestSync.model_fields)
    assert f"LPUSH {LIST}" in README


def test_a_pushed_text_is_a_task(celery: Celery, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON text that was pushed without Celery is received, run and acknowledged as any other message."""
    with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
        client.lpush(LIST, json.dumps(ENVELOPE))
        (message,) = receive(celery)
        assert run(message, monkeypatch) == ["request_sync"]
        assert client.llen(LIST) == 0
        assert client.hlen("unacked") == 0


def test_an_amqp_message_is_a_task(celery: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same body with the properties for RabbitMQ is run as well."""
    # The property is named `headers` in AMQP 0-9-1; this driver has another name for it.
    properties = {("application_headers" if n == "headers" else n): value for n, value in PROPERTIES.items()}
    delivered = AmqpMessage(ENVELOPE["body"], channel=Mock(), **properties)
    delivered.delivery_info = {"exchange": "", "routing_key": SYNC, "delivery_tag": 1}
    message = KombuAmqpMessage(delivered, channel=Mock(no_ack_consumers=None))
    message.accept = {"application/json"}
    assert run(message, monkeypatch) == ["request_sync"]


def test_the_default_exchange_leads_to_our_queue(celery: Celery) -> None:
    """On RabbitMQ the empty exchange and the queue's name suffice: our queue is durable and named as we say."""
    queue = celery.amqp.queues[SYNC]
    assert (queue.name, queue.durable, queue.auto_delete) == (SYNC, True, False)


def test_our_own_messages_look_the_same(celery: Celery, redis_url: str) -> None:
    """What Celery itself sends has the documented fields, so that the example is no special case."""
    celery.send_task("rollcall.request_sync", kwargs=ARGUMENTS, queue=SYNC, ignore_result=True)
    with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
        (text,) = client.lrange(LIST, 0, -1)
    sent = json.loads(text)
    assert sent.keys() >= ENVELOPE.keys()
    assert sent["headers"].keys() >= ENVELOPE["headers"].keys()
    assert sent["properties"].keys() >= ENVELOPE["properties"].keys()
    assert sent["properties"]["delivery_info"] == ENVELOPE["properties"]["delivery_info"]


def test_a_message_with_a_key_is_refused(celery: Celery, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message with a field that nobody asked for does nothing, and its value stands in no log."""
    body = json.dumps([[], {**ARGUMENTS, "api_key": "sk_canary"}, {}])
    logged = Mock()
    monkeypatch.setattr(sync, "log", logged)
    with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
        client.lpush(LIST, json.dumps({**ENVELOPE, "body": body}))
    (message,) = receive(celery)
    called: list[str] = []
    monkeypatch.setattr(sync.bridge, "run", lambda name, _work, **_options: called.append(name))
    Request(message, app=app).execute()
    assert called == []
    assert "request_sync_malformed" in str(logged.mock_calls)
    assert "canary" not in str(logged.mock_calls)
