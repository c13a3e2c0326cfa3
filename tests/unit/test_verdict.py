"""Verdicts: what an answer says of the credential, and what its owner is told. No false disconnect."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.connectors import PERMISSIONS, Access, Action, Dataset, PartStatus, Status, StatusReason
from worker.elevenlabs.protocol import OK_VERDICT, Answer, Finding, Verdict, classify
from worker.plan import AccessRow
from worker.verdict import (
    CONCLUSIVE,
    DOUBTS,
    Deaths,
    Health,
    access_after,
    alive,
    derive,
    doubted,
    part_after,
    proves_alive,
)

NOW = datetime(2026, 4, 10, 12, tzinfo=UTC)
SAMPLES = Path(__file__).parents[1] / "samples" / "errors"
GRANTED = {d: AccessRow(d, Access.GRANTED, checked_at=NOW) for d in Dataset}
CONNECTED = Health(Status.CONNECTED)
FINDINGS = st.builds(Verdict, st.sampled_from(Finding), st.just("why"), st.just("said"))

AGAIN = (PartStatus.WAITING, "TryLater")
OURS = (PartStatus.FAILED, "ContractBroken")
OWNERS = (PartStatus.FAILED, "OwnerMustAct")
ABSENT = (PartStatus.SKIPPED, None)

DEAD = (Status.DISCONNECTED, StatusReason.KEY_INVALID, Action.RECONNECT)
BLOCKED = (Status.DISCONNECTED, StatusReason.ACCOUNT_BLOCKED, Action.RECONNECT)
SCOPE = (Status.DEGRADED, StatusReason.SCOPE_MISSING, Action.ADD_PERMISSION)
PLAN = (Status.DEGRADED, StatusReason.PLAN_TOO_LOW, Action.UPGRADE_PLAN)
QUOTA = (Status.DEGRADED, StatusReason.QUOTA, Action.UPGRADE_PLAN)
ROLE = (Status.DEGRADED, StatusReason.ROLE_OR_IP, Action.CHECK_ROLE_OR_IP)
CALM = (Status.CONNECTED, None, Action.NONE)

CATALOGUE = {
    name: (part, status)
    for part, status, names in [
        (OWNERS, DEAD, "401_invalid_api_key_live 401_invalid_api_key_legacy 401_invalid_api_key_documented"),
        (OWNERS, BLOCKED, "401_detected_unusual_activity"),
        (OWNERS, SCOPE, "401_missing_permissions 401_missing_permissions_legacy 401_missing_permissions_several"),
        (OWNERS, SCOPE, "401_missing_permissions_unnamed 401_missing_permissions_by_message_only"),
        (OWNERS, SCOPE, "403_insufficient_permissions 403_insufficient_permissions_by_code"),
        (OWNERS, QUOTA, "401_quota_exceeded 401_quota_exceeded_legacy 402_insufficient_credits"),
        (OWNERS, PLAN, "402_paid_plan_required 402_no_body 403_subscription_required 403_feature_not_available"),
        (OWNERS, PLAN, "403_only_for_creator"),
        (OWNERS, ROLE, "403_forbidden_role_or_ip 403_workspace_access_denied 403_invalid_api_key_is_no_death"),
        (OURS, CALM, "401_needs_authorization 401_missing_api_key_documented 401_sign_in_required_documented"),
        (OURS, CALM, "401_invalid_authorization_header 401_max_character_limit_exceeded 422_validation"),
        (OURS, CALM, "400_max_character_limit_exceeded 400_invalid_parameters 400_missing_required_field"),
        (OURS, CALM, "400_invalid_page_size 400_invalid_cursor 400_bad_request 400_malformed_json"),
        (OURS, CALM, "400_invalid_content_type 400_request_too_large"),
        (ABSENT, CALM, "404_workspace_not_found 404_unrouted 405_method_not_allowed 501_not_implemented"),
        (AGAIN, CALM, "403_html_challenge 403_empty 408_timeout 409_conflict 409_resource_already_exists"),
        (AGAIN, CALM, "409_already_running 409_already_processing 409_concurrent_modification"),
        (AGAIN, CALM, "429_concurrency 429_concurrency_legacy 429_rate 429_system_busy 429_no_body"),
        (AGAIN, CALM, "500_internal_error 500_unwrapped_text_plain 502_html 503_service_unavailable"),
        (AGAIN, CALM, "503_maintenance 504_empty 302_redirect 200_truncated 200_html 200_empty"),
    ]
    for name in names.split()
}
"""By sample: what becomes of the part, and what the owner of a connected workspace is told."""
UNEXPLAINED = ("401_bare", "401_string", "401_unknown_word")


def verdict_of(name: str) -> Verdict:
    sample = json.loads((SAMPLES / f"{name}.json").read_text())
    return classify(Answer(sample["status"], sample["headers"], sample["body"].encode()), NOW)


def judge(verdict: Verdict, dataset: Dataset = Dataset.MEMBERS) -> tuple[Health, dict[Dataset, AccessRow]]:
    """Put a confirmed answer about one dataset to a connected workspace, in the order that the ledger does."""
    access = GRANTED | {dataset: access_after(GRANTED[dataset], verdict, now=NOW)}
    if proves_alive(verdict):
        return alive(CONNECTED, derive(access, removals_held=False, final=False)), access
    if verdict.finding in DOUBTS:
        return doubted(CONNECTED, verdict, run_id="run", deaths=Deaths(0, 1), now=NOW), access
    return CONNECTED, access


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_known_answer_has_its_consequence(name: str) -> None:
    """Status and body decide whether it is asked again, and what the connector's owner is offered."""
    verdict, (part, status) = verdict_of(name), CATALOGUE[name]
    outcome = part_after(verdict, attempts=1, most=8, backoff_s=1.0)
    health, _ = judge(verdict)
    assert (outcome.status, outcome.error_class) == part
    assert outcome.error_reason == verdict.reason
    assert (health.status, health.reason, health.action) == status


