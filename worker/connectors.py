"""Connectors: how they are added, checked, reconnected, deleted, and synced when somebody asks.

Nothing is written before the provider has accepted the key. The key itself passes through sealed: only the
provider port opens it, for the length of a conversation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

from pydantic import SecretStr

from schemas.connectors import REGIONS, Action, Dataset, RunKind, Status, StatusReason
from worker.elevenlabs.asking import Window, ask, probe
from worker.elevenlabs.hosts import base_url_for
from worker.elevenlabs.protocol import Finding, Verdict, headers
from worker.errors import ContractBroken, OwnerMustAct, Refused, TryLater
from worker.normalize import directory
from worker.permissions import Checked, judge
from worker.ports import Provider, Target
from worker.verdict import CONCLUSIVE, DOUBTS, RETRIED

MOST_CHARS: Final = 200
HINT_CHARS: Final = 4
_HINTED_FROM: Final = 16
"""Of a shorter key the last four signs would give away too much."""
_REGION_OF: Final = {url: region for region, url in REGIONS.items()}

REGION_HINT: Final = (
    "A key of another residency region counts as invalid too: check the region (--region), and that the key was"
    " copied whole"
)


@dataclass(frozen=True, slots=True)
class NewConnector:
    """What somebody asks for: `base_url` or else `region` says where the key belongs."""

    tenant_id: str
    name: str
    api_key: SecretStr
    region: str | None = None
    base_url: str | None = None
    external_ref: str | None = None


@dataclass(frozen=True, slots=True)
class Connector:
    """A connector as these recipes need it; `sealed_key` is None once it is deleted."""

    id: UUID
    tenant_id: str
    name: str
    status: Status
    base_url: str
    partition: int
    workspace_id: str | None = None
    cost_since: date | None = None
    sealed_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class KeptKey:
    """What is kept of an API key: sealed, its fingerprint (equal for equal keys), its last signs."""

    sealed: str = field(repr=False)
    fingerprint: str
    hint: str | None


class Registry(Protocol):
    """Connectors in Postgres."""

    async def add(
        self,
        connector_id: UUID,
        new: NewConnector,
        key: KeptKey,
        *,
        base_url: str,
        workspace_id: str | None,
        poll_interval_s: int,
    ) -> Connector:
        """Write a connector that is due at once. Raises Refused: name, key or workspace is taken."""

    async def key_holder(self, tenant_id: str, fingerprints: Sequence[str]) -> Connector | None:
        """Find the tenant's living connector that has this key."""

    async def set_key(self, connector_id: UUID, key: KeptKey, *, workspace_id: str | None) -> Connector:
        """Replace the key; the connector is due at once. Raises Refused as `add` does."""

    async def delete(self, connector_id: UUID) -> Connector:
        """Delete a connector with all its facts; again is harmless."""

    async def request_sync(
        self, *, tenant_id: str, connector_id: UUID, kind: RunKind, run_id: UUID, actor: str
    ) -> Mapping[str, Any]:
        """Write the run, or its refusal; see `request_sync`."""


class Sealer(Protocol):
    """The vault."""

    def seal(self, secret: SecretStr, *, tenant_id: str, connector_id: UUID | str) -> str:
        """Seal an API key for one connector."""

    def fingerprints(self, secret: SecretStr) -> tuple[str, ...]:
        """Give the key's fingerprint under each master key, the one to store first."""


class Traces(Protocol):
    """What a connector leaves outside Postgres."""

    async def forget(self, partition: int, connector_id: UUID) -> None:
        """Delete it."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What keys need of the world."""

    registry: Registry
    provider: Provider
    vault: Sealer


async def add(
    new: NewConnector, ports: Ports, *, api_hosts: frozenset[str], poll_interval_s: int, check: bool = True
) -> Connector:
    """Add a connector; its first sync is due at once.

    Args:
        new: what to add.
        ports: see `Ports`.
        api_hosts: hosts that a base URL may name beside the provider's.
        poll_interval_s: seconds between two polls.
        check: ask the provider first whether the key is alive.

    Raises:
        Refused: an argument is wrong, or name, key or workspace is taken in the tenant.
        OwnerMustAct: the provider does not accept the key; nothing was written.
        TryLater: the provider or the database cannot be reached.

    """
    _require_line("tenant", new.tenant_id)
    _require_line("name", new.name)
    base_url = base_url_for(new.region, new.base_url, api_hosts)
    connector_id = uuid4()
    key = _kept(new.api_key, ports.vault, new.tenant_id, connector_id)
    await _refuse_known_key(new.api_key, new.tenant_id, ports)
    workspace_id = None
    if check:
        # It has no partition yet, and a conversation needs none.
        workspace_id = await _probe(Target(connector_id, new.tenant_id, base_url, key.sealed, 0), ports)
    new = replace(new, region=_REGION_OF.get(base_url, new.region))
    return await ports.registry.add(
        connector_id, new, key, base_url=base_url, workspace_id=workspace_id, poll_interval_s=poll_interval_s
    )


async def reconnect(connector: Connector, api_key: SecretStr, ports: Ports) -> Connector:
    """Give a connector another key, once the provider has accepted it.

    Raises:
        Refused: the key is malformed, another connector's, or of another workspace; the connector is deleted.
        OwnerMustAct: the provider does not accept the key.
        TryLater: the provider or the database cannot be reached.

    """
    key = _kept(api_key, ports.vault, connector.tenant_id, connector.id)
    await _refuse_known_key(api_key, connector.tenant_id, ports, but=connector.id)
    workspace_id = await _probe(replace(target_of(connector), sealed_key=key.sealed), ports)
    if workspace_id and connector.workspace_id and workspace_id != connector.workspace_id:
        raise other_workspace()
    return await ports.registry.set_key(connector.id, key, workspace_id=workspace_id)


