"""Counting what waits at the broker while its connection breaks."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from tasks.app import BACKFILL, FETCH, configure, waiting_messages
from tests.fixtures.broker import forget_connections
from tests.fixtures.proxy import Proxy
from worker.errors import TryLater
from worker.settings import Settings

EMPTY = {FETCH: 0, BACKFILL: 0}


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    """Stand before the run's Valkey, which is our app's broker."""
    port = urlsplit(redis_url).port
    assert port is not None
    with Proxy(port) as made:
        configure(Settings(redis_url=SecretStr(made.through(redis_url))))
        yield made
        forget_connections()


def test_a_broken_connection_to_the_broker_is_waited_for(proxy: Proxy) -> None:
    """Whatever the driver calls it, a tick tries later; nothing of the broker's address is told."""
    assert waiting_messages(list(EMPTY)) == EMPTY
    proxy.refuse()
    for _ in range(2):  # the connection that was there breaks, then none can be made
        with pytest.raises(TryLater) as later:
            waiting_messages(list(EMPTY))
        assert later.value.reason == "broker_unreachable"
        assert str(proxy.port) not in later.value.message
    proxy.heal()
    assert waiting_messages(list(EMPTY)) == EMPTY