def test_no_known_answer_is_left_out() -> None:
    """Every recorded or documented error has its consequence here."""
    assert {*CATALOGUE, *UNEXPLAINED} == {path.stem for path in SAMPLES.glob("*.json")}


@pytest.mark.parametrize("name", [name for name, (_, status) in CATALOGUE.items() if status[0] is Status.DEGRADED])
def test_a_refusal_degrades_one_dataset(name: str) -> None:
    """The others stay granted; the refused one names what is missing when it is a permission."""
    verdict = verdict_of(name)
    _, access = judge(verdict)
    assert {d for d, row in access.items() if row.state is Access.DENIED} == {Dataset.MEMBERS}
    row = access[Dataset.MEMBERS]
    assert (row.missing_permission is not None) == (verdict.finding is Finding.SCOPE)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("401_missing_permissions", "workspace_members_read"),
        ("401_missing_permissions_unnamed", PERMISSIONS[Dataset.MEMBERS][0]),
    ],
)
def test_the_permission_to_add_is_named(name: str, missing: str) -> None:
    """It is the provider's word, or else what the dataset is known to need."""
    _, access = judge(verdict_of(name))
    assert access[Dataset.MEMBERS].missing_permission == missing


def test_several_permissions_are_named_together() -> None:
    """A message that names several loses none."""
    verdict = verdict_of("401_missing_permissions_several")
    _, access = judge(verdict)
    assert access[Dataset.MEMBERS].missing_permission == ",".join(verdict.permissions)
    assert len(verdict.permissions) > 1


def test_an_absent_endpoint_degrades_nothing() -> None:
    """There is nothing the owner could do about a dataset that the provider does not have."""
    health, access = judge(verdict_of("404_unrouted"))
    assert access[Dataset.MEMBERS].state is Access.UNAVAILABLE
    assert health == CONNECTED


@given(FINDINGS)
def test_only_a_doubt_disconnects(verdict: Verdict) -> None:
    """Of all findings only those against the key itself can end a connection, and one 401 is not enough."""
    health, _ = judge(verdict)
    assert (health.status is Status.DISCONNECTED) == (verdict.finding in CONCLUSIVE)
    assert CONCLUSIVE < DOUBTS == CONCLUSIVE | {Finding.UNAUTHORIZED}


BARE = verdict_of("401_bare")
FEW = Deaths(0, 1)


def strike(health: Health, run: str, deaths: Deaths = FEW, now: datetime = NOW) -> Health:
    return doubted(health, BARE, run_id=run, deaths=deaths, now=now)


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_an_unexplained_401_disconnects_after_three_runs(name: str) -> None:
    """Twice it is only counted; the third run in a row ends the connection."""
    health, states = CONNECTED, []
    for run in ("a", "b", "c"):
        health = doubted(health, verdict_of(name), run_id=run, deaths=FEW, now=NOW)
        states.append((health.status, health.strikes))
    assert states == [(Status.CONNECTED, 1), (Status.CONNECTED, 2), (Status.DISCONNECTED, 3)]
    assert (health.reason, health.action) == (StatusReason.KEY_INVALID, Action.RECONNECT)