async def check(connector: Connector, provider: Provider, *, now: datetime) -> list[Checked]:
    """Ask for every dataset once and tell what the key may read; nothing is written.

    A dead key is asked no further: what is left then has its reason too.

    Raises:
        Refused: the connector is deleted.

    """
    target, today = target_of(connector), now.astimezone(UTC).date()
    window = Window(today - timedelta(days=1), today + timedelta(days=1))
    found: list[Checked] = []
    dead: Verdict | None = None
    for dataset in Dataset:
        verdict = dead
        if verdict is None:
            question = ask(dataset, window if dataset.dimension else None, now=now, cost_since=connector.cost_since)
            verdict = (await provider.converse(target, question)).verdict
        dead = verdict if verdict.finding in CONCLUSIVE else None
        found.append(judge(dataset, verdict, now=now))
    return found


async def delete(connector: Connector, registry: Registry, traces: Sequence[Traces]) -> Connector:
    """Delete a connector, its facts, its key and its traces in Redis; again is harmless, and completes it.

    Raises:
        TryLater: Postgres or Redis cannot be reached; what is left goes when it is deleted again.

    """
    # Postgres first: from then on nobody asks for it, and the writer drops what comes late.
    deleted = await registry.delete(connector.id)
    for trace in traces:
        await trace.forget(deleted.partition, deleted.id)
    return deleted


async def request_sync(
    registry: Registry, *, tenant_id: str, connector_id: UUID, kind: RunKind, run_id: UUID, actor: str
) -> Mapping[str, Any]:
    """Ask for a run; return its row of `sync_runs`. When its status is `queued` the caller sends it off.

    `run_id` is the idempotency key: asked again, the row is returned as it is by now. A refusal is a row too,
    status `refused`, `error_reason` one of `unknown_connector` (also another tenant's), `deleted`, `paused`,
    `disconnected`, `already_running`.

    Raises:
        Refused: `run_id` belongs to another request.
        TryLater: the database cannot be reached.

    """
    _require_line("tenant", tenant_id)
    _require_line("actor", actor)
    return await registry.request_sync(
        tenant_id=tenant_id, connector_id=connector_id, kind=kind, run_id=run_id, actor=actor
    )


def target_of(connector: Connector) -> Target:
    """Give what the provider port needs. Raises Refused when the connector has no key any more."""
    if connector.sealed_key is None:
        raise Refused("unknown_connector", "This connector is deleted: add a new one")
    return Target(
        connector.id,
        connector.tenant_id,
        connector.base_url,
        connector.sealed_key,
        connector.partition,
        connector.cost_since,
    )


def key_in_use(name: str) -> Refused:
    """Make the refusal of a key that the tenant's connector `name` has."""
    return Refused("key_in_use", f"Connector {name!r} uses this API key already: use that one, or another key")


def other_workspace() -> Refused:
    """Make the refusal of a key of another workspace."""
    return Refused(
        "other_workspace",
        "The API key belongs to another workspace: use a key of this connector's workspace, or add a connector for"
        " the other one",
    )


def _require_line(what: str, text: str) -> None:
    unprintable = any(unicodedata.category(sign) in {"Cc", "Cs", "Zl", "Zp"} for sign in text)
    if not text.strip() or text != text.strip() or len(text) > MOST_CHARS or unprintable:
        raise Refused(
            f"{what}_invalid",
            f"The {what} must be 1 to {MOST_CHARS} signs on one line, without spaces around it",
        )


def _kept(api_key: SecretStr, vault: Sealer, tenant_id: str, connector_id: UUID) -> KeptKey:
    headers(api_key)  # what no header can carry is refused before anything else
    text = api_key.get_secret_value()
    return KeptKey(
        sealed=vault.seal(api_key, tenant_id=tenant_id, connector_id=connector_id),
        fingerprint=vault.fingerprints(api_key)[0],
        hint=text[-HINT_CHARS:] if len(text) >= _HINTED_FROM else None,
    )


async def _refuse_known_key(api_key: SecretStr, tenant_id: str, ports: Ports, *, but: UUID | None = None) -> None:
    holder = await ports.registry.key_holder(tenant_id, ports.vault.fingerprints(api_key))
    if holder is not None and holder.id != but:
        raise key_in_use(holder.name)


async def _probe(target: Target, ports: Ports) -> str | None:
    """Ask whether the key is alive; return its workspace's id if it may see that."""
    asked = await ports.provider.converse(target, probe())
    verdict = asked.verdict
    if verdict.ok:
        try:
            found: str | None = directory(Dataset.WORKSPACE, asked.pages[0].body).records["workspace"]["workspace_id"]
        except ContractBroken:
            return None
        return found
    if verdict.finding in DOUBTS:
        blocked = verdict.finding is Finding.BLOCKED
        raise OwnerMustAct(
            StatusReason.ACCOUNT_BLOCKED if blocked else StatusReason.KEY_INVALID,
            f"The provider does not accept this API key ({verdict.message}). "
            + ("The account is blocked: ask the provider's support" if blocked else REGION_HINT),
            action=Action.RECONNECT,
        )
    if verdict.finding in RETRIED:
        raise TryLater(
            "provider_unreachable",
            f"{target.base_url} gave no answer ({verdict.reason}): try again, or look at the base URL",
            retry_after_s=verdict.retry_after_s,
        )
    if verdict.finding in {Finding.UNAVAILABLE, Finding.BUG, Finding.SCHEMA}:
        raise Refused("not_the_provider", f"{target.base_url} does not answer as ElevenLabs does: {verdict.message}")
    return None
