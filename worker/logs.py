"""Logs: one line per event on standard error, JSON or pretty, with nobody's secret or address in it.

Lines of the standard library's logging (Celery, aiohttp, psycopg, ...) pass through the same chain. Celery
leaves the root logger alone once its `setup_logging` signal has a receiver; the receiver calls `configure`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, TextIO

import structlog
from pydantic import SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from worker.redaction import MASK, is_masked_field, redact
from worker.settings import LogFormat, LogLevel

_MAX_DEPTH: Final = 8


def configure(log_format: LogFormat, level: LogLevel, *, process: str, stream: TextIO | None = None) -> None:
    """Set up logging for the whole process; the last call wins.

    Args:
        log_format: `auto` is `console` if the stream is a terminal, else `json`.
        level: the least level written; below it a call costs next to nothing.
        process: what this process is (`worker`, `writer`, `beat`, ...), on every line.
        stream: where lines go, by default whatever `sys.stderr` is when a line is written.

    """
    terminal = (stream or sys.stderr).isatty()
    if log_format == "auto":
        log_format = "console" if terminal else "json"

    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_process,
    ]
    render: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
    )
    handler = _Lines(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,  # text without locals, so that the next step sees it
                _redact_event,
                render,
            ],
        )
    )
    structlog.configure(
        processors=[*chain, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_thread_uncaught


def bind(**ids: object) -> None:
    """Put ids (`tenant`, `connector`, `run`, `dataset`) on every line that this task writes from now on.

    Tasks that it makes inherit them; whoever made it does not see them.
    """
    structlog.contextvars.bind_contextvars(**ids)


class _Lines(logging.Handler):
    """Writes each record as one piece, so that processes sharing a terminal do not mix their lines."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except Exception:  # noqa: BLE001 - a line that cannot be written must not stop the work it tells of
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        # The standard one prints the record's raw arguments.
        with contextlib.suppress(Exception):
            self._write(f"lost a log line of {record.module}:{record.lineno}: {sys.exc_info()[0]}")

    def _write(self, line: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


def _redact_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: MASK if is_masked_field(name) else _clean(value, 1) for name, value in event.items()}


def _clean(value: Any, depth: int) -> Any:
    """Return `value` as JSON data with every text in it redacted; what lies too deep becomes text."""
    deep = depth >= _MAX_DEPTH
    match value:
        case None | bool() | int() | float():
            return value
        case SecretStr():
            clean: Any = MASK
        case bytes():
            clean = redact(value.decode(errors="replace"))
        case Mapping() if not deep:
            clean = {
                redact(str(name)): MASK if is_masked_field(str(name)) else _clean(item, depth + 1)
                for name, item in value.items()
            }
        case (str() as name, _) if is_masked_field(name):  # a header as a pair
            clean = [name, MASK]
        case list() | tuple() | set() | frozenset() if not deep:
            clean = [_clean(item, depth + 1) for item in value]
        case BaseException():
            clean = redact(repr(value))
        case _:
            clean = redact(str(value))
    return clean


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("rollcall").critical("uncaught exception", exc_info=(kind, error, trace))


def _log_thread_uncaught(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
