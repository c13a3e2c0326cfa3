"""Faults on demand: what a provider, a proxy before it or the network between may do to one request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from worker.dev.simulator.damage import DAMAGES
from worker.dev.simulator.errors import (
    HTML,
    TEXT,
    Answer,
    Problem,
    feature_not_available,
    invalid_key,
    missing_scope,
    problem,
    rate_limited,
)
from worker.dev.simulator.payload import REQUIRED, Field, integer, number, one_of, optional, read, text

Params = dict[str, Any]
MakeAnswer = Callable[[Params], Answer | Problem]

CHALLENGE: Final = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body></body></html>"
BAD_GATEWAY: Final = b"<html><head><title>502 Server Error</title></head><body>Server Error</body></html>"
INTERNAL: Final = b'{"status":"internal_server_error","message":"Internal Server error. Please try again later."}'


def _retry_after(params: Params) -> Mapping[str, str] | None:
    seconds = params.get("retry_after")
    return None if seconds is None else {"Retry-After": f"{seconds:g}"}


def _with_retry_after(made: Problem, params: Params) -> Problem:
    return Problem(made.status, made.detail, _retry_after(params))


def _plan(params: Params) -> Problem:
    if params["form"] == 402:  # noqa: PLR2004 - an HTTP status says itself what it is
        message = "This feature requires a paid plan."
        return problem(402, "payment_required", "paid_plan_required", message, "payment_required")
    message = "Your subscription does not include this."
    return problem(403, "authorization_error", "subscription_required", message, "subscription_required")


def _concurrency(params: Params) -> Problem:
    message = "Too many concurrent requests. Your current subscription is associated with a maximum of 10."
    docs = {"docs_url": "https://elevenlabs.io/docs/api-reference/errors"}
    made = problem(
        429, "rate_limit_error", "concurrent_limit_exceeded", message, "too_many_concurrent_requests", **docs
    )
    return _with_retry_after(made, params)


def _busy(params: Params) -> Problem:
    message = "We are currently experiencing heavy traffic. Please try again."
    return _with_retry_after(problem(429, "rate_limit_error", "system_busy", message, "system_busy"), params)


def _fixed(*args: Any) -> MakeAnswer:
    return lambda _: problem(*args)


_RETRY: Final = {"retry_after": Field(optional(number(0, 86_400)), None)}

# kind -> fields of the rule beyond the common ones, and the answer given instead of the true one
ANSWERS: Final[Mapping[str, tuple[Mapping[str, Field], MakeAnswer]]] = {
    "missing_scope": (
        {"permission": Field(text, REQUIRED), "form": Field(one_of(401, 403), 401)},
        lambda p: missing_scope(p["permission"], p["form"]),
    ),
    "plan": ({"form": Field(one_of(402, 403), 402)}, _plan),
    "feature": ({}, lambda _: feature_not_available("This feature is not available on your plan.")),
    "legacy_plan": (
        {},
        lambda _: Problem(403, {"status": "only_for_creator+", "message": "Only available for creator+."}),
    ),
    "forbidden": (
        {},
        _fixed(403, "authorization_error", "forbidden", "You are not allowed to do this.", "forbidden"),
    ),
    "ip": (
        {},
        _fixed(403, "authorization_error", "forbidden", "Your IP address is not allowed.", "ip_not_allowed"),
    ),
    "workspace_denied": (
        {},
        _fixed(403, "authorization_error", "workspace_access_denied", "You have no access to this workspace."),
    ),
    "html403": ({}, lambda _: Answer(403, CHALLENGE, HTML)),
    "unusual_activity": (
        {},
        _fixed(
            401,
            "authentication_error",
            "unauthorized",
            "Unusual activity detected. Free Tier usage disabled.",
            "detected_unusual_activity",
        ),
    ),
    "quota": (
        {},
        _fixed(401, "invalid_request", "quota_exceeded", "This request exceeds your quota.", "quota_exceeded"),
    ),
    "quota402": (
        {},
        _fixed(402, "payment_required", "insufficient_credits", "You have no credits left."),
    ),
    "other401": (
        {},
        _fixed(401, "authentication_error", "unauthorized", "Something new is wrong.", "something_new"),
    ),
    "invalid_api_key": ({}, lambda _: invalid_key()),
    "rate429": (_RETRY, lambda p: _with_retry_after(rate_limited(), p)),
    "concurrency429": (_RETRY, _concurrency),
    "busy429": (_RETRY, _busy),
    "s500_text": ({}, lambda _: Answer(500, INTERNAL, TEXT)),
    "s500_json": (
        {},
        _fixed(500, "internal_error", "internal_error", "Internal server error.", "internal_server_error"),
    ),
    "s503": (
        _RETRY,
        lambda p: _with_retry_after(
            problem(503, "service_unavailable", "service_unavailable", "Please try again later."), p
        ),
    ),
    "s502_html": ({}, lambda _: Answer(502, BAD_GATEWAY, HTML)),
    "s504_empty": ({}, lambda _: Answer(504, b"", TEXT)),
    "empty": ({}, lambda _: Answer(200, b"")),
    "timeout408": ({}, lambda _: Answer(408, b"", TEXT)),
    "conflict409": (
        {},
        _fixed(409, "conflict", "concurrent_modification", "The resource is being changed.", "conflict"),
    ),
    "not_found": ({}, lambda _: Problem(404, "Not Found")),
    "legacy_envelope": (
        {
            "http": Field(integer(400, 599), 401),
            "status": Field(text, "missing_permissions"),
            "message": Field(text, "The API key you used is missing the permission user_read."),
        },
        lambda p: Problem(p["http"], {"status": p["status"], "message": p["message"]}),
    ),
    "bad_request400": (
        {},
        _fixed(400, "invalid_request", "bad_request", "The request could not be understood.", "bad_request"),
    ),
    "redirect": ({"to": Field(text, REQUIRED)}, lambda p: Answer(307, b"", headers={"Location": p["to"]})),
}

# Faults of the connection, carried out by the server itself.
TRANSPORT: Final[Mapping[str, Mapping[str, Field]]] = {
    "slow": {"seconds": Field(number(0, 3_600), REQUIRED)},
    "hang": {},
    "reset": {},
    "truncated": {},
}

COMMON: Final = {
    "kind": Field(one_of(*ANSWERS, *DAMAGES, *TRANSPORT), REQUIRED),
    "times": Field(optional(integer(1)), None),
    "probability": Field(number(0, 1), 1.0),
    "after": Field(integer(0), 0),
}
MATCH: Final = {"path_prefix": Field(text, ""), "method": Field(one_of("GET", "POST"), None)}


@dataclass(slots=True)
class Fault:
    """One rule. It lets the first `after` matching requests pass, then hits at most `times` of them."""

    kind: str
    path_prefix: str
    method: str | None
    times: int | None
    probability: float
    after: int
    params: Params
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str, random: Random) -> bool:
        """Decide about one request, and count it."""
        if not path.startswith(self.path_prefix) or self.method not in (None, method):
            return False
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.hits >= self.times):
            return False
        if self.probability < 1 and random.random() >= self.probability:
            return False
        self.hits += 1
        return True


def read_fault(asked: Any) -> Fault:
    """Read one rule of a control request.

    Raises:
        BadPayload: an unknown kind or field, or a wrong value.
    """
    kind = asked.get("kind") if isinstance(asked, dict) else None
    if isinstance(kind, str) and kind in ANSWERS:
        own = ANSWERS[kind][0]
    elif isinstance(kind, str) and kind in DAMAGES:
        own = DAMAGES[kind][0]
    else:
        own = TRANSPORT.get(str(kind), {})
    match_field = {"match": Field(lambda value: read(value, MATCH, "match"), {"path_prefix": "", "method": None})}
    rule = read(asked, {**COMMON, **own, **match_field}, "fault")
    return Fault(
        rule["kind"],
        rule["match"]["path_prefix"],
        rule["match"]["method"],
        rule["times"],
        rule["probability"],
        rule["after"],
        {name: rule[name] for name in own},
    )
