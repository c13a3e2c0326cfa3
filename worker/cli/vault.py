"""`rollcall vault`: the master keys that seal the API keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import typer

from worker.cli.finding import command_settings
from worker.cli.opening import opened_database
from worker.cli.printing import AsJson, print_fields, print_json, say
from worker.errors import RollcallError
from worker.settings import Settings
from worker.store.operating import Resealed, SealedKey, reseal, sealed_keys
from worker.vault import TamperedEnvelope, Vault, key_id_of

app = typer.Typer(help="Check and rotate the master keys that seal the API keys.", no_args_is_help=True)
BATCH: Final = 500


@app.command()
def check(as_json: AsJson = False) -> None:
    """Open every sealed key once, and count them by master key; nothing is shown or changed."""
    settings = command_settings()
    vault = Vault(settings.require_vault_keys())

    async def work() -> list[SealedKey]:
        async with opened_database(settings) as db:
            return await sealed_keys(db)

    keys = asyncio.run(work())
    vault.check_known({key_id_of(key.sealed) for key in keys})
    damaged = [key for key in keys if not _opens(vault, key)]
    found: dict[str, Any] = {
        "first": vault.key_ids[0],
        "keys": dict(Counter(key_id_of(key.sealed) for key in keys)),
        "to_rotate": sum(vault.needs_resealing(key.sealed) for key in keys),
        "damaged": [key.connector_id for key in damaged],
    }
    if as_json:
        print_json(found)
    else:
        print_fields(
            {
                "sealing key": found["first"],
                "sealed": ", ".join(f"{count} by {key_id}" for key_id, count in found["keys"].items()) or "none",
                "to rotate": f"{found['to_rotate']} (rollcall vault rotate)" if found["to_rotate"] else "none",
            }
        )
    _complain(damaged)


@app.command()
def rotate(as_json: AsJson = False) -> None:
    """Seal every key with the first master key of ROLLCALL_VAULT_KEYS; again is harmless.

    To rotate: put a new id:base64key first, restart all processes, rotate, then take the old one away.
    """
    settings = command_settings()
    done, damaged = asyncio.run(_rotate(settings, Vault(settings.require_vault_keys())))
    if as_json:
        print_json({"resealed": done})
    else:
        say(f"Sealed {done} keys anew." if done else "No key was left to seal anew.")
    _complain(damaged)


async def _rotate(settings: Settings, vault: Vault) -> tuple[int, list[SealedKey]]:
    done = 0
    async with opened_database(settings) as db:
        keys = await sealed_keys(db)
        vault.check_known({key_id_of(key.sealed) for key in keys})
        old = [key for key in keys if vault.needs_resealing(key.sealed)]
        damaged = [key for key in old if not _opens(vault, key)]
        sound = [key for key in old if key not in damaged]
        for start in range(0, len(sound), BATCH):
            done += await reseal(db, [_resealed(vault, key) for key in sound[start : start + BATCH]])
    return done, damaged


def _resealed(vault: Vault, key: SealedKey) -> Resealed:
    secret = vault.open(key.sealed, tenant_id=key.tenant_id, connector_id=key.connector_id)
    sealed = vault.seal(secret, tenant_id=key.tenant_id, connector_id=key.connector_id)
    return Resealed(key, sealed, vault.fingerprint(secret))


def _complain(damaged: Sequence[SealedKey]) -> None:
    if damaged:
        names = ", ".join(f"{key.tenant_id}/{key.name}" for key in damaged[:5])
        raise RollcallError(
            "vault_envelope_tampered",
            f"{len(damaged)} sealed keys do not open ({names}): rollcall connectors reconnect CONNECTOR",
        )


def _opens(vault: Vault, key: SealedKey) -> bool:
    try:
        vault.open(key.sealed, tenant_id=key.tenant_id, connector_id=key.connector_id)
    except TamperedEnvelope:
        return False
    return True
