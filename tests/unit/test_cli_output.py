"""The command line's output: what people see, what programs read, and what a shell is told."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import PERMISSIONS, Access, Action, Dataset
from worker.cli import main
from worker.cli.app import exit_code
from worker.cli.events import line, wanted
from worker.cli.printing import Column, ago, print_error, print_rows, printable
from worker.cli.redis_reading import order
from worker.elevenlabs.protocol import Finding, Verdict
from worker.errors import ContractBroken, Misconfigured, OwnerMustAct, Refused, RollcallError, TryLater
from worker.permissions import judge

NOW = datetime(2026, 5, 20, 12, tzinfo=UTC)
EVENT = {
    "type": "io.rollcall.elevenlabs.member.changed.v1",
    "subject": "member/u1",
    "time": "2026-05-20T12:00:00Z",
    "tenantid": "acme",
    "data": {
        "op": "u",
        "before": {"email": "a@example.com"},
        "after": {"email": "b@example.com"},
        "changed": ["email"],
    },
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "ROLLCALL_VAULT_KEYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROLLCALL_DATA_DIR", f"{tmp_path}/none")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TryLater("database_unreachable"), 69),
        (TryLater("redis_unreachable"), 69),
        (TryLater("provider_unreachable"), 75),
        (OwnerMustAct("key_invalid"), 77),
        (Misconfigured("settings_invalid"), 78),
        (Refused("name_taken"), 1),
        (Refused("base_url_invalid"), 2),
        (ContractBroken("schema"), 1),
        (RollcallError("other"), 1),
    ],
)
def test_each_answer_has_its_exit_code(error: RollcallError, code: int) -> None:
    """The exit code tells a script whether to wait, to call the owner or to mend the configuration."""
    assert exit_code(error) == code


def test_errors_are_json_when_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json an error is one object on stderr, nothing is on stdout, and the exit code stays."""
    assert main(["connectors", "list", "--json"]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"].keys() == {"reason", "message", "action"}
    assert json.loads(err)["error"]["reason"] == "no_servers"


@pytest.mark.parametrize("arguments", [["nope"], ["connectors", "lst"], ["sync"], ["runs", "--most", "x"]])
def test_wrong_usage_is_2_and_json_too(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Wrong arguments give exit code 2, as JSON when asked for."""
    assert main(arguments) == 2
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["reason"] == "usage"


def test_an_error_is_one_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json an error is a single line on stderr, however long, and cannot steer the terminal."""
    print_error(Refused("x", "a long story " * 30 + "\x1b[2J"), as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_settings_show_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`settings` lists every value but masks the secret ones, for people and for programs."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:c4n4ry@127.0.0.1/x")
    monkeypatch.setenv("ROLLCALL_POLL_INTERVAL_S", "77")
    assert main(["settings"]) == 0
    assert main(["settings", "--json"]) == 0
    out = capsys.readouterr().out
    assert "c4n4ry" not in out
    rows = [json.loads(text) for text in out.splitlines() if text.startswith("{")]
    found = {row["name"]: row for row in rows}
    assert found["DATABASE_URL"]["value"] == "***"
    assert found["ROLLCALL_POLL_INTERVAL_S"]["value"] == 77
    assert all(row["description"] for row in rows)


def test_every_command_takes_json_and_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command has help with a summary, and the option --json."""
    assert main(["--help"]) == 0
    for command in (
        ["up"], ["migrate"], ["sync"], ["runs"], ["status"], ["settings"], ["beat"], ["worker"], ["writer"],
        ["events", "tail"], ["vault", "check"], ["vault", "rotate"],
        *(["connectors", name] for name in ["add", "list", "show", "check", "reconnect", "pause", "resume", "delete"]),
        *(["holds", name] for name in ["list", "show", "release", "reject"]),
        *(["deadletter", name] for name in ["list", "show", "drop"]),
    ):  # fmt: skip
        assert main([*command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out, command


def test_no_command_takes_a_key_as_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    """A key on a command line would stand in every process list: there is no such option."""
    for command in ("add", "reconnect"):
        main(["connectors", command, "--help"])
        assert "--api-key " not in capsys.readouterr().out
        assert main(["connectors", command, "x", "--api-key", "sk_x", "--json"]) == 2


def test_a_wide_table_fits_into_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Long names give way and fold; ids stay whole; no line is longer than 100."""
    rows = [{"id": "1" * 36, "name": "q" * 90, "why": "scope_missing"}]
    columns = [
        Column("NAME", lambda r: r["name"], flexible=True),
        Column("WHY", lambda r: r["why"]),
        Column("ID", lambda r: r["id"]),
    ]
    print_rows(rows, columns, as_json=False, empty="")
    out = capsys.readouterr().out
    assert max(len(text) for text in out.splitlines()) <= 100
    assert "1" * 36 in out
    assert out.count("q") == 90


def test_an_empty_list_says_so_to_people_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to list is a sentence for people and no line at all for programs."""
    print_rows([], [], as_json=False, empty="None yet.")
    assert capsys.readouterr().out == "None yet.\n"
    print_rows([], [], as_json=True, empty="None yet.")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s ago"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7200, "2 h ago"),
        (2 * 86_400, "2 d ago"),
        (-300, "in 5 min"),
    ],
)
def test_times_are_told_in_the_largest_fitting_unit(seconds: float, text: str) -> None:
    """A time is told by its distance from now, in either direction."""
    assert ago(NOW - timedelta(seconds=seconds), now=NOW) == text
    assert ago(None, now=NOW) == "-"


@given(st.text())
def test_nothing_printed_steers_a_terminal(text: str) -> None:
    """Whatever a provider calls a thing, only printable signs and line ends come out."""
    assert all(sign.isprintable() or sign == "\n" for sign in printable(text))


@pytest.mark.parametrize(
    ("tenant", "glob", "expected"),
    [
        (None, "*", True),
        ("acme", "member.*", True),
        ("acme", "io.rollcall.elevenlabs.member.changed.v1", True),
        ("globex", "*", False),
        (None, "connector.*", False),
    ],
)
def test_events_are_chosen_by_tenant_and_type(tenant: str | None, glob: str, expected: bool) -> None:
    """The glob matches the short type and the full one; a tenant is matched whole."""
    assert wanted(EVENT, tenant, glob) is expected


def test_an_event_for_people_names_no_person() -> None:
    """The readable line tells which fields changed, not what they hold."""
    assert line(EVENT) == "2026-05-20T12:00:00  member.changed          acme  member/u1  updated email"


@given(st.integers(0, 2**48), st.integers(0, 2**32), st.integers(0, 2**48), st.integers(0, 2**32))
def test_entry_ids_compare_as_numbers(a: int, b: int, c: int, d: int) -> None:
    """Ids of entries are in order of time, then number, not of their text."""
    assert (order(f"{a}-{b}".encode()) < order(f"{c}-{d}".encode())) is ((a, b) < (c, d))


@pytest.mark.parametrize("dataset", list(Dataset))
def test_a_missing_permission_is_named_twice(dataset: Dataset) -> None:
    """The remedy of a missing scope names it as the wire has it and as the dashboard labels it."""
    wire, label = PERMISSIONS[dataset]
    for verdict in (
        Verdict(Finding.SCOPE, "scope_missing", "", permissions=(wire,)),
        Verdict(Finding.SCOPE, "scope_missing", ""),
    ):
        found = judge(dataset, verdict, now=NOW)
        assert (found.state, found.action, found.missing) == (Access.DENIED, Action.ADD_PERMISSION, ((wire, label),))
        assert wire in found.advice
        assert label in found.advice


@given(st.sampled_from(Dataset), st.sampled_from(Finding))
def test_every_finding_has_advice_unless_granted(dataset: Dataset, finding: Finding) -> None:
    """Whatever the provider answers, a dataset that may not be read comes with advice."""
    found = judge(dataset, Verdict(finding, "r", "m"), now=NOW)
    assert (found.state is Access.GRANTED) is (finding is Finding.OK)
    assert bool(found.advice) is (finding is not Finding.OK)
