"""The provider's protocol: verdicts, waits, headers, base URLs."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from schemas.connectors import REGIONS
from schemas.provider_errors import (
    BareError,
    CurrentError,
    InvalidRequest,
    LegacyError,
    StringError,
    parse_error,
)
from worker.elevenlabs import protocol
from worker.elevenlabs.hosts import base_url_for
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Finding, Verdict, classify
from worker.errors import Refused

NOW = datetime(2026, 4, 10, 12, tzinfo=UTC)
CASES = sorted((Path(__file__).parents[1] / "samples" / "errors").glob("*.json"))
KEYS = st.text("0123456789abcdef", min_size=48, max_size=48).map("sk_".__add__)
NO_HOSTS: frozenset[str] = frozenset()


def detail(http: int, /, **said: str) -> Verdict:
    return classify(Answer(http, {}, json.dumps({"detail": said}).encode()), NOW)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_known_error_has_its_verdict(path: Path) -> None:
    """A recorded or documented error gets the finding, reason and permissions that its sample states."""
    case: dict[str, Any] = json.loads(path.read_text())
    verdict = classify(Answer(case["status"], case["headers"], case["body"].encode()), NOW)
    assert case["name"] == path.stem
    assert (verdict.finding, verdict.reason, list(verdict.permissions)) == (
        case["finding"],
        case["reason"],
        case["permissions"],
    )
    assert not verdict.ok


def test_only_one_word_at_one_status_kills_a_key() -> None:
    """No known error but a 401 that says `invalid_api_key` is a dead key."""
    cases = [json.loads(path.read_text()) for path in CASES]
    dead = [case for case in cases if case["finding"] == "dead"]
    assert dead
    assert all(case["status"] == 401 and "invalid_api_key" in case["body"] for case in dead)


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"columns":[],"rows":[]}', b"null", b"0"])
def test_complete_json_at_2xx_is_ok(body: bytes) -> None:
    """Any complete JSON at a 2xx is accepted here: its shape is judged where it is normalized."""
    assert classify(Answer(200, {}, body)) is OK_VERDICT


@pytest.mark.parametrize(
    "body", [b"", b"[", b'[{"a":1}', b'{"a":"b', b"[]x", b"<html>", b'"\\ud800', b"\xff"], ids=repr
)
def test_incomplete_json_at_2xx_is_asked_for_again(body: bytes) -> None:
    """A body that was cut off, or is no JSON at all, says nothing: a later answer may."""
    assert classify(Answer(200, {}, body)).finding is Finding.TRANSIENT


def test_half_a_character_does_not_make_an_answer_incomplete() -> None:
    """Names may hold half surrogate pairs, which strict readers refuse: normalizing replaces them."""
    assert classify(Answer(200, {}, b'[{"first_name":"A \\ud800"}]')) is OK_VERDICT


@pytest.mark.parametrize(
    ("body", "envelope"),
    [
        ({"detail": {"type": "t", "code": "c", "status": "s", "message": "m", "new": 1}}, CurrentError),
        ({"detail": {"status": "s", "message": "m"}}, LegacyError),
        ({"detail": "Not Found"}, StringError),
        ({"detail": [{"type": "missing", "loc": ["body", 0], "msg": "m", "input": {}}]}, InvalidRequest),
        ({"status": "internal_server_error", "message": "m"}, BareError),
        ({"detail": {"status": 7, "message": ["m"]}}, LegacyError),
        ({"detail": ["m"]}, BareError),
    ],
)
def test_each_envelope_is_told_from_the_others(body: object, envelope: type) -> None:
    """Each of the five envelopes is recognised, also with fields of an unexpected type."""
    assert type(parse_error(body)) is envelope


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_json_that_is_no_object_is_no_envelope(body: object) -> None:
    """A JSON error body that is no object carries no envelope."""
    assert parse_error(body) is None


def test_a_validation_error_names_the_place_not_the_input() -> None:
    """The message of a 422 says where and what, and repeats nothing that was sent."""
    item = {"type": "missing", "loc": ["body", "start_time"], "msg": "Field required", "input": "private"}
    verdict = classify(Answer(422, {}, json.dumps({"detail": [item]}).encode()))
    assert verdict.message == "body.start_time: Field required"


def test_status_is_read_before_code_and_code_before_message() -> None:
    """The legacy status decides, then the code, then the message."""
    missing = "missing the permission user_read to execute this operation"
    assert detail(401, status="quota_exceeded", code="invalid_api_key").finding is Finding.QUOTA
    assert detail(401, status="unheard_of", code="quota_exceeded", message=missing).finding is Finding.QUOTA
    assert detail(401, status="unheard_of", code="unauthorized", message=missing).finding is Finding.SCOPE


@pytest.mark.parametrize(
    ("message", "permissions"),
    [
        ("is missing the permission user_read to execute this operation.", ("user_read",)),
        ("missing the permissions `a_b`, c_d, and dubbing to execute this", ("a_b", "c_d", "dubbing")),
        ("missing the permissions user_read or user_read.", ("user_read",)),
        ("missing the permission WORKSPACE_MEMBERS_INVITE", ("workspace_members_invite",)),
        ("missing the permission to execute this operation.", ()),
        ("missing the permission", ()),
    ],
)
def test_missing_permissions_are_read_from_the_message(message: str, permissions: tuple[str, ...]) -> None:
    """One or several names are read, each once, in order; none is invented."""
    assert detail(401, status="missing_permissions", message=message).permissions == permissions


def test_the_request_id_comes_from_the_body_then_the_trace_header() -> None:
    """The body's request id wins; a value that is no plain token is not taken."""
    said = json.dumps({"detail": {"code": "c", "request_id": "req-1"}}).encode()
    odd = json.dumps({"detail": {"code": "c", "request_id": "a b\n"}}).encode()
    assert classify(Answer(500, {"x-trace-id": "tr-1"}, said)).request_id == "req-1"
    assert classify(Answer(500, {"x-trace-id": "tr-1"}, odd)).request_id == "tr-1"
    assert classify(Answer(500, {"x-trace-id": "<script>"}, b"")).request_id is None


