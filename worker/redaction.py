"""What no text may show: API keys, passwords and e-mail addresses. Pure; logs and stored errors use it."""

from __future__ import annotations

import re
from typing import Final

MASK: Final = "***"

MASKED_FIELDS: Final = frozenset(
    {"xi_api_key", "api_key", "authorization", "password", "passwd", "secret", "vault_keys"} | {"email", "first_name"}
)
"""Fields whose whole value is masked, in lower case with `_` for `-`; see `is_masked_field`."""

# Keys are `sk_` and 48 hex digits (seen in the wild). The short form needs a boundary, or `task_12345678`
# would go; the long form needs none, or a key after an escaped newline (`\nsk_...`) or `%3D` would stay.
_API_KEY: Final = re.compile(r"sk_[0-9A-Za-z]{16,}|(?<![0-9A-Za-z])sk_[0-9A-Fa-f]{8,}")

# `xi-api-key: v` (header), `"xi-api-key": "v"` (JSON, also escaped within JSON), `('xi-api-key', b'v')`
# (pairs) and `xi_api_key=v` (query). Bare `api_key` is no such name in text: it is also a usage dimension.
_NAME: Final = r"(?: xi[-_]api[-_]key | authorization | password | passwd )"
_NAMED: Final = re.compile(
    rf"""
    (?P<before>
      (?: ["'] {_NAME} \\*["'] \s* , | {_NAME} \\*["']? \s* (?: [:=] | %3[AD] ) ) \s*
      (?: b? (?P<quote> \\*["'] ) )? (?: (?: bearer | basic ) \s+ )?
    )
    (?(quote) (?: \\. | . )*? (?= (?P=quote) | $ ) | [^\s"'&,;)}}\]]+ )
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)

# Up to the last `@`, since a password may hold a raw one (libpq and redis-py take it).
_URL_PASSWORD: Final = re.compile(r"(://[^\s/:@]*:)[^\s/]*@")

# The local part is bounded as RFC 5321 bounds it; without the bound a long line costs its length squared.
_EMAIL: Final = re.compile(r"[\w.+'-]{1,64}(?:@|%40)[\w-]{1,63}(?:\.[\w-]{1,63})+")


def redact(text: str) -> str:
    """Return `text` with API keys, named secrets, passwords in URLs and e-mail addresses masked.

    Redacting twice gives the same as once. Never raises.
    """
    text = _NAMED.sub(rf"\g<before>{MASK}", text)
    text = _API_KEY.sub(f"sk_{MASK}", text)
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\g<1>{MASK}@", text)
    if "@" in text or "%40" in text:
        text = _EMAIL.sub(f"{MASK}@{MASK}", text)
    return text


def is_masked_field(name: str) -> bool:
    """Tell whether a field of this name (`xi-api-key`, `Authorization`, `email`, ...) is masked whole."""
    return name.lower().replace("-", "_") in MASKED_FIELDS
