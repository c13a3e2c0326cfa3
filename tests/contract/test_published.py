"""The published documents say what the models say, and our own events and messages obey them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from schemas.connectors import Access, Dataset, RunStatus, Status
from schemas.events import MAX_BATCH, PREFIX, SUBJECT_TYPES, Op
from schemas.messages import RequestSync
from schemas.publish import ANNOUNCEMENTS, FOLDER, OF_CONNECTORS, documents, drifted, event_models, main, write
from tests.fixtures.json_schema import faults, resolve
from worker.changes import Change
from worker.entries import Report, batches
from worker.plan import AccessRow
from worker.store.announcements import Announcement
from worker.store.conclude import connector_announcement
from worker.store.holds import removals
from worker.store.runs import run_announcement
from worker.stream import _reset_event
from worker.usage import usage_day
from worker.verdict import Health

BEGAN = datetime(2026, 4, 1, 12, tzinfo=UTC)
CONNECTOR, RUN, PART = (UUID(int=n) for n in (1, 2, 3))
MEMBER = {
    "user_id": "usr_1",
    "email": "ada@example.com",
    "first_name": None,
    "seat_type": "workspace_member",
    "is_owner": False,
    "is_locked": False,
}
GROUP = {"group_id": "grp_1", "name": "Dubbing", "member_ids": ["usr_1"], "permissions": None, "usage_limit": "100"}
ACCOUNT = {
    "service_account_id": "sa_1",
    "name": "CI",
    "created_at": "2026-01-01T00:00:00Z",
    "sharing": [{"group_id": "grp_1", "permission_level": "viewer"}],
}
KEY = {
    "key_id": "key_1",
    "service_account_id": "sa_1",
    "name": "build",
    "hint": "abcd",
    "key_hash": None,
    "permissions": ["text_to_speech"],
    "created_at": None,
    "expires_at": None,
    "is_disabled": False,
    "disable_reason": None,
    "character_limit": 2**40,
    "allowed_ips": None,
    "third_party_disable_allowed": True,
    "platform_limits": {"credits": 5, "pvc": None},
}
DAY = usage_day(
    "member",
    "2026-04-01",
    [{"key": "", "label": None, "unit": "credits", "amount": "12.5"}],
    settled=False,
)
CHANGES = {
    Dataset.WORKSPACE: [
        Change("workspace", Op.CREATED, None, {"workspace_id": "ws_1", "plan": "business"}, ()),
    ],
    Dataset.MEMBERS: [
        Change("member/usr_1", Op.UPDATED, MEMBER, {**MEMBER, "is_locked": True}, ("is_locked",)),
        Change("member/usr_2", Op.DELETED, {**MEMBER, "user_id": "usr_2"}, None, ()),
    ],
    Dataset.GROUPS: [Change("group/grp_1", Op.CREATED, None, GROUP, ())],
    Dataset.SERVICE_ACCOUNTS: [
        Change("service_account/sa_1", Op.CREATED, None, ACCOUNT, ()),
        Change("api_key/key_1", Op.REPLAYED, None, KEY, ()),
    ],
    Dataset.USAGE_MEMBER: [Change("usage/member/2026-04-01", Op.UPDATED, None, DAY, ())],
}


def sample_entries() -> Iterator[dict[str, Any]]:
    """Give the entries of an observation of each dataset, their fields as text."""
    for number, (dataset, changes) in enumerate(CHANGES.items()):
        for entry in batches(
            changes,
            tenant_id="acme",
            connector_id=CONNECTOR,
            dataset=dataset,
            base=number,
            sequence=1_775_044_800_000_000 + number,
            part_id=PART,
            began=BEGAN,
            report=Report(run_id=RUN, records=2, changes=len(changes)),
        ):
            yield {name.decode(): value.decode() for name, value in entry.fields.items()}


def sample_events() -> list[dict[str, Any]]:
    return [event for entry in sample_entries() for event in json.loads(entry["ce"])]


def published(path: str) -> Any:
    return json.loads((FOLDER / path).read_text(encoding="utf-8"))


def test_nothing_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    """The documents in the repository are those the models make."""
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_drift_is_named_and_mended(tmp_path: Path) -> None:
    """A changed, a missing and a forgotten document are found, and writing mends all three."""
    write(tmp_path)
    assert drifted(tmp_path) == []
    (tmp_path / "records/member.json").write_text("{}")
    (tmp_path / "messages/fetch.json").unlink()
    (tmp_path / "records/retired.json").write_text("{}")
    assert drifted(tmp_path) == ["messages/fetch.json", "records/member.json", "records/retired.json"]
    write(tmp_path)
    assert drifted(tmp_path) == []
    assert not (tmp_path / "records/retired.json").exists()


def test_every_kind_of_event_has_a_schema_and_a_sample() -> None:
    """What the contract lists is published, and the samples below leave out no kind of fact."""
    facts = set(SUBJECT_TYPES.values())
    assert {f"{PREFIX}{what}.v1" for what in event_models()} == facts | {f"{PREFIX}{w}.v1" for w in ANNOUNCEMENTS}
    assert {event["type"] for event in sample_events()} == facts


@pytest.mark.parametrize("event", sample_events(), ids=lambda event: event["id"])
def test_events_obey_their_schema(event: dict[str, Any]) -> None:
    """An event as it stands on the stream is valid by its published schema and by the model behind it."""
    what = event["type"].removeprefix(PREFIX).removesuffix(".v1")
    schema = published(f"events/{what}.v1.json")
    assert list(faults(event, schema, schema)) == []
    event_models()[what].model_validate(event)


ENVELOPE = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"}


@pytest.mark.parametrize("what", ANNOUNCEMENTS)
def test_announcements_have_a_whole_envelope(what: str) -> None:
    """Every attribute that is always written is required of an announcement."""
    schema = published(f"events/{what}.v1.json")
    of_connectors = set() if what == "stream.reset" else OF_CONNECTORS - {"correlationid"}
    assert set(schema["required"]) == ENVELOPE | of_connectors
    assert schema["properties"]["type"]["const"] == f"{PREFIX}{what}.v1"


COUNTS = ("parts_total", "parts_done", "parts_failed")
ROW = {"id": CONNECTOR, "tenant_id": "acme", "connector_id": CONNECTOR, "partition": 0}
ACCESS = {d: AccessRow(d, Access.DENIED, "scope_missing", "workspace_read") for d in Dataset}
ANNOUNCED = [
    *(connector_announcement(ROW, Health(status), None, ACCESS) for status in Status if status is not Status.PENDING),
    *(
        run_announcement(
            {
                **ROW,
                "id": RUN,
                "kind": "backfill",
                "status": str(status),
                "error_reason": None,
                **dict.fromkeys(COUNTS, 1),
            },
            ROW,
        )
        for status in RunStatus
        if status is not RunStatus.REFUSED
    ),
    *(removals(ROW, PART, "members", what, 40, 30) for what in ("held", "released", "rejected")),
]


@pytest.mark.parametrize("announcement", ANNOUNCED, ids=lambda a: f"{a.what}-{a.data.get('status')}")
def test_announcements_obey_their_schema(announcement: Announcement) -> None:
    """The data that our writers make of an announcement is what its schema says."""
    schema = published(f"events/{announcement.what}.v1.json")
    data = json.loads(json.dumps(announcement.data, default=str))
    assert list(faults(data, schema["properties"]["data"], schema)) == []


def test_a_reset_obeys_its_schema() -> None:
    """The event of a trimmed stream, which has no connector, is what its schema says."""
    schema = published("events/stream.reset.v1.json")
    (event,) = json.loads(_reset_event(0, ["billing"], 1_775_044_800))
    assert list(faults(event, schema, schema)) == []
    assert not event.keys() & OF_CONNECTORS


def test_a_schema_refuses_what_is_wrong() -> None:
    """A wrong type, a lacking field and a malformed amount are faults; a field nobody knows is none."""
    usage = next(event for event in sample_events() if event["subject"].startswith("usage/"))
    schema = published("events/usage_day.changed.v1.json")
    assert list(faults({**usage, "extra": 1}, schema, schema)) == []
    assert any(faults({**usage, "type": "other"}, schema, schema))
    assert any(faults({**usage, "data": {**usage["data"], "totals": {"credits": "1e3"}}}, schema, schema))
    assert any(faults({name: value for name, value in usage.items() if name != "tenantid"}, schema, schema))


def test_records_and_messages_are_published() -> None:
    """A message by its schema takes what the backend's door takes, and nothing beside it."""
    schema = published("messages/request_sync.json")
    message = json.loads(RequestSync(tenant_id="acme", connector_id=CONNECTOR, run_id=RUN).model_dump_json())
    assert list(faults(message, schema, schema)) == []
    assert any(faults({**message, "api_key": "x"}, schema, schema))
    member = published("records/member.json")
    assert list(faults(MEMBER, member, member)) == []