@given(
    status=st.integers(-1, 1000),
    body=st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["detail", "status", "code", "message", "loc", "msg"]), inner)
        ),
    ).map(lambda document: json.dumps(document).encode()),
    headers=st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset", "x-trace-id"]),
        st.text() | st.integers().map(str) | st.floats().map(str),
    ),
    now=st.none() | st.just(NOW),
)
@example(status=401, body=b"[" * 3000, headers={}, now=None)
@example(status=403, body=b'{"detail": {"message": "\\u0000\\u001b[2J"}}', headers={}, now=None)
@example(status=429, body=b"", headers={"retry-after": "Mon, 01 Jan 0001 00:00:00 +2300"}, now=NOW)
def test_classify_judges_anything(status: int, body: bytes, headers: dict[str, str], now: datetime | None) -> None:
    """Any status, bytes and headers get a verdict whose parts keep their bounds; nothing raises."""
    verdict = classify(Answer(status, headers, body), now)
    assert len(verdict.message) <= 300
    assert verdict.message.isprintable()
    assert verdict.retry_after_s is None or 0 <= verdict.retry_after_s <= protocol.RETRY_AFTER_CAP_S
    assert verdict.ok <= (200 <= status < 300)
    assert (verdict.finding is Finding.DEAD) <= (status == 401 and b"invalid_api_key" in body.lower())


@given(key=KEYS, before=st.text(max_size=400), after=st.text(max_size=50), field=st.integers(0, 4))
def test_a_key_never_shows_in_a_verdict(key: str, before: str, after: str, field: int) -> None:
    """Whatever field of an error repeats a key, the verdict does not show it."""
    name = ("message", "request_id", "status", "code", "message")[field]
    said = {"code": "c", "message": f"missing the permission {key} to execute"} | {name: before + key + after}
    verdict = classify(Answer(401, {"x-trace-id": key}, json.dumps({"detail": said}).encode()))
    assert key[:12] not in repr(verdict)


