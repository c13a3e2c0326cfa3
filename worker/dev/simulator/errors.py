"""The provider's error bodies and the answer type everything here is sent as.

Bodies follow what the provider's documentation of 2026 lists and what has been seen in the wild; where the
two differ the wild form is used, since that is what a client meets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

JSON = "application/json"
HTML = "text/html; charset=UTF-8"
TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer: status, encoded body, media type, and headers beyond those every answer has.

    `cut` sends only half of the body under the full Content-Length and closes the connection.
    """

    status: int
    body: bytes
    media_type: str = JSON
    headers: Mapping[str, str] | None = None
    cut: bool = False


class Problem(Exception):  # noqa: N818 - named after RFC 9457, and a client's error is not an error of this server
    """An answer other than success; `detail` is the provider's `detail` member in any of its shapes."""

    def __init__(
        self,
        status: int,
        detail: dict[str, Any] | list[dict[str, Any]] | str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers = headers

    def answer(self, trace_id: str) -> Answer:
        """Encode; the current envelope carries the trace id as `request_id` (wild: OWASP/Nest#3861)."""
        detail = self.detail
        if isinstance(detail, dict) and "type" in detail:
            detail = {**detail, "request_id": trace_id}
        return Answer(self.status, orjson.dumps({"detail": detail}), headers=self.headers)


def problem(status: int, kind: str, code: str, message: str, legacy: str | None = None, **more: str) -> Problem:
    """Build the current envelope; `legacy` is its `status` member, absent when None (provider docs 2026)."""
    detail = {"type": kind, "code": code, "message": message}
    if legacy is not None:
        detail["status"] = legacy
    return Problem(status, {**detail, **more})


def invalid_key() -> Problem:
    """Unknown, disabled, expired and deleted keys look alike (seen in the wild, 2026)."""
    return problem(401, "authentication_error", "unauthorized", "Invalid API key", "invalid_api_key")


def missing_key() -> Problem:
    """No `xi-api-key` header (seen in the wild)."""
    message = "Neither authorization header nor xi-api-key received, please provide one."
    return problem(401, "authentication_error", "unauthorized", message, "needs_authorization")


def bearer_refused() -> Problem:
    """An API key sent as `Authorization: Bearer` (seen in the wild)."""
    message = "Invalid authorization header, API keys are sent as xi-api-key."
    return problem(401, "authentication_error", "unauthorized", message, "invalid_authorization_header")


def missing_scope(permission: str, form: int) -> Problem:
    """A live key without a scope: 401 (wild: danielmiessler/LifeOS#667) or 403 (provider docs 2026)."""
    message = f"The API key you used is missing the permission {permission} to execute this operation."
    if form == 403:  # noqa: PLR2004 - an HTTP status says itself what it is
        return problem(403, "authorization_error", "insufficient_permissions", message, "missing_permissions")
    return problem(401, "authentication_error", "unauthorized", message, "missing_permissions")


def bad_parameters(message: str, param: str | None = None) -> Problem:
    """A well-typed request that breaks a rule across fields (provider docs 2026)."""
    more = {} if param is None else {"param": param}
    return problem(400, "invalid_request", "invalid_parameters", message, "invalid_parameters", **more)


def cost_billed(status: int) -> Problem:
    """A credit query that reaches the switch to cost billing (official SDK: an error, body unknown)."""
    message = (
        "This workspace is billed by cost for part of the requested range. Use /v1/workspace/analytics/usage instead."
    )
    return problem(status, "invalid_request", "invalid_parameters", message, "invalid_parameters")


def rate_limited() -> Problem:
    """Too many requests in a minute, without Retry-After (seen in the wild, 2026)."""
    return problem(429, "rate_limit_error", "rate_limit_exceeded", "Rate limit exceeded. Please slow down.")


def feature_not_available(message: str) -> Problem:
    """The plan lacks a feature (seen in the wild on a free plan)."""
    return problem(403, "authorization_error", "feature_not_available", message, "feature_not_available")


def invalid(kind: str, loc: tuple[str | int, ...], message: str, value: Any, **ctx: Any) -> dict[str, Any]:
    """Build one item of a 422 body's `detail` array (official SDK)."""
    item: dict[str, Any] = {"type": kind, "loc": list(loc), "msg": message, "input": value}
    if ctx:
        item["ctx"] = ctx
    return item


def unprocessable(items: list[dict[str, Any]]) -> Problem:
    """Wrap validation items as the 422 answer that runs before authentication (seen in the wild)."""
    return Problem(422, items)
