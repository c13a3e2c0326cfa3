"""Printing: for people on a terminal of 100 columns, or as JSON with one object per line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.errors import Refused, RollcallError

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON: of lists one object per line; errors on stderr as JSON too.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
WIDTH: Final = 100
_GOOD: Final = frozenset({"connected", "granted", "succeeded", "complete"})
_BAD: Final = frozenset({"disconnected", "failed", "denied"})
_DOUBTFUL: Final = frozenset({"degraded", "partial", "refused", "cancelled", "waiting", "held", "paused"})


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; `flexible` ones give way when the line is too long."""

    title: str
    text: Callable[[Mapping[str, Any]], object]
    flexible: bool = False
    justify: Literal["left", "right"] = "left"


def console(*, error: bool = False) -> Console:
    """Give a console on stdout or stderr; without a terminal it is `WIDTH` columns wide."""
    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=False)


def print_json(value: object) -> None:
    """Print one value as one line."""
    sys.stdout.write(orjson.dumps(value, default=_plain, option=orjson.OPT_UTC_Z).decode() + "\n")
    sys.stdout.flush()


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], *, as_json: bool, empty: str) -> None:
    """Print a list: a table, or one object per line; `empty` is said when there is nothing to list."""
    if as_json:
        for row in rows:
            print_json(row)
        return
    found = list(rows)
    if not found:
        say(empty)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title, justify=column.justify, no_wrap=not column.flexible, overflow="fold", min_width=4
        )
    for row in found:
        table.add_row(*(_cell(column.text(row)) for column in columns))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, one a line; empty ones are left out."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in {None, ""}:
            table.add_row(name, _cell(value))
    console().print(table)


def say(text: str) -> None:
    """Say a line on stdout."""
    console().print(Text(printable(text)), soft_wrap=True)


def note(text: str) -> None:
    """Say a line on stderr, beside the result."""
    console(error=True).print(Text(printable(text)), soft_wrap=True)


def confirm(question: str, *, yes: bool) -> None:
    """Ask on the terminal unless `yes`; a no ends the command.

    Raises:
        Refused: nobody is there to answer.

    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused("argument_invalid", "Nobody can answer here: add --yes")
    typer.confirm(printable(question), abort=True, err=True)


def print_error(error: RollcallError, *, as_json: bool) -> None:
    """Print what is wrong and what to do: one line, or `{"error": {"reason", "message", "action"}}`."""
    if as_json:
        content = {"reason": error.reason, "message": error.message, "action": error.action}
        sys.stderr.write(orjson.dumps({"error": content}).decode() + "\n")
        return
    console(error=True).print(Text.assemble(("Error: ", "bold red"), printable(error.message)), soft_wrap=True)


def printable(text: str) -> str:
    """Replace what could steer a terminal: names come from the provider."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def ago(at: datetime | None, *, now: datetime | None = None) -> str:
    """Write how long ago (or how soon) a time is; a dash for none."""
    if at is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    return f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"


def duration(seconds: float) -> str:
    """Write seconds in their largest fitting unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _cell(value: object) -> Text:
    text = printable("-" if value is None else str(value))
    style = "green" if text in _GOOD else "red" if text in _BAD else "yellow" if text in _DOUBTFUL else ""
    return Text(text, style=style)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else str(value)
