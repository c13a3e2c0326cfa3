"""Errors name the answer, not the source.

    RollcallError
    |-- TryLater         it may work later: wait, then ask again
    |-- OwnerMustAct     nothing helps until the connector's owner acts
    |-- ContractBroken   an unknown shape: set aside, go on, alert
    |-- Refused          what was asked for is wrong; the message says what to do instead
    `-- Misconfigured    settings or vault keys are wrong: nothing starts until an operator acts

All are picklable and carry a `reason`, a short stable word that is also the log and metric label.
Anything else that is raised is our bug and fails loudly.
"""

from __future__ import annotations


class RollcallError(Exception):
    """Base of what Rollcall raises on purpose.

    Args:
        reason: a short stable word (`snake_case`), the log and metric label.
        message: one line for people: what is wrong and what to do.
        action: what a screen may offer (`schemas.connectors.Action`), or `none`.

    """

    def __init__(self, reason: str, message: str = "", *, action: str = "none") -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.message = message or reason
        self.action = action

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(kind: type[RollcallError], state: dict[str, object]) -> RollcallError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class TryLater(RollcallError):  # noqa: N818 - the name is the answer
    """It may work later. `retry_after_s` is the least wait in seconds, None when nobody said."""

    def __init__(self, reason: str, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(reason, message)
        self.retry_after_s = retry_after_s


class OwnerMustAct(RollcallError):  # noqa: N818 - the name is the answer
    """Nothing helps until the connector's owner acts; `action` says how."""


class ContractBroken(RollcallError):  # noqa: N818 - the name is the answer
    """The provider or a stored message has a shape we do not know."""


class Refused(RollcallError):  # noqa: N818 - the name is the answer
    """The request is wrong (unknown connector, bad URL, key in use): nothing was written."""


class Misconfigured(RollcallError):  # noqa: N818 - the name is the answer
    """The process cannot start as it is set up; the message has one line per problem and no secret."""
