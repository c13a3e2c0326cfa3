"""Hosts that a key may be sent to: the provider's, and those an operator lists. Pure."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

from schemas.connectors import REGIONS
from worker.errors import Refused
from worker.redaction import redact

_PROVIDER_HOSTS: Final = frozenset(url.removeprefix("https://") for url in REGIONS.values())


def base_url_for(region: str | None, base_url: str | None, extra_hosts: frozenset[str]) -> str:
    """Return the canonical base URL (no trailing slash) that a key may be sent to.

    Args:
        region: a name in `REGIONS`; None means global, or whatever `base_url` is.
        base_url: a provider's URL, or one on an extra host.
        extra_hosts: further hosts, each `host` (any port) or `host:port`; loopback must be listed too. A host
            of the provider listed here stays pinned to its own port.

    Raises:
        Refused: anything else; the message says what is allowed.

    """
    if region is not None and region not in REGIONS:
        raise Refused("region_unknown", f"Unknown region. Use one of: {', '.join(REGIONS)}")
    if not base_url:
        return REGIONS[region or "global"]
    parts = _split(base_url)
    host, port = parts.hostname or "", parts.port
    shown = f"[{host}]" if ":" in host else host
    standard = {"https": 443, "http": 80}[parts.scheme]
    url = f"{parts.scheme}://{shown}" + ("" if port in (None, standard) else f":{port}")
    if region is not None and url in REGIONS.values() and url != REGIONS[region]:
        raise Refused("region_mismatch", f"The base URL of region {region} is {REGIONS[region]}")
    if parts.scheme == "http" and not _is_loopback(host):
        raise Refused("https_required", "The base URL must start with https://; http is for loopback only")
    listed = {entry.strip().lower() for entry in extra_hosts} - _PROVIDER_HOSTS
    if url not in REGIONS.values() and not listed & {host, shown, f"{shown}:{port or standard}"}:
        allowed = ", ".join(REGIONS.values())
        raise Refused(
            "host_not_allowed",
            f"Host {redact(shown)[:80]} is not allowed. Use {allowed}, or list it in ROLLCALL_API_HOSTS",
        )
    return url


def _split(base_url: str) -> SplitResult:
    rule = "The base URL must be https://host or https://host:port, with nothing before or after"
    if not re.fullmatch(r"[!-~]+", base_url.strip()):
        raise Refused("base_url_invalid", rule)
    try:
        parts = urlsplit(base_url.strip())
        usable = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        raise Refused("base_url_invalid", rule) from None
    if not usable or "@" in parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise Refused("base_url_invalid", rule)
    return parts


def _is_loopback(host: str) -> bool:
    if host in ("localhost", "::1"):
        return True
    try:
        return ip_address(host) in IPv4Network("127.0.0.0/8")
    except ValueError:
        return False
