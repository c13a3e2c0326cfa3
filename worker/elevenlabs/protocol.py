"""The provider's protocol as plain functions: what goes into a request, what an answer means.

Nothing here waits, connects or reads the clock. An answer is judged by status *and* body: a 401 may be a
dead key, a missing scope, a used-up quota or a blocked account, and only the first one ends a connection.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cached_property
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import msgspec
import orjson
from pydantic import SecretStr

from schemas.provider import clean
from schemas.provider_errors import Problem, parse_error
from worker.errors import Refused
from worker.redaction import redact

RETRY_AFTER_CAP_S: Final = 60.0
"""The longest wait a header may ask for (the official SDK caps there too)."""

_MESSAGE_CHARS: Final = 300
_READ_CHARS: Final = 2_000

try:
    _USER_AGENT = f"rollcall/{version('rollcall')}"
except PackageNotFoundError:  # run from a source tree
    _USER_AGENT = "rollcall/source"


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the provider; `path` starts with a slash, `body` is JSON."""

    method: str
    path: str
    params: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """One answer of the provider: headers are found by their names in lower case, `body` is decompressed."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def is_json(self) -> bool:
        """Whether the body is complete JSON; it is only skimmed, and once however often the answer is judged."""
        return _skims(self.body) or _skims(clean(self.body))


_SKIMMER: Final = msgspec.json.Decoder(msgspec.Raw)


def _skims(body: bytes) -> bool:
    try:
        _SKIMMER.decode(body)
    except (msgspec.MsgspecError, RecursionError):  # nested without end, it is no answer either
        return False
    return True


class Finding(StrEnum):
    """What an answer means for the connector."""

    OK = "ok"
    SCOPE = "scope"
    PLAN = "plan"
    QUOTA = "quota"
    BLOCKED = "blocked"
    FORBIDDEN = "forbidden"
    DEAD = "dead"
    UNAUTHORIZED = "unauthorized"
    UNAVAILABLE = "unavailable"
    EDGE = "edge"
    TRANSIENT = "transient"
    SCHEMA = "schema"
    BUG = "bug"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A finding with its cause.

    `reason` is a stable snake_case word. `message` is the provider's, without keys and e-mail addresses, at
    most 300 characters. `permissions` are the scopes it says are missing. `retry_after_s` is the least wait.
    """

    finding: Finding
    reason: str
    message: str
    permissions: tuple[str, ...] = ()
    retry_after_s: float | None = None
    request_id: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the body may be used."""
        return self.finding is Finding.OK


OK_VERDICT: Final = Verdict(Finding.OK, "ok", "")
_UNPARSEABLE: Final = Verdict(Finding.TRANSIENT, "unparseable", "The answer is no complete JSON")

_Meaning = tuple[Finding, str]

_SCOPE: Final = (Finding.SCOPE, "scope_missing")
_PLAN: Final = (Finding.PLAN, "plan_too_low")
_QUOTA: Final = (Finding.QUOTA, "quota")
_OUR_HEADER: Final = (Finding.BUG, "authorization_header")
_CONCURRENCY: Final = (Finding.TRANSIENT, "concurrency_limited")
_SERVER_ERROR: Final = (Finding.TRANSIENT, "server_error")

_REFUSALS: Final[dict[str, _Meaning]] = {
    "missing_permissions": _SCOPE,
    "insufficient_permissions": _SCOPE,
    "quota_exceeded": _QUOTA,
    "insufficient_credits": _QUOTA,
    "payment_required": _PLAN,
    "paid_plan_required": _PLAN,
    "subscription_required": _PLAN,
    "feature_not_available": _PLAN,
    "output_format_not_allowed": _PLAN,
    "only_for_": _PLAN,  # a prefix: only_for_creator+ and its like
    "detected_unusual_activity": (Finding.BLOCKED, "account_blocked"),
}

_WORDS: Final[dict[int, dict[str, _Meaning]]] = {
    401: {
        **_REFUSALS,
        "invalid_api_key": (Finding.DEAD, "key_invalid"),
        "needs_authorization": _OUR_HEADER,
        "invalid_authorization_header": _OUR_HEADER,
        "missing_api_key": _OUR_HEADER,
        "sign_in_required": _OUR_HEADER,
        "max_character_limit_exceeded": (Finding.BUG, "bad_request"),
    },
    402: {"quota_exceeded": _QUOTA, "insufficient_credits": _QUOTA},
    403: _REFUSALS,
    429: {
        "concurrent_limit_exceeded": _CONCURRENCY,
        "too_many_concurrent_requests": _CONCURRENCY,
        "system_busy": (Finding.TRANSIENT, "system_busy"),
    },
}
"""By HTTP status: what a `status` or `code` word means (provider docs 2025, 2026; most seen in the wild)."""

_BY_STATUS: Final[dict[int, _Meaning]] = {
    401: (Finding.UNAUTHORIZED, "unauthorized"),
    402: _PLAN,
    403: (Finding.FORBIDDEN, "role_or_ip"),
    404: (Finding.UNAVAILABLE, "not_found"),
    405: (Finding.UNAVAILABLE, "not_supported"),
    408: (Finding.TRANSIENT, "timeout"),
    409: (Finding.TRANSIENT, "conflict"),
    422: (Finding.BUG, "validation"),
    429: (Finding.TRANSIENT, "rate_limited"),
    501: (Finding.UNAVAILABLE, "not_supported"),
    503: (Finding.TRANSIENT, "unavailable"),
}
"""What a status means when no word says more."""

_BY_CLASS: Final[dict[int, _Meaning]] = {
    3: (Finding.TRANSIENT, "redirected"),  # never followed: it could carry the key to another host
    4: (Finding.BUG, "bad_request"),
}


def classify(answer: Answer, now: datetime | None = None) -> Verdict:
    """Judge an answer to a read-only request, by status and body.

    Args:
        answer: what came back; any status and any bytes are judged, nothing raises.
        now: aware time, needed only to read a retry wait given as a date.

    """
    if answer.status // 100 == 2:  # noqa: PLR2004 - the class of success
        return OK_VERDICT if answer.is_json else _UNPARSEABLE
    envelope = parse_error(_document(answer.body))
    problem = envelope.problem if envelope else Problem()
    said = redact((problem.message or "")[:_READ_CHARS])
    finding, reason = _meaning(answer.status, problem, said, is_json=answer.is_json)
    return Verdict(
        finding,
        reason,
        _tidy(said) or f"HTTP {answer.status} without a readable message",
        permissions=_permissions(said) if finding is Finding.SCOPE else (),
        retry_after_s=retry_after_s(answer.headers, now),
        request_id=_request_id(problem.request_id) or _request_id(answer.headers.get("x-trace-id")),
    )


def _document(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _meaning(http: int, problem: Problem, said: str, *, is_json: bool) -> _Meaning:
    if http == HTTPStatus.FORBIDDEN and not is_json:
        return (Finding.EDGE, "edge")  # a CDN's challenge (seen in the wild: elevenlabs/elevenlabs-n8n#7)
    table = _WORDS.get(http, {})
    for word in (problem.status, problem.code):
        found = table.get(re.sub("^(only_for_).*", r"\1", (word or "").lower()))
        if found:
            return found
    if _SCOPE in table.values() and "missing the permission" in said.lower():
        return _SCOPE
    return _BY_STATUS.get(http) or _BY_CLASS.get(http // 100, _SERVER_ERROR)


_NAME: Final = r"[\"'`]?[a-z][a-z0-9_:-]{2,63}[\"'`]?"
_AND: Final = r"(?:\s*,\s*(?:(?:and|or)\s+)?|\s*(?:and|or)\s+)"
_MISSING: Final = re.compile(rf"missing the permissions?[\s:]+({_NAME}(?:{_AND}{_NAME})*)", re.IGNORECASE)


def _permissions(said: str) -> tuple[str, ...]:
    """Read the names from "missing the permission X to execute this operation"; there may be several."""
    found = _MISSING.search(said)
    names = (name.strip("\"'`") for name in re.split(_AND, found[1].lower())) if found else ()
    return tuple(dict.fromkeys(names))


def _request_id(value: str | None) -> str | None:
    fits = value and re.fullmatch(r"[\w.:-]{1,128}", value, re.ASCII) and value == redact(value)
    return value if fits else None


def retry_after_s(headers: Mapping[str, str], now: datetime | None) -> float | None:
    """Return the wait in seconds that the headers ask for, 0 to 60; None when they ask for none.

    Read in the official SDK's order: `retry-after-ms`, `retry-after` (seconds or an HTTP date),
    `x-ratelimit-reset` (unix seconds). Live answers carry none of them (seen in the wild, 2026). Dates need
    `now`, an aware time. What cannot be read is passed over.
    """
    wait_ms, wait_s = _number(headers.get("retry-after-ms")), _number(headers.get("retry-after"))
    waits_s = [None if wait_ms is None else wait_ms / 1000, wait_s]
    if now is not None:
        until = (_http_date_s(headers.get("retry-after")), _number(headers.get("x-ratelimit-reset")))
        waits_s += [None if unix_s is None else unix_s - now.timestamp() for unix_s in until]
    return next((min(max(wait, 0.0), RETRY_AFTER_CAP_S) for wait in waits_s if wait is not None), None)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _http_date_s(text: str | None) -> float | None:
    try:
        when = parsedate_to_datetime(text or "")
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def backoff_s(attempt: int, rng: random.Random, *, base_s: float = 0.5, cap_s: float = 20.0) -> float:
    """Draw the wait in seconds after failed attempt number `attempt` (from 0): exponential, full jitter."""
    return rng.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt, 32)))


def headers(api_key: SecretStr) -> dict[str, str]:
    """Return the headers of every request; the only place where the key is in the clear.

    Raises:
        Refused: the key holds what no header can carry.

    """
    key = api_key.get_secret_value()
    if not re.fullmatch(r"[!-~]+", key):
        raise Refused("key_malformed", "The API key is empty or holds spaces or other signs; copy it again")
    return {"xi-api-key": key, "accept": "application/json", "user-agent": _USER_AGENT}


def _tidy(said: str) -> str:
    line = "".join(sign if sign.isprintable() else " " for sign in said)
    return " ".join(line.split())[:_MESSAGE_CHARS]
