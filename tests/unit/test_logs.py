"""Logs: every line in one shape, and no secret in any of them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from schemas.connectors import Dataset
from worker import logs
from worker.redaction import redact
from worker.settings import LogFormat, LogLevel

KEY = "sk_" + "0a1b2c3d" * 6
PASSWORD = "hunter2#x"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, hooks = root.handlers[:], root.level, (sys.excepthook, threading.excepthook)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    structlog.reset_defaults()


Lines = Callable[[], list[dict[str, Any]]]


def configured(level: LogLevel = "INFO", log_format: LogFormat = "json") -> tuple[io.StringIO, Lines]:
    stream = io.StringIO()
    logs.configure(log_format, level, process="writer", stream=stream)
    return stream, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_shape_for_ours_and_foreign_lines() -> None:
    """Our lines and the standard library's are JSON of one shape, with a UTC time and the process."""
    _, lines = configured()
    structlog.get_logger("worker.x").info("published", events=3)
    logging.getLogger("celery.worker").warning("lost %s of %d", "it", 2)
    ours, foreign = lines()
    assert ours | {"timestamp": ""} == {
        "event": "published",
        "events": 3,
        "level": "info",
        "logger": "worker.x",
        "process": "writer",
        "timestamp": "",
    }
    assert (foreign["event"], foreign["level"], foreign["logger"]) == (
        "lost it of 2",
        "warning",
        "celery.worker",
    )
    assert ours.keys() - {"events"} == foreign.keys()
    for line in (ours, foreign):
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)


def test_auto_is_json_off_a_terminal() -> None:
    """`auto` writes JSON into a pipe and pretty lines on a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    _, lines = configured(log_format="auto")
    structlog.get_logger().info("hello")
    assert lines()[0]["event"] == "hello"
    terminal = Terminal()
    logs.configure("auto", "INFO", process="writer", stream=terminal)
    logging.getLogger("x").info("hello")
    assert "\x1b[" in terminal.getvalue()


def test_the_console_redacts_too() -> None:
    """Pretty lines pass the same redaction, tracebacks included."""
    stream, _ = configured(log_format="console")
    structlog.get_logger().error("failed", key=KEY, exc_info=ValueError(KEY))
    assert "ValueError" in stream.getvalue()
    assert KEY not in stream.getvalue()


def test_levels_filter_both() -> None:
    """Below the level neither our loggers nor foreign ones write, and values are not even looked at."""

    class Untouchable:
        def __str__(self) -> str:
            raise AssertionError

    _, lines = configured("WARNING")
    structlog.get_logger().info("no", value=Untouchable())
    logging.getLogger("kombu").info("no %s", Untouchable())
    structlog.get_logger().warning("yes")
    assert [line["event"] for line in lines()] == ["yes"]


async def test_bound_ids_are_on_every_line_of_a_task() -> None:
    """Ids that a task binds stand on every line it writes from then on, foreign ones too, and on nobody else's."""
    _, lines = configured()
    run = UUID(int=7)

    async def inner() -> None:
        logs.bind(dataset=Dataset.USAGE_MEMBER, tenant="t2")
        logging.getLogger("aiohttp").info("inner")

    async def outer() -> None:
        logs.bind(tenant="t1", run=run)
        await asyncio.create_task(inner())
        structlog.get_logger().info("outer")

    await asyncio.create_task(outer())
    structlog.get_logger().info("after")
    inside, around, after = lines()
    assert (inside["tenant"], inside["run"], inside["dataset"]) == ("t2", str(run), "usage.member")
    assert (around["tenant"], around["run"]) == ("t1", str(run))
    assert "dataset" not in around
    assert not {"tenant", "run", "dataset"} & after.keys()


class Body(BaseModel):
    """A model with a secret inside."""

    token: SecretStr
    text: str


@pytest.mark.parametrize(
    "value",
    [
        KEY,
        KEY.encode(),
        SecretStr(KEY),
        {"deep": [{"er": (1, {"x": f"key {KEY}"})}]},
        {KEY: 1},
        {"xi-api-key": "unusual key"},
        [("xi-api-key", "unusual key")],
        {"Authorization": "Bearer unusual key"},
        f"xi-api-key: {KEY}",
        Body(token=SecretStr("unusual key"), text=KEY),
        ValueError(f"bad {KEY}"),
        {KEY},
        [[[[[[[[[[[KEY]]]]]]]]]]],
        f"redis://:{PASSWORD}@127.0.0.1/0",
        {"headers": {b"xi-api-key": KEY.encode()}},
    ],
    ids=repr,
)
async def test_no_value_shows_a_secret(value: object) -> None:
    """Whatever a secret is wrapped in, as a field, a bound id or a foreign argument, it is not written."""
    stream, lines = configured()
    logs.bind(odd=f"id {KEY}")
    structlog.get_logger().info(f"about {KEY}", value=value)
    logging.getLogger("celery").error("got %s", value)
    assert len(lines()) == 2
    for secret in (KEY, PASSWORD, "unusual"):
        assert secret not in stream.getvalue()


def test_a_circle_ends() -> None:
    """A value that holds itself is written as far as it makes sense."""
    circle: list[object] = [KEY]
    circle.append(circle)
    _, lines = configured()
    structlog.get_logger().info("round", circle=circle)
    assert lines()[0]["circle"][0] == "sk_***"


def test_plain_values_stay() -> None:
    """Numbers, flags, nothing, lists and ids come out as they went in."""
    _, lines = configured()
    structlog.get_logger().info("x", n=2**70, f=0.5, b=True, none=None, many=[1, "a"], id=UUID(int=1))
    line = lines()[0]
    assert [line[name] for name in ("n", "f", "b", "none", "many")] == [2**70, 0.5, True, None, [1, "a"]]
    assert line["id"] == str(UUID(int=1))


