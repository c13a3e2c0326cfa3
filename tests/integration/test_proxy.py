"""The fault proxy: each fault is what it says, and healing ends it."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fixtures.proxy import Proxy

PATIENCE_S = 10.0
SHORT_S = 0.3
"""How long nothing must come to count as nothing."""


class Echo(socketserver.BaseRequestHandler):
    """Says back what it hears, in upper case."""

    def handle(self) -> None:
        self.request.settimeout(PATIENCE_S)
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data.upper())
        except OSError:  # as some tests want it
            return


class Server(socketserver.ThreadingTCPServer):
    """An echo server whose threads end with the test."""

    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that answers."""
    with Server(("127.0.0.1", 0), Echo) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join(PATIENCE_S)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy before it."""
    with Proxy(server.server_address[1]) as made:
        yield made


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)


def ask(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question)
    return hear(client, len(question))


def hear(client: socket.socket, size: int) -> bytes:
    """Read `size` bytes, or what comes before the end."""
    heard = b""
    while len(heard) < size and (data := client.recv(size - len(heard))):
        heard += data
    return heard


def silent(client: socket.socket) -> bool:
    client.settimeout(SHORT_S)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_S)
    return False


def assert_refused(proxy: Proxy) -> None:
    with pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)


def test_it_forwards_both_ways(proxy: Proxy) -> None:
    """Without a fault everything passes, large pieces too, and an end on one side ends the other."""
    with connect(proxy) as one, connect(proxy) as two:
        assert ask(one, b"hello") == b"HELLO"
        large = b"x" * 3_000_000
        sender = threading.Thread(target=two.sendall, args=[large])
        sender.start()
        assert hear(two, len(large)) == large.upper()
        sender.join(PATIENCE_S)
        assert (proxy.links, proxy.accepted) == (2, 2)
    give_up = time.monotonic() + PATIENCE_S
    while proxy.links and time.monotonic() < give_up:
        time.sleep(0.01)
    assert proxy.links == 0


def test_a_url_is_led_through_it(proxy: Proxy) -> None:
    """Only host and port change."""
    led = proxy.through("postgresql://u:p%40@127.0.0.1:5432/db?sslmode=disable")
    assert led == f"postgresql://u:p%40@127.0.0.1:{proxy.port}/db?sslmode=disable"
    assert proxy.through("redis://127.0.0.1:1/0") == f"redis://127.0.0.1:{proxy.port}/0"


def test_slow_delays_both_directions(proxy: Proxy) -> None:
    """An answer takes at least two delays, and none after healing."""
    with connect(proxy) as client:
        ask(client, b"warm")
        proxy.slow(0.2)
        began = time.monotonic()
        assert ask(client, b"slow") == b"SLOW"
        assert time.monotonic() - began >= 0.4
        proxy.heal()
        assert ask(client, b"fast") == b"FAST"


def test_hang_keeps_what_arrives(proxy: Proxy) -> None:
    """While it hangs connections are made and nothing comes; healed, what was said is answered."""
    with connect(proxy) as old:
        ask(old, b"warm")
        proxy.hang()
        with connect(proxy) as new:
            old.sendall(b"old")
            new.sendall(b"new")
            assert silent(old)
            assert silent(new)
            proxy.heal()
            assert (hear(old, 3), hear(new, 3)) == (b"OLD", b"NEW")


def test_cut_ends_in_order_and_once(proxy: Proxy) -> None:
    """Open connections see an end, new ones work."""
    with connect(proxy) as client:
        ask(client, b"warm")
        assert proxy.cut() == 1
        assert client.recv(1) == b""
    with connect(proxy) as client:
        assert ask(client, b"again") == b"AGAIN"


def test_reset_is_a_reset_and_once(proxy: Proxy) -> None:
    """Open connections see a reset, new ones work."""
    with connect(proxy) as client:
        ask(client, b"warm")
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        assert ask(client, b"again") == b"AGAIN"


def test_refuse_lasts_until_healed(proxy: Proxy) -> None:
    """Every connection is reset, open ones and new ones, until it is healed."""
    with connect(proxy) as client:
        ask(client, b"warm")
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert_refused(proxy)
    proxy.heal()
    with connect(proxy) as client:
        assert ask(client, b"again") == b"AGAIN"


def test_truncate_cuts_one_answer(proxy: Proxy) -> None:
    """The answer ends after so many bytes; other connections and later ones are whole."""
    with connect(proxy) as client, connect(proxy) as other:
        ask(client, b"warm")
        ask(other, b"warm")
        proxy.truncate(6)
        assert ask(client, b"four") == b"FOUR"
        assert ask(client, b"more words") == b"MO"
        assert client.recv(1) == b""
        assert ask(other, b"whole") == b"WHOLE"


def test_a_server_that_is_gone_resets(server: Server) -> None:
    """Behind the proxy nobody listens: the client is reset, and served when somebody does."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with Proxy(port) as proxy:
        assert_refused(proxy)
        proxy.target_port = server.server_address[1]
        with connect(proxy) as client:
            assert ask(client, b"here") == b"HERE"
