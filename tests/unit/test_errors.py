"""Errors travel between processes whole."""

from __future__ import annotations

import pickle

import pytest

from worker.errors import ContractBroken, Misconfigured, OwnerMustAct, Refused, RollcallError, TryLater
from worker.vault import TamperedEnvelope, UnknownVaultKey

ERRORS = [
    RollcallError("base"),
    TryLater("rate_limited", "wait", retry_after_s=2.5),
    TryLater("outage"),
    OwnerMustAct("key_invalid", "reconnect", action="reconnect"),
    ContractBroken("unknown_shape", "members is no list"),
    Refused("key_in_use", "pause the other connector first"),
    Misconfigured("setting_missing", "set REDIS_URL"),
    UnknownVaultKey("old", "older"),
    TamperedEnvelope(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_pickle_keeps_everything(error: RollcallError) -> None:
    """An error comes out of pickle with its type, text, reason, action and own fields."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert copy.args == error.args


def test_a_subclass_with_its_own_arguments_pickles() -> None:
    """A subclass may take whatever arguments it likes and is still picklable."""
    copy = pickle.loads(pickle.dumps(UnknownVaultKey("old")))  # noqa: S301 - our own bytes
    assert copy.key_ids == ("old",)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_reason_is_a_label(error: RollcallError) -> None:
    """A reason is one short snake_case word, fit for a metric label."""
    assert error.reason.replace("_", "").isalnum()
    assert error.reason == error.reason.lower()


def test_a_missing_message_is_the_reason() -> None:
    """An error without a message still says something: its reason."""
    assert str(TryLater("outage")) == "outage"
    assert TryLater("outage").message == "outage"


def test_the_answer_decides_who_catches() -> None:
    """No answer is a kind of another: catching one never swallows a second."""
    answers = (TryLater, OwnerMustAct, ContractBroken, Refused, Misconfigured)
    for one in answers:
        assert one.__bases__ == (RollcallError,)