@pytest.mark.parametrize(
    "text",
    ["xi-api-key: {}", '{{"xi-api-key": "{}"}}', "{{'xi_api_key': '{}'}}", "GET /?xi-api-key={}&a=b"],
)
def test_a_named_key_is_redacted_whatever_its_shape(text: str) -> None:
    """A value named as an API key in a header, JSON or a query is hidden whatever it looks like."""
    said = detail(403, message=text.format("canary-9f3c.77")).message
    assert "canary" not in said
    assert "77" not in said


def test_a_message_shows_no_mail_address() -> None:
    """Messages reach logs, so e-mail addresses in them are hidden."""
    said = detail(403, message="ana@example.com may not").message
    assert "ana" not in said
    assert said.endswith("may not")


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "3600"}, 60.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=9), usegmt=True)}, 9.0),
        ({"retry-after": format_datetime(NOW - timedelta(days=9), usegmt=True)}, 0.0),
        ({"retry-after": "Fri, 10 Apr 2026 12:00:05 -0000"}, 5.0),
        ({"x-ratelimit-reset": str(NOW.timestamp() + 11)}, 11.0),
        ({"retry-after": "4", "x-ratelimit-reset": str(NOW.timestamp() + 11)}, 4.0),
    ],
)
def test_retry_wait_is_read_from_headers(headers: dict[str, str], wait_s: float | None) -> None:
    """Waits are read in the official SDK's order, dates against `now`, within 0 to 60 seconds."""
    assert protocol.retry_after_s(headers, NOW) == wait_s


def test_a_date_without_now_asks_for_no_wait() -> None:
    """Without the present time a retry date is passed over."""
    assert protocol.retry_after_s({"retry-after": format_datetime(NOW, usegmt=True)}, None) is None


@given(attempt=st.integers(0, 10_000), seed=st.integers(), base_s=st.floats(0.01, 5), cap_s=st.floats(0.01, 60))
def test_backoff_is_full_jitter_below_its_cap(attempt: int, seed: int, base_s: float, cap_s: float) -> None:
    """The wait lies between zero and the exponential bound, never above the cap."""
    rng = random.Random(seed)  # noqa: S311 - jitter, no secret
    wait_s = protocol.backoff_s(attempt, rng, base_s=base_s, cap_s=cap_s)
    assert 0 <= wait_s <= min(cap_s, base_s * 2.0 ** min(attempt, 64))


def test_headers_carry_the_key_and_our_name() -> None:
    """Every request has the key in `xi-api-key`, asks for JSON and says who asks."""
    headers = protocol.headers(SecretStr("sk_1"))
    assert headers["xi-api-key"] == "sk_1"
    assert headers["accept"] == "application/json"
    assert headers["user-agent"].startswith("rollcall/")
    assert "authorization" not in headers