def test_a_run_counts_once() -> None:
    """Seven datasets refused in one run are one strike."""
    health = CONNECTED
    for _ in Dataset:
        health = strike(health, "a")
    assert (health.status, health.strikes) == (Status.CONNECTED, 1)


def test_any_sign_of_life_starts_the_count_again() -> None:
    """The three runs must be in a row."""
    health = strike(strike(CONNECTED, "a"), "b")
    health = alive(health, CALM)
    assert (health.strikes, health.strike_run) == (0, None)
    assert strike(strike(health, "c"), "d").status is Status.CONNECTED


@pytest.mark.parametrize(
    ("others", "polled", "waits"),
    [(4, 5, False), (5, 30, False), (5, 29, True), (5, 6, True), (199, 1000, False), (200, 1000, True), (0, 0, False)],
)
def test_verdicts_wait_when_too_many_seem_dead(others: int, polled: int, waits: bool) -> None:
    """More than 5 connectors and more than 20 % of those polled: the status stays, the suspicion is noted."""
    deaths = Deaths(others, polled)
    health = doubted(CONNECTED, verdict_of("401_invalid_api_key_live"), run_id="a", deaths=deaths, now=NOW)
    assert deaths.too_many is waits
    assert (health.status is Status.CONNECTED) is waits
    assert health.suspect_since == (NOW if waits else None)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_ceiling_is_both_a_number_and_a_share(others: int, polled: int) -> None:
    """A handful may always die, and so may a fifth."""
    dead = others + 1
    assert Deaths(others, polled).too_many == (dead > 5 and 5 * dead > max(polled, 1))


def test_a_suspect_dies_when_the_storm_is_over() -> None:
    """The suspicion keeps its first time while it lasts, and ends with the verdict."""
    storm, dead = Deaths(50, 60), verdict_of("401_invalid_api_key_live")
    health = doubted(CONNECTED, dead, run_id="a", deaths=storm, now=NOW)
    health = doubted(health, dead, run_id="b", deaths=storm, now=NOW + timedelta(minutes=15))
    assert health.suspect_since == NOW
    health = doubted(health, dead, run_id="c", deaths=FEW, now=NOW + timedelta(minutes=30))
    assert (health.status, health.suspect_since) == (Status.DISCONNECTED, None)


def test_a_suspect_that_answers_is_cleared() -> None:
    """A provider that refused everybody for a while leaves no trace."""
    health = doubted(CONNECTED, verdict_of("401_invalid_api_key_live"), run_id="a", deaths=Deaths(50, 60), now=NOW)
    assert alive(health, CALM) == CONNECTED


def test_strikes_wait_too() -> None:
    """A third unexplained 401 within a storm disconnects nobody."""
    health = strike(strike(CONNECTED, "a"), "b")
    health = strike(health, "c", Deaths(50, 60))
    assert (health.status, health.suspect_since) == (Status.CONNECTED, NOW)
    assert strike(health, "d").status is Status.DISCONNECTED


@pytest.mark.parametrize("status", [Status.DISCONNECTED, Status.PAUSED, Status.DELETED])
@given(verdict=FINDINGS)
def test_a_doubt_that_comes_late_changes_nothing(status: Status, verdict: Verdict) -> None:
    """A connector that is disconnected already, paused or deleted is not disconnected once more."""
    health = Health(status, StatusReason.KEY_INVALID, Action.RECONNECT)
    assert doubted(health, verdict, run_id="a", deaths=FEW, now=NOW) == health


@pytest.mark.parametrize("status", [Status.PAUSED, Status.DELETED])
def test_a_success_that_comes_late_wakes_nobody(status: Status) -> None:
    """It clears what was held against the key and leaves the status to those who set it."""
    health = replace(Health(status, StatusReason.PAUSED_BY_USER), strikes=2, strike_run="a", suspect_since=NOW)
    assert alive(health, CALM) == Health(status, StatusReason.PAUSED_BY_USER)


def test_a_revived_key_recovers() -> None:
    """A disconnected connector whose probe is answered goes to what its access rows say."""
    dead = Health(*DEAD)
    assert alive(dead, CALM) == CONNECTED
    assert alive(dead, SCOPE) == Health(*SCOPE)
    assert alive(dead, (Status.PENDING, None, Action.NONE)) == CONNECTED


