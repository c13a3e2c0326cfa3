"""Reading control requests strictly: an unknown or wrong field is refused with a message that names it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

Check = Callable[[Any], Any]

REQUIRED: Final = object()
ABSENT: Final = object()

_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()


class BadPayload(ValueError):  # noqa: N818 - the name says what it is
    """A control request that cannot be read; the message names the field and what was expected."""


@dataclass(frozen=True, slots=True)
class Field:
    """How to check one field; `default` may be REQUIRED, or ABSENT to leave an omitted field out."""

    check: Check
    default: Any = ABSENT


def read(payload: Any, fields: Mapping[str, Field], what: str) -> dict[str, Any]:
    """Return the checked values of a JSON object.

    Raises:
        BadPayload: not an object, an unknown field, a missing one, or a value of the wrong kind.
    """
    if not isinstance(payload, dict):
        raise BadPayload(f"{what}: expected a JSON object")
    unknown = sorted(set(payload) - set(fields))
    if unknown:
        raise BadPayload(f"{what}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in payload:
            try:
                values[name] = field.check(payload[name])
            except ValueError as error:
                raise BadPayload(f"{what}.{name}: {error}") from error
        elif field.default is REQUIRED:
            raise BadPayload(f"{what}.{name}: required")
        elif field.default is not ABSENT:
            values[name] = field.default
    return values


def text(value: Any) -> str:
    """Accept a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a string that is not empty")
    return value


def flag(value: Any) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")  # noqa: TRY004 - one kind of error for every wrong value
    return value


def integer(least: int, most: int = 2**63) -> Check:
    """Accept a whole number within bounds."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """Accept a number within bounds."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"expected a number from {least} to {most}")
        return float(value)

    return check


def one_of(*choices: Any) -> Check:
    """Accept one of the given values."""

    def check(value: Any) -> Any:
        # A plain `in` would let true pass for 1.
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError(f"expected one of {', '.join(repr(choice) for choice in choices)}")
        return value

    return check


def optional(check: Check) -> Check:
    """Accept null besides what `check` accepts."""
    return lambda value: None if value is None else check(value)


def list_of(check: Check) -> Check:
    """Accept a list whose items all pass."""

    def check_all(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError("expected a list")  # noqa: TRY004 - one kind of error for every wrong value
        return [check(item) for item in value]

    return check_all


def day(value: Any) -> int:
    """Accept `YYYY-MM-DD`; returns days since 1970-01-01."""
    try:
        return date.fromisoformat(value).toordinal() - _EPOCH_ORDINAL
    except (TypeError, ValueError):
        raise ValueError("expected a day as YYYY-MM-DD") from None


def day_text(day_number: int) -> str:
    """Write days since 1970-01-01 as `YYYY-MM-DD`."""
    return date.fromordinal(day_number + _EPOCH_ORDINAL).isoformat()


def moment(value: Any) -> datetime:
    """Accept an ISO time; without a zone it is UTC."""
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("expected an ISO time such as 2026-04-01T12:00:00Z") from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def hundredths(value: Any) -> int:
    """Accept an amount of credits, as number or string, with at most two decimals; returns hundredths."""
    try:
        amount = Decimal(str(value)) * 100
        whole = int(amount)
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError("expected an amount") from None
    if amount != whole or whole < 0:
        raise ValueError("expected an amount of zero or more with at most two decimals")
    return whole
