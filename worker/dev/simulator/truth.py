"""What is true of a workspace, summed exactly, for a test to compare with what a reader made of it."""

from collections import defaultdict
from decimal import Decimal
from typing import Any, Final

from worker.dev.simulator.listings import account_records, group_records, member_records
from worker.dev.simulator.payload import day_text
from worker.dev.simulator.usage import COUNT_PER_HUNDREDTH, MICROS_PER_HUNDREDTH
from worker.dev.simulator.world import Workspace, World

DIMENSIONS: Final = ("product", "member", "api_key")

Amounts = dict[str, str]  # unit -> amount as a decimal string


def _plain(amount: Decimal) -> str:
    return format(amount.normalize(), "f")


def _amounts(hundredths: int, *, by_cost: bool) -> Amounts:
    if not by_cost:
        return {"credits": _plain(Decimal(hundredths).scaleb(-2))}
    return {
        "usd": _plain(Decimal(hundredths * MICROS_PER_HUNDREDTH).scaleb(-6)),
        "charge_count": _plain(Decimal(hundredths * COUNT_PER_HUNDREDTH).scaleb(-2)),
    }


def truth(world: World, workspace: Workspace, first: int | None, last: int | None) -> dict[str, Any]:
    """Tell identity, records as they are written, and usage for the days from first to last, both included.

    Usage is {dimension: {day: {key: {unit: amount}}}}; the key of unattributed usage is "", days and keys
    without usage are left out. Days before the switch to cost billing count in credits, the others in usd and
    charge_count.
    """
    today = world.today()
    usage = workspace.state.usage
    switch = workspace.state.switch_day
    found: dict[str, dict[str, dict[str, Amounts]]] = {dimension: {} for dimension in DIMENSIONS}
    earliest = min([usage.first_day(today), *usage.edits])
    days = usage.days(earliest if first is None else first, today if last is None else last, today)
    for day in days:
        sums: dict[str, dict[str, int]] = {dimension: defaultdict(int) for dimension in DIMENSIONS}
        for atom, amount in usage.of_day(day, today):
            for dimension, key in zip(DIMENSIONS, atom, strict=True):
                sums[dimension][key or ""] += amount
        by_cost = switch is not None and day >= switch
        for dimension, keys in sums.items():
            written = {key: _amounts(amount, by_cost=by_cost) for key, amount in keys.items() if amount}
            if written:
                found[dimension][day_text(day)] = written
    return {
        "workspace": {"workspace_id": workspace.workspace_id, "tier": workspace.state.tier},
        "members": member_records(workspace),
        "groups": group_records(world, workspace),
        "service_accounts": account_records(world, workspace),
        "usage": found,
    }