@pytest.mark.parametrize("key", ["", "sk_1\n", "sk 1", "sk_1\r\nx: y", "sk_é"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    """Spaces, line ends and other signs are refused, and the message does not repeat the key."""
    with pytest.raises(Refused) as refused:
        protocol.headers(SecretStr(key))
    assert refused.value.reason == "key_malformed"
    assert "sk" not in refused.value.message


@pytest.mark.parametrize(
    ("region", "base_url", "hosts", "url"),
    [
        (None, None, NO_HOSTS, REGIONS["global"]),
        ("eu", None, NO_HOSTS, REGIONS["eu"]),
        ("eu", "https://API.eu.residency.elevenlabs.io:443/", NO_HOSTS, REGIONS["eu"]),
        (None, REGIONS["us"], NO_HOSTS, REGIONS["us"]),
        (None, "http://127.0.0.1:8080", {"127.0.0.1"}, "http://127.0.0.1:8080"),
        ("eu", "http://127.0.0.1:8080/", {"127.0.0.1:8080"}, "http://127.0.0.1:8080"),
        (None, "http://127.9.9.9", {"127.9.9.9:80"}, "http://127.9.9.9"),
        (None, "http://[::1]:8080", {"::1"}, "http://[::1]:8080"),
        (None, "http://[::1]:8080", {"[::1]:8080"}, "http://[::1]:8080"),
        (None, "http://localhost:8080", {"LocalHost"}, "http://localhost:8080"),
        (None, "https://proxy.example.com", {"proxy.example.com:443"}, "https://proxy.example.com"),
    ],
)
def test_allowed_base_urls(region: str | None, base_url: str | None, hosts: set[str], url: str) -> None:
    """A provider's region or a listed host gives one canonical base URL."""
    assert base_url_for(region, base_url, frozenset(hosts)) == url


@pytest.mark.parametrize(
    ("region", "base_url", "hosts", "reason"),
    [
        ("mars", None, NO_HOSTS, "region_unknown"),
        ("eu", REGIONS["us"], NO_HOSTS, "region_mismatch"),
        (None, "http://127.0.0.1:8080", NO_HOSTS, "host_not_allowed"),
        (None, "http://127.0.0.1:8080", {"127.0.0.1:8081"}, "host_not_allowed"),
        (None, "https://evil.example.com", NO_HOSTS, "host_not_allowed"),
        (None, "https://api.elevenlabs.io.evil.example.com", NO_HOSTS, "host_not_allowed"),
        (None, "https://api.elevenlabs.io:8443", {"api.elevenlabs.io"}, "host_not_allowed"),
        (None, "http://api.elevenlabs.io", {"api.elevenlabs.io"}, "https_required"),
        (None, "http://proxy.example.com", {"proxy.example.com"}, "https_required"),
        (None, "http://10.0.0.1", {"10.0.0.1"}, "https_required"),
        (None, "https://user:pw@api.elevenlabs.io", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io\\@evil.example.com", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io/v1", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io?a=b", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io#a", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io:99999", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.elevenlabs.io:0", NO_HOSTS, "base_url_invalid"),
        (None, "https://[::1", NO_HOSTS, "base_url_invalid"),
        (None, "api.elevenlabs.io", NO_HOSTS, "base_url_invalid"),
        (None, "file:///etc/passwd", NO_HOSTS, "base_url_invalid"),
        (None, "https://api.eleven\nlabs.io", NO_HOSTS, "base_url_invalid"),
    ],
)
def test_refused_base_urls(region: str | None, base_url: str | None, hosts: set[str], reason: str) -> None:
    """Anything but a plain URL of an allowed host is refused, each with its own reason."""
    with pytest.raises(Refused) as refused:
        base_url_for(region, base_url, frozenset(hosts))
    assert refused.value.reason == reason


def test_a_refused_host_says_what_is_allowed() -> None:
    """The message names the provider's hosts and the setting that allows more."""
    with pytest.raises(Refused, match="ROLLCALL_API_HOSTS") as refused:
        base_url_for(None, "https://evil.example.com", NO_HOSTS)
    assert REGIONS["eu"] in refused.value.message


@given(
    st.text(max_size=80)
    | st.sampled_from([*REGIONS.values(), "http://127.0.0.1:1", "https://127.0.0.1"]).flatmap(
        lambda url: st.tuples(st.text(max_size=3), st.text("@:/\\?#.%5[]0aéI\t", max_size=6)).map(
            lambda glue: glue[0] + url + glue[1]
        )
    )
)
def test_a_base_url_is_pinned_or_refused(text: str) -> None:
    """Whatever text is given, the key can go to a listed host only."""
    try:
        url = base_url_for(None, text or "x", frozenset({"127.0.0.1:1"}))
    except Refused:
        return
    assert url in {*REGIONS.values(), "http://127.0.0.1:1", "https://127.0.0.1:1"}
