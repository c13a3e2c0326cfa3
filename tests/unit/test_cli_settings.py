"""Where a command's settings come from, and how they reach the processes it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from worker.cli.finding import find_settings, settings_beside
from worker.cli.running import RunningStack, environment
from worker.cli.supervisor import LONGEST_PAUSE_S, restart_pause_s
from worker.errors import Misconfigured
from worker.settings import Settings, load
from worker.vault import Vault

STACK = {
    "pid": 1,
    "database_url": "postgresql://rollcall:pw@127.0.0.1:20001/rollcall",
    "redis_url": "redis://:pw@127.0.0.1:20002/0",
    "vault_keys": "k1:AAAA",
    "api_hosts": ["127.0.0.1:20003"],
}


def test_a_running_stack_completes_the_environment() -> None:
    """What the stack tells of itself fills what the environment leaves open, its API hosts are added."""
    found = settings_beside({"ROLLCALL_API_HOSTS": "127.0.0.1:9"}, STACK)
    assert found.require_database().get_secret_value() == STACK["database_url"]
    assert found.require_redis().get_secret_value() == STACK["redis_url"]
    assert found.require_vault_keys().get_secret_value() == "k1:AAAA"
    assert found.api_hosts == {"127.0.0.1:9", "127.0.0.1:20003"}


def test_the_environment_outranks_the_stack(tmp_path: Path) -> None:
    """A setting of the environment stays, also when it stands in a file."""
    keys = tmp_path / "keys"
    keys.write_text("mine:BBBB", encoding="utf-8")
    found = settings_beside({"ROLLCALL_VAULT_KEYS_FILE": str(keys)}, STACK)
    assert found.require_vault_keys().get_secret_value() == "mine:BBBB"


def test_without_servers_the_message_says_what_to_do(tmp_path: Path) -> None:
    """Neither URLs nor a running stack is a matter of configuration, told in one line."""
    with pytest.raises(Misconfigured, match="rollcall up") as caught:
        find_settings({"ROLLCALL_DATA_DIR": str(tmp_path / "none")})
    assert "\n" not in str(caught.value)


def test_one_url_alone_is_not_completed(tmp_path: Path) -> None:
    """With only one of the two URLs set, the other is never taken from somewhere else."""
    found = find_settings({"DATABASE_URL": "postgresql://127.0.0.1/x", "ROLLCALL_DATA_DIR": str(tmp_path)})
    assert found.redis_url is None
    for settings in (
        Settings(data_dir=tmp_path, database_url=SecretStr("postgresql://127.0.0.1/x")),
        Settings(data_dir=tmp_path, redis_url=SecretStr("redis://127.0.0.1")),
    ):
        with pytest.raises(Misconfigured, match="_URL is not set"):
            RunningStack(settings, say=print).start()


def test_a_child_gets_exactly_these_settings() -> None:
    """A child's environment loads to the same settings, whatever ours was set to; the rest is passed on."""
    settings = Settings(
        database_url=SecretStr("postgresql://u:p@127.0.0.1/x"),
        redis_url=SecretStr("redis://:p@127.0.0.1/0"),
        vault_keys=SecretStr(Vault.generate_key("k1")),
        api_hosts=frozenset({"127.0.0.1:1", "127.0.0.1:2"}),
        poll_interval_s=7,
        hold_share=0.5,
    )
    ours = {"ROLLCALL_POLL_INTERVAL_S": "1", "REDIS_URL_FILE": "/nowhere", "HOME": "/h", "ROLLCALL_METRICS_PORT": "9"}
    child = environment(settings, ours)
    assert load(child) == settings
    assert child["HOME"] == "/h"


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_restart_waits_longer_each_time_and_never_too_long(deaths: int, draw: float) -> None:
    """The pause before a restart is bounded, and its bound never shrinks with the number of deaths."""
    assert 0 <= restart_pause_s(deaths, draw) <= LONGEST_PAUSE_S
    assert restart_pause_s(deaths, draw) <= restart_pause_s(deaths + 1, draw)
