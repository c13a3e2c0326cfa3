"""Deterministic data of a workspace: pure functions of its tag and shape.

The tag is a digest of (seed, workspace name). Nothing here is kept per workspace: small caches hold what is
in use, so that twenty thousand workspaces cost little until somebody changes them. Records are shared by
those caches: a change replaces a record, never edits it.
"""

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b, shake_128
from typing import Any, Final

Record = dict[str, Any]
Atom = tuple[str, str | None, str | None]  # (product type, user id, key hash): what one amount of usage is for

PRODUCTS: Final = (
    "text_to_speech",
    "speech_to_text",
    "dubbing",
    "sound_effects",
    "music",
    "voice_isolator",
    "speech_to_speech",
    "projects",
    "audio_native",
    "conversational_ai",
    "voice_design",
    "image_video_generation",
)
SEATS: Final = (
    "workspace_member",
    "workspace_member",
    "workspace_lite_member",
    "workspace_member",
    "workspace_admin",
)
PERMISSION_SETS: Final = (
    None,
    ("text_to_speech",),
    ("text_to_speech", "speech_to_text", "voices_read"),
    ("dubbing_read", "dubbing_write", "models_read"),
)
GROUP_PERMISSIONS: Final = ("text_to_speech", "workspace_analytics_full_read", "dubbing")
FIRST_NAMES: Final = (
    "Ana", "Bo", "Chen", "Dana", "Eli", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mia",
    "Noor", "Oto", "Priya", "Quinn", "Rosa", "Sami", "Tove", "Uma", "Viktor", "Wen", "Xenia", "Yusuf", "Zoe",
    "Åsa", "Łukasz",
)  # fmt: skip
GROUP_NAMES: Final = ("Research", "Marketing", "Localisation", "Games", "Support", "Studio")
KEY_NAMES: Final = ("ci", "prod", "staging", "batch", "partner", "notebook")
CREATED_UNIX: Final = 1_740_000_000
EXPIRES_UNIX: Final = 1_900_000_000
# Below this a 16-bit draw is a day without usage, about one in eleven.
IDLE_BELOW: Final = 6_000


@dataclass(frozen=True, slots=True)
class Spec:
    """The shape of a workspace; `cost_since` is a day number, None with mode `cost` means since ever."""

    members: int = 20
    groups: int = 3
    service_accounts: int = 2
    keys_per_account: int = 3
    history_days: int = 120
    products: int = 4
    usage_rows_per_day: int = 8
    mode: str = "credits"
    cost_since: int | None = None
    tier: str = "scale_2024_08_10"


@dataclass(slots=True)
class Directory:
    """Who and what a workspace lists, each by id; keys are flat and name their service account."""

    members: dict[str, Record] = field(default_factory=dict)
    groups: dict[str, Record] = field(default_factory=dict)
    accounts: dict[str, Record] = field(default_factory=dict)
    keys: dict[str, Record] = field(default_factory=dict)

    def copy(self) -> "Directory":
        """Copy the tables, not the records."""
        return Directory(dict(self.members), dict(self.groups), dict(self.accounts), dict(self.keys))


def digest(*parts: str | int, size: int) -> str:
    """Opaque hex of `2 * size` characters."""
    return blake2b("\0".join(map(str, parts)).encode(), digest_size=size).hexdigest()


def user_id(tag: str, number: int) -> str:
    """Name a member; the owner is number 0."""
    return f"usr_{tag}{number:05x}"


def account_id(tag: str, number: int) -> str:
    """Name a service account."""
    return f"sa_{tag}{number:03x}"


def key_hash(tag: str, number: int) -> str:
    """Give the opaque hash of a listed key; it has nothing to do with any secret."""
    return digest(tag, "key", number, size=32)


def personal_key_hash(tag: str) -> str:
    """Give the hash of the owner's personal key, which no listing shows."""
    return digest(tag, "personal", size=32)


def member(tag: str, number: int) -> Record:
    """Build a member as `GET /v1/workspace/members` lists it (official SDK)."""
    draw = (int(tag[:8], 16) + number * 0x9E3779B1) & 0xFFFFFFFF
    name = FIRST_NAMES[draw % len(FIRST_NAMES)]
    owner = number == 0
    return {
        "user_id": user_id(tag, number),
        "email": f"{name.lower()}.{number}@{tag}.example",
        "first_name": None if draw % 7 == 3 else name,  # noqa: PLR2004 - one in seven tells no name
        "seat_type": "workspace_admin" if owner else SEATS[(draw >> 8) % len(SEATS)],
        "is_owner": owner,
        "is_locked": not owner and (draw >> 16) % 12 == 0,
    }


