"""Random valid changes of a workspace, repeatable from a seed."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final

from worker.dev.simulator.generate import PRODUCTS, SEATS, Record, digest
from worker.dev.simulator.mutations import apply
from worker.dev.simulator.payload import REQUIRED, BadPayload, Field, day_text, integer, list_of, one_of, read
from worker.dev.simulator.world import State

Make = Callable[[State, Random, int], Record | None]


def _some_member(state: State, rng: Random) -> str | None:
    found = [user for user, record in state.lists.members.items() if not record["is_owner"]]
    return rng.choice(found) if found else None


def _some(records: Mapping[str, Record], rng: Random) -> str | None:
    return rng.choice(list(records)) if records else None


def _but_the_last(records: Mapping[str, Record], rng: Random) -> str | None:
    """Choose something to remove; the last one stays, so that long walks do not end in an empty workspace."""
    return _some(records, rng) if len(records) > 1 else None


def _join(_: State, rng: Random, __: int) -> Record:
    return {"seat_type": rng.choice(SEATS)}


def _leave(state: State, rng: Random, _: int) -> Record | None:
    user = _some_member(state, rng)
    return None if user is None else {"user_id": user}


def _change_member(state: State, rng: Random, _: int) -> Record | None:
    user = _some_member(state, rng)
    changes: list[Record] = [
        {"seat_type": rng.choice(SEATS)},
        {"is_locked": rng.random() < 0.5},  # noqa: PLR2004 - even odds
        {"first_name": rng.choice([None, "Renamed"])},
        {"email": f"moved.{rng.randrange(10**6)}@moved.example"},
    ]
    return None if user is None else {"user_id": user, **rng.choice(changes)}


def _add_group(state: State, rng: Random, _: int) -> Record:
    members = list(state.lists.members)
    return {"members": rng.sample(members, min(3, len(members)))}


def _change_group(state: State, rng: Random, _: int) -> Record | None:
    found = _some(state.lists.groups, rng)
    members = list(state.lists.members)
    changes: list[Record] = [
        {"name": f"Group {rng.randrange(10**6)}"},
        {"members": rng.sample(members, min(rng.randrange(5), len(members)))},
        {"permissions": rng.choice([None, ["dubbing"], []])},
        {"group_usage_limit": rng.choice([None, "unlimited", rng.randrange(10**6)])},
    ]
    return None if found is None else {"id": found, **rng.choice(changes)}


def _remove_group(state: State, rng: Random, _: int) -> Record | None:
    found = _but_the_last(state.lists.groups, rng)
    return None if found is None else {"id": found}


def _add_account(_: State, rng: Random, __: int) -> Record:
    return {"name": f"bot-{rng.randrange(10**6)}", "keys": rng.randrange(3)}


def _remove_account(state: State, rng: Random, _: int) -> Record | None:
    found = _but_the_last(state.lists.accounts, rng)
    return None if found is None else {"service_account_user_id": found}


def _change_account(state: State, rng: Random, _: int) -> Record | None:
    found = _some(state.lists.accounts, rng)
    return None if found is None else {"service_account_user_id": found, "name": f"bot-{rng.randrange(10**6)}"}


def _add_key(state: State, rng: Random, _: int) -> Record | None:
    found = _some(state.lists.accounts, rng)
    return None if found is None else {"service_account_user_id": found, "name": f"key-{rng.randrange(10**6)}"}


def _change_key(state: State, rng: Random, _: int) -> Record | None:
    found = _some(state.lists.keys, rng)
    changes: list[Record] = [
        {"name": f"key-{rng.randrange(10**6)}"},
        {"is_disabled": True, "disable_reason": rng.choice(["exposed_publicly", "self_disabled"])},
        {"is_disabled": False, "disable_reason": None},
        {"permissions": rng.choice([None, ["text_to_speech"], ["dubbing_read", "models_read"]])},
        {"character_limit": rng.choice([None, rng.randrange(10**6)])},
        {"expires_at_unix": rng.choice([None, 1_900_000_000 + rng.randrange(10**6)])},
        {"allowed_ips": rng.choice([None, ["198.51.100.0/24"]])},
    ]
    return None if found is None else {"key_id": found, **rng.choice(changes)}


def _remove_key(state: State, rng: Random, _: int) -> Record | None:
    found = _but_the_last(state.lists.keys, rng)
    return None if found is None else {"key_id": found}


def _use(state: State, rng: Random, day: int) -> Record:
    lists = state.lists
    users = [None, *list(lists.members)[:50], *lists.accounts]
    hashes = [
        None,
        digest(state.usage.tag, "unlisted", size=32),
        *(record["hashed_xi_api_key"] for record in lists.keys.values()),
    ]
    return {
        "day": day_text(day),
        "product": rng.choice(PRODUCTS),
        "user_id": rng.choice(users),
        "key_hash": rng.choice(hashes),
        "amount": f"{rng.randrange(1, 10**6) / 100:.2f}",
    }


def _scale(_: State, rng: Random, day: int) -> Record:
    return {"day": day_text(day), "factor": rng.choice([0.5, 0.9, 1.1, 2])}


def _empty_day(_: State, __: Random, day: int) -> Record:
    return {"day": day_text(day)}


def _tick(_: State, rng: Random, __: int) -> Record:
    return {"by": rng.randrange(1, 1_000)}


MAKERS: Final[Mapping[str, Make]] = {
    "member_join": _join,
    "member_leave": _leave,
    "member_update": _change_member,
    "group_add": _add_group,
    "group_update": _change_group,
    "group_remove": _remove_group,
    "service_account_add": _add_account,
    "service_account_update": _change_account,
    "service_account_remove": _remove_account,
    "key_add": _add_key,
    "key_update": _change_key,
    "key_remove": _remove_key,
    "usage_add": _use,
    "usage_set": _use,
    "usage_scale": _scale,
    "usage_remove_day": _empty_day,
    "volatile_tick": _tick,
}

FIELDS: Final = {
    "n": Field(integer(0, 100_000), REQUIRED),
    "seed": Field(integer(0), 0),
    # How far back usage changes, in days; a reader that looks back less will not see them at once.
    "usage_days": Field(integer(1, 3_650), 3),
    "kinds": Field(list_of(one_of(*MAKERS)), list(MAKERS)),
}


def apply_random(state: State, asked: Any, today: int) -> list[Record]:
    """Apply `{"op": "random", n, seed, usage_days, kinds}` to a draft; returns the operations done.

    The same seed in the same state does the same. The owner always stays.

    Raises:
        BadPayload: wrong fields, or none of the kinds is possible in this state.
    """
    args = read({name: value for name, value in asked.items() if name != "op"}, FIELDS, "random")
    rng = Random(f"{state.usage.tag}/{args['seed']}")  # noqa: S311 - repeatable changes, no secret
    done: list[Record] = []
    for _ in range(args["n"]):
        kinds = rng.sample(args["kinds"], len(args["kinds"]))
        day = today - rng.randrange(args["usage_days"])
        for kind in kinds:
            made = MAKERS[kind](state, rng, day)
            if made is not None:
                done.append(apply(state, {"op": kind, **made}, today))
                break
        else:
            raise BadPayload("random: none of the kinds is possible in this state")
    return done
