"""Commands for the installation: schema, settings, and the three processes that run for long."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

import typer

from worker.cli.finding import command_settings, process_settings
from worker.cli.opening import opened_database
from worker.cli.printing import AsJson, Column, print_json, print_rows, say
from worker.errors import TryLater
from worker.redaction import MASK
from worker.settings import Settings, catalogue, load
from worker.store.migrate import migrate as bring_up_to_date
from worker.store.operating import sealed_keys
from worker.vault import Vault, key_id_of


def migrate(as_json: AsJson = False) -> None:
    """Bring the database's schema up to date; again is harmless."""
    settings = command_settings()
    url = settings.require_database().get_secret_value()
    applied = bring_up_to_date(url, partitions=settings.partitions)
    if as_json:
        print_json({"applied": applied})
    else:
        say(f"Applied: {', '.join(applied)}" if applied else "The schema is up to date.")


def settings(as_json: AsJson = False) -> None:
    """List every setting with its value and what it is for; secrets are masked."""
    found = load()
    values = {field.alias: getattr(found, name) for name, field in Settings.model_fields.items()}
    rows: list[dict[str, Any]] = [
        {
            "name": setting.name,
            "value": MASK if setting.secret and values[setting.name] is not None else values[setting.name],
            "default": setting.default or None,
            "description": setting.description,
            "secret": setting.secret,
        }
        for setting in catalogue()
    ]
    print_rows(
        rows,
        [
            Column("NAME", lambda r: r["name"]),
            Column("VALUE", lambda r: _shown(r["value"]), flexible=True),
            Column("WHAT FOR", lambda r: r["description"], flexible=True),
        ],
        as_json=as_json,
        empty="",
    )


def beat(as_json: AsJson = False) -> None:  # noqa: ARG001 - every command takes it; here only errors differ
    """Run the clock that makes dispatch tick. Several at once are harmless."""
    _run("beat", process_settings("beat"))


def worker(as_json: AsJson = False) -> None:  # noqa: ARG001 - every command takes it; here only errors differ
    """Run a worker: it plans syncs and asks the provider. Start as many as you need."""
    found = process_settings("worker")
    asyncio.run(_check_vault(found))
    _run("worker", found)


def writer(as_json: AsJson = False) -> None:  # noqa: ARG001 - every command takes it; here only errors differ
    """Run a writer: it folds the event streams into Postgres. Several share the partitions."""
    _run("writer", process_settings("writer"))


def _run(process: str, found: Settings) -> None:
    # Celery takes half a second to import, and no other command needs it.
    raise typer.Exit(import_module(f"tasks.run_{process}").main(found))


async def _check_vault(found: Settings) -> None:
    """Stop a worker that could not open the stored keys; one whose database is away finds out later."""
    vault = Vault(found.require_vault_keys())
    try:
        async with opened_database(found) as db:
            vault.check_known({key_id_of(key.sealed) for key in await sealed_keys(db)})
    except TryLater:
        return


def _shown(value: object) -> str:
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    return "" if value is None else str(value)
