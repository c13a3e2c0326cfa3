"""Error bodies of the provider: five envelopes, all read leniently.

Live bodies deviate from the documented ones, so no field is required that a verdict can do without and a
field of the wrong type reads as absent. The sixth thing an error may be, no JSON at all, has no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError


def _text_or_none(value: object) -> object:
    return value if isinstance(value, str) else None


def _loc_or_empty(value: object) -> object:
    return [str(step) for step in value] if isinstance(value, list) else []


Text = Annotated[str | None, BeforeValidator(_text_or_none)]


@dataclass(frozen=True, slots=True)
class Problem:
    """What any envelope says: `status` is the legacy discriminator, `code` the documented one."""

    status: str | None = None
    code: str | None = None
    message: str | None = None
    request_id: str | None = None


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class CurrentDetail(_Wire):
    """Detail of `CurrentError`; docs advise to ignore `status`, live bodies need it."""

    code: str
    type: Text = None
    message: Text = None
    status: Text = None
    request_id: Text = None
    param: Text = None
    docs_url: Text = None


class CurrentError(_Wire):
    """`{"detail": {"type", "code", "message", "status", "request_id", ...}}` (provider docs 2026)."""

    detail: CurrentDetail

    @property
    def problem(self) -> Problem:
        """The same facts, whatever the envelope."""
        said = self.detail
        return Problem(said.status, said.code, said.message, said.request_id)


class LegacyDetail(_Wire):
    """Detail of `LegacyError`."""

    status: Text = None
    message: Text = None
    request_id: Text = None


class LegacyError(_Wire):
    """`{"detail": {"status", "message"}}` (seen in the wild through 2026: home-assistant/core#160414)."""

    detail: LegacyDetail

    @property
    def problem(self) -> Problem:
        """The same facts, whatever the envelope."""
        return Problem(self.detail.status, None, self.detail.message, self.detail.request_id)


class StringError(_Wire):
    """`{"detail": "Not Found"}`, the framework's answer to an unrouted path."""

    detail: str

    @property
    def problem(self) -> Problem:
        """The same facts, whatever the envelope."""
        return Problem(message=self.detail)


class InvalidField(_Wire):
    """One finding of a validation; its `input` is dropped because it repeats what was sent."""

    type: Text = None
    loc: Annotated[list[str], BeforeValidator(_loc_or_empty)] = []
    msg: Text = None


class InvalidRequest(_Wire):
    """`{"detail": [{"type", "loc", "msg", "input"}]}`, status 422 (official SDK)."""

    detail: list[InvalidField]

    @property
    def problem(self) -> Problem:
        """The same facts, whatever the envelope."""
        return Problem(message="; ".join(f"{'.'.join(item.loc)}: {item.msg or '?'}" for item in self.detail))


class BareError(_Wire):
    """`{"status", "message"}` without `detail` (seen in the wild: elevenlabs/elevenlabs-python#611)."""

    status: Text = None
    code: Text = None
    message: Text = None

    @property
    def problem(self) -> Problem:
        """The same facts, whatever the envelope."""
        return Problem(self.status, self.code, self.message)


ErrorEnvelope: TypeAlias = CurrentError | LegacyError | StringError | InvalidRequest | BareError

_ENVELOPE: Final[TypeAdapter[Any]] = TypeAdapter(Annotated[ErrorEnvelope, Field(union_mode="left_to_right")])


def parse_error(document: object) -> ErrorEnvelope | None:
    """Read a decoded JSON error body; None when it is no JSON object."""
    try:
        envelope: ErrorEnvelope = _ENVELOPE.validate_python(document)
    except ValidationError:
        return None
    return envelope
