"""Planning an asked-for run: once, whatever is sent twice at the same moment."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from schemas.connectors import Dataset, RunKind
from tests.fixtures.harness import Harness
from worker.connectors import request_sync

AT_ONCE = 5


async def test_a_run_planned_at_once_by_several_has_its_parts_once(harness: Harness) -> None:
    """Doubled messages plan a run once: its parts are there once, and one message takes them."""
    acme = await harness.synced()
    for _ in range(5):
        run_id = uuid4()
        await request_sync(
            harness.runtime.registry,
            tenant_id=acme.tenant,
            connector_id=acme.id,
            kind=RunKind.POLL,
            run_id=run_id,
            actor="test",
        )
        taken = await asyncio.gather(*(harness.runtime.dispatch.plan_run(run_id) for _ in range(AT_ONCE)))
        sent = [sending for some in taken for sending in some]
        assert [set(sending.datasets) for sending in sent] == [set(Dataset)]
        (row,) = await harness.rows("SELECT count(*) AS n FROM rollcall.sync_parts WHERE run_id = %s", [run_id])
        assert row["n"] == len(Dataset)
        harness.messages.extend(sent)
        await harness.settle()
        run = await harness.one("SELECT * FROM rollcall.sync_runs WHERE id = %s", [run_id])
        assert (run["status"], run["parts_total"], run["parts_done"]) == ("succeeded", len(Dataset), len(Dataset))
    assert harness.lapses == 0


async def test_what_a_plan_leaves_out_is_asked_for_by_no_run(harness: Harness) -> None:
    """Outside the customer's plan since less than a day: neither a due run nor an asked-for one asks again."""
    acme = await harness.synced()
    await harness.rows(
        "UPDATE rollcall.connector_access SET state = 'unavailable', reason = 'not_found', checked_at = now()"
        " WHERE connector_id = %s AND dataset = 'groups'",
        [acme.id],
    )
    (run,) = await harness.poll(acme)
    assert run["parts_total"] == len(Dataset) - 1
    run_id = uuid4()
    await request_sync(
        harness.runtime.registry,
        tenant_id=acme.tenant,
        connector_id=acme.id,
        kind=RunKind.POLL,
        run_id=run_id,
        actor="test",
    )
    (sending,) = await harness.runtime.dispatch.plan_run(run_id)
    assert set(sending.datasets) == set(Dataset) - {Dataset.GROUPS}