def refs(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        if "$ref" in document:
            yield document["$ref"]
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            yield from refs(item)


def test_asyncapi_is_well_formed() -> None:
    """The document has what AsyncAPI 3 requires, and every reference in it leads somewhere."""
    document = published("asyncapi.json")
    assert document["asyncapi"] == "3.0.0"
    assert document["info"].keys() >= {"title", "version"}
    for ref in refs(document):
        resolve(document, ref)
    for operation in document["operations"].values():
        assert operation["action"] in {"send", "receive"}
        assert operation["channel"]["$ref"].startswith("#/channels/")
    for channel in document["channels"].values():
        assert set(re.findall(r"{(\w+)}", channel["address"])) == channel.get("parameters", {}).keys()
        assert all(ref.startswith("#/components/messages/") for ref in refs(channel["messages"]))
    assert document["channels"]["events"]["messages"].keys() == event_models().keys()
    # Two models of one name would be told apart by their modules' names: `__` in a name shows that.
    assert all(re.fullmatch(r"[A-Za-z]+", name) for name in document["components"]["schemas"])


def test_asyncapi_describes_our_entries() -> None:
    """Each entry of an observation has the fields the document gives, and its events their payload."""
    document = published("asyncapi.json")
    for entry in sample_entries():
        events = json.loads(entry["ce"])
        assert len(events) <= MAX_BATCH
        for event in events:
            message = document["components"]["messages"][event["type"].removeprefix(PREFIX).removesuffix(".v1")]
            assert list(faults(event, message["payload"], document)) == []
            assert list(faults(entry, message["headers"], document)) == []
            assert entry.keys() <= resolve(document, message["headers"]["$ref"])["properties"].keys()


def test_asyncapi_describes_the_door() -> None:
    """The body of a Celery message is arguments, keyword arguments and the rest, in this order."""
    document = published("asyncapi.json")
    payload = document["components"]["messages"]["request_sync"]["payload"]
    arguments = json.loads(RequestSync(tenant_id="acme", connector_id=CONNECTOR, run_id=RUN).model_dump_json())
    assert list(faults([[], arguments, {}], payload, document)) == []
    assert any(faults([[], {"tenant_id": "acme"}, {}], payload, document))


def test_the_same_models_give_the_same_text() -> None:
    """Documents hold no date, no path and no order by chance."""
    first = json.dumps(documents())
    assert first == json.dumps(documents())
    assert str(Path.home()) not in first