def group(tag: str, number: int, members: list[str]) -> Record:
    """Build a group as `GET /v1/workspace/groups` lists it, without its counter (official SDK)."""
    return {
        "id": f"grp_{tag}{number:02x}",
        "name": f"{GROUP_NAMES[number % len(GROUP_NAMES)]} {number}",
        "members": members,
        "permissions": None if number == 0 else list(GROUP_PERMISSIONS[: 1 + number % 3]),
        "group_usage_limit": (500_000, "unlimited", None)[number % 3],
        "group_pvc_limit": None,
        "group_concurrency_limit": "unlimited",
        "group_dubbing_concurrency_limit": None,
        "group_music_concurrency_limit": None,
        "is_scim_synced": False,
        "scim_group": None,
        "scim_frozen": False,
    }


def account(tag: str, number: int, sharing: list[tuple[str, str]]) -> Record:
    """Build a service account; `sharing` is (group id, permission level), written out when listed."""
    return {
        "service_account_user_id": account_id(tag, number),
        "name": f"{KEY_NAMES[number % len(KEY_NAMES)]}-narrator-{number}",
        "created_at_unix": CREATED_UNIX + number * 3_600,
        "sharing": sharing,
    }


def key(tag: str, number: int, owner: str) -> Record:
    """Build a service account's key as listed, without its counter (official SDK)."""
    permissions = PERMISSION_SETS[number % len(PERMISSION_SETS)]
    disabled = number % 11 == 10  # noqa: PLR2004 - one in eleven
    return {
        "name": f"{KEY_NAMES[number % len(KEY_NAMES)]}-{number}",
        "hint": digest(tag, "secret", number, size=2),
        "key_id": f"key_{tag}{number:04x}",
        "service_account_user_id": owner,
        "created_at_unix": CREATED_UNIX + number * 60,
        "is_disabled": disabled,
        "permissions": None if permissions is None else list(permissions),
        "disable_reason": "self_disabled" if disabled else None,
        "character_limit": (None, 100_000)[number % 2],
        "hashed_xi_api_key": key_hash(tag, number),
        "allowed_ips": ["203.0.113.0/24"] if number % 5 == 0 else None,
        "third_party_disable_allowed": (True, None)[number % 2],
        "platform_limits": None,
        "expires_at_unix": EXPIRES_UNIX if number % 4 == 3 else None,  # noqa: PLR2004 - one in four
    }


@lru_cache(maxsize=256)
def directory(tag: str, spec: Spec) -> Directory:
    """Build what an untouched workspace lists; shared, so copy before changing."""
    made = Directory()
    for number in range(spec.members):
        made.members[user_id(tag, number)] = member(tag, number)
    everybody = list(made.members)
    for number in range(spec.groups):
        # One more slice than groups, so that some members are in none.
        built = group(tag, number, everybody[number :: spec.groups + 1])
        made.groups[built["id"]] = built
    first_group = next(iter(made.groups), None)
    for number in range(spec.service_accounts):
        sharing = [(first_group, "viewer")] if first_group is not None and number == 0 else []
        made.accounts[account_id(tag, number)] = account(tag, number, sharing)
        for serial in range(number * spec.keys_per_account, (number + 1) * spec.keys_per_account):
            built = key(tag, serial, account_id(tag, number))
            made.keys[built["key_id"]] = built
    return made


@lru_cache(maxsize=1024)
def sources(tag: str, spec: Spec) -> tuple[Atom, ...]:
    """List what uses credits, one atom each: the web app, nobody, an unlisted key, then keys and members.

    Keys and products meet diagonally, so keys x products of them cover every pair once.
    """
    products = PRODUCTS[: spec.products]
    keys = spec.service_accounts * spec.keys_per_account
    fixed: list[Atom] = [
        (products[0], user_id(tag, 0), None),
        (products[1 % len(products)], None, None),
        (products[0], user_id(tag, 0), personal_key_hash(tag)),
    ]
    made = fixed[: spec.usage_rows_per_day]
    hashes = [key_hash(tag, number) for number in range(keys)]
    # The owner's first use of the web app is among the fixed ones.
    by_key, by_web = 0, 1
    for turn in range(spec.usage_rows_per_day - len(made)):
        if keys and turn % 4 != 3:  # noqa: PLR2004 - every fourth is a member in the web app
            lap, number = divmod(by_key, keys)
            owner = account_id(tag, number // spec.keys_per_account)
            made.append((products[(number + lap) % len(products)], owner, hashes[number]))
            by_key += 1
        else:
            lap, number = divmod(by_web, spec.members)
            made.append((products[(number + lap) % len(products)], user_id(tag, number), None))
            by_web += 1
    return tuple(dict.fromkeys(made))


@lru_cache(maxsize=4096)
def amounts(tag: str, day: int, count: int) -> list[int]:
    """Draw one day's amounts in hundredths of a credit, one for each source, in their order."""
    draws = struct.unpack(f"<{count}H", shake_128(f"{tag}/{day}".encode()).digest(2 * count))
    return [0 if draw < IDLE_BELOW else draw * (1 + place % 5) for place, draw in enumerate(draws)]