def test_a_connector_is_pending_until_every_dataset_answered() -> None:
    """Unless its run is over: then what is known decides."""
    access = GRANTED | {Dataset.GROUPS: AccessRow(Dataset.GROUPS)}
    assert derive(access, removals_held=False, final=False)[0] is Status.PENDING
    assert derive(access, removals_held=False, final=True) == CALM
    assert alive(Health(Status.PENDING), derive(access, removals_held=False, final=False)).status is Status.PENDING


@pytest.mark.parametrize("status", [CALM, SCOPE, ROLE])
def test_a_settled_connector_never_goes_back_to_pending(status: tuple[Status, StatusReason, Action]) -> None:
    """A dataset that nobody asked yet, such as after an upgrade, makes no settled connector pending."""
    assert alive(Health(*status), (Status.PENDING, None, Action.NONE)) == CONNECTED


def test_the_worst_reason_is_told() -> None:
    """Of several refusals the one that the owner can mend soonest stands on the screen."""
    order = [SCOPE, PLAN, ROLE, QUOTA]
    access = dict(GRANTED)
    for dataset, status in zip(Dataset, order[::-1], strict=False):
        access[dataset] = AccessRow(dataset, Access.DENIED, status[1])
        assert derive(access, removals_held=True, final=False) == status


def test_held_removals_are_told_when_nothing_is_worse() -> None:
    """They degrade, and offer the release."""
    told = (Status.DEGRADED, StatusReason.REMOVALS_HELD, Action.RELEASE_REMOVALS)
    assert derive(GRANTED, removals_held=True, final=False) == told


def test_a_success_grants_again() -> None:
    """An added permission shows with the next answer."""
    row = AccessRow(Dataset.MEMBERS, Access.DENIED, StatusReason.SCOPE_MISSING, "workspace_members_read")
    assert access_after(row, OK_VERDICT, now=NOW) == GRANTED[Dataset.MEMBERS]


@pytest.mark.parametrize("finding", sorted(DOUBTS | {Finding.TRANSIENT, Finding.EDGE, Finding.BUG, Finding.SCHEMA}))
def test_what_says_nothing_of_access_leaves_it(finding: Finding) -> None:
    """Outages, our own faults and doubts about the key are no word on a dataset."""
    assert access_after(GRANTED[Dataset.GROUPS], Verdict(finding, "why", ""), now=NOW) == GRANTED[Dataset.GROUPS]


def test_a_passing_fault_is_tried_so_often() -> None:
    """It waits, and fails with the last attempt; nobody but the provider is to blame."""
    verdict = verdict_of("503_maintenance")
    statuses = [part_after(verdict, attempts=n, most=4, backoff_s=1.0).status for n in range(1, 5)]
    assert statuses == [PartStatus.WAITING] * 3 + [PartStatus.FAILED]
    assert part_after(verdict, attempts=4, most=4, backoff_s=1.0).error_class == "TryLater"


def test_an_unreadable_success_is_tried_once_more() -> None:
    """Cut off once is a passing fault, twice an unknown shape."""
    verdict = verdict_of("200_truncated")
    assert part_after(verdict, attempts=1, most=8, backoff_s=1.0).status is PartStatus.WAITING
    outcome = part_after(verdict, attempts=2, most=8, backoff_s=1.0)
    assert (outcome.status, outcome.error_class) == (PartStatus.FAILED, "ContractBroken")


@pytest.mark.parametrize(("asked_s", "waited_s"), [(None, 3.0), (1.0, 3.0), (20.0, 20.0)])
def test_a_wait_that_is_asked_for_is_kept(asked_s: float | None, waited_s: float) -> None:
    """The provider's Retry-After is the least wait."""
    verdict = Verdict(Finding.TRANSIENT, "rate_limited", "", retry_after_s=asked_s)
    assert part_after(verdict, attempts=1, most=8, backoff_s=3.0).wait_s == waited_s


@given(FINDINGS, st.integers(1, 10))
def test_every_part_ends(verdict: Verdict, attempts: int) -> None:
    """With its last attempt, whatever the answer says."""
    outcome = part_after(verdict, attempts=attempts, most=attempts, backoff_s=1.0)
    assert outcome.status in {PartStatus.SUCCEEDED, PartStatus.FAILED, PartStatus.SKIPPED}
    assert (outcome.status is PartStatus.SUCCEEDED) == verdict.ok