def test_exceptions_are_redacted_text_without_locals() -> None:
    """A logged exception is its traceback as text, causes included, without secrets and local values."""
    stream, lines = configured()

    def fail(local: str) -> None:
        try:
            raise OSError("connect " + local)  # noqa: TRY301 - the cause is made here
        except OSError as error:
            raise RuntimeError(KEY) from error

    try:
        fail(f"postgresql://u:{PASSWORD}@127.0.0.1/x as ada@example.org")
    except RuntimeError:
        structlog.get_logger().exception("failed")
        logging.getLogger("celery").exception("failed")
    assert len(lines()) == 2
    for line in lines():
        assert "OSError: connect postgresql://u:***@127.0.0.1/x as ***@***" in line["exception"]
        assert "RuntimeError: sk_***" in line["exception"]
    for secret in (KEY, PASSWORD, "ada@"):
        assert secret not in stream.getvalue()


def test_uncaught_exceptions_are_one_line() -> None:
    """What nobody catches becomes one redacted line of level critical, in threads too."""
    stream, lines = configured()
    error = ValueError(KEY)
    sys.excepthook(ValueError, error, None)
    threading.excepthook(threading.ExceptHookArgs((ValueError, error, None, None)))
    threading.excepthook(threading.ExceptHookArgs((SystemExit, SystemExit(0), None, None)))
    assert [(line["event"], line["level"]) for line in lines()] == [("uncaught exception", "critical")] * 2
    assert "ValueError: sk_***" in lines()[0]["exception"]
    assert KEY not in stream.getvalue()


def test_an_interrupt_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is left to Python."""
    stream, _ = configured()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stream.getvalue() == ""
    assert "KeyboardInterrupt" in capsys.readouterr().err


def test_a_line_that_cannot_be_made_is_told_without_its_arguments() -> None:
    """A broken log call stops nothing and shows where it is, not what it was given."""
    stream, _ = configured()
    logging.getLogger("kombu").error("%d left", KEY)
    assert "lost a log line of test_logs:" in stream.getvalue()
    assert KEY not in stream.getvalue()


def test_a_closed_stream_stops_nothing() -> None:
    """Work goes on when nobody can read its log."""
    stream, _ = configured()
    stream.close()
    structlog.get_logger().error("into the void")


def test_the_last_configuration_wins() -> None:
    """Configuring twice does not write twice."""
    first, _ = configured()
    second, _ = configured()
    logging.getLogger("x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_standard_error_is_looked_up_when_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a stream, lines go to whatever standard error is at that moment."""
    logs.configure("json", "INFO", process="beat")
    logging.getLogger("x").info("here")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["process"] == "beat"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"key {KEY}.", "key sk_***."),
        ("sk_deadbeef!", "sk_***!"),
        ("sk_AbCdEfGhIjKlMnOpQr", "sk_***"),
        (f"\\n{KEY}", "\\nsk_***"),
        (f"?k%3D{KEY}&x=1", "?k%3Dsk_***&x=1"),
        ("xi-api-key: abc", "xi-api-key: ***"),
        ("XI-API-KEY=abc&x=1", "XI-API-KEY=***&x=1"),
        ("xi_api_key%3Dabc", "xi_api_key%3D***"),
        ('{"xi-api-key": "a b\\"c", "x": 1}', '{"xi-api-key": "***", "x": 1}'),
        ('"{\\"xi-api-key\\": \\"abc\\", 1}"', '"{\\"xi-api-key\\": \\"***\\", 1}"'),
        ("{'xi-api-key': 'abc', 'x': 1}", "{'xi-api-key': '***', 'x': 1}"),
        ("[(b'xi-api-key', b'abc'), 1]", "[(b'xi-api-key', b'***'), 1]"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("host=h password='p w' user=u", "host=h password='***' user=u"),
        ("redis://:p@127.0.0.1/0", "redis://:***@127.0.0.1/0"),
        ("amqp://u:p@ss@h//, amqp://v:q@h", "amqp://u:***@h//, amqp://v:***@h"),
        ("to Ada.O'Neil+x@mail.example.org now", "to ***@*** now"),
        ("?email=ada%40example.org&x", "?email=***@***&x"),
    ],
)
def test_secrets_and_addresses_are_masked(text: str, clean: str) -> None:
    """Each way a secret or an address stands in text is masked, and what is around it stays."""
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "task_12345678 disk_full risk_assessment",
        "password authentication failed for user x",
        '{"status":"needs_authorization","message":"x"}',
        "usage.api_key: denied",
        "http://127.0.0.1:8080/v1/user?x=1",
        "redis://127.0.0.1:6379/0",
        "key_id main",
        "2026-04-01T00:00:00Z @ 5",
        "7d5a3c52-0d0c-4f5e-9a3b-111111111111",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """Ids, words and addresses of servers are what logs are for."""
    assert redact(text) == text


@given(text=st.lists(st.sampled_from([*"\"'\\:@/%=,; \nb", "sk_", KEY, "a.b", "xi-api-key", "password", "://"])))
def test_redacting_twice_is_redacting_once(text: list[str]) -> None:
    """Redaction is idempotent, so a stored error may pass it again on its way to a log."""
    once = redact("".join(text))
    assert redact(once) == once
    assert KEY not in once


@given(before=st.text(), after=st.text())
def test_a_key_shows_nowhere(before: str, after: str) -> None:
    """Whatever stands around an API key, it is masked."""
    assert KEY not in redact(before + KEY + after)


def test_long_text_is_cheap() -> None:
    """A long body without any secret is looked through in about linear time, not hours."""
    for piece in ("a", "a.", "@", "://a:", "xi-api-key", "sk_", '"', "password:"):
        redact(piece * (300_000 // len(piece)) + " @")
