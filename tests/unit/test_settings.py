"""Settings: what is accepted, what is refused, and that refusals tell no secret."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Misconfigured
from worker.settings import Settings, catalogue, load

CANARY = "c4n4ry-pa55"
SECRETS = ["DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "ROLLCALL_VAULT_KEYS"]
URLS = {
    "DATABASE_URL": "postgresql://u:p@127.0.0.1/rollcall",
    "REDIS_URL": "redis://:p@127.0.0.1:6379/0",
    "CELERY_BROKER_URL": "amqp://u:p@127.0.0.1//",
    "ROLLCALL_VAULT_KEYS": "main:AAAA",
}


def problems(**environ: str) -> list[str]:
    with pytest.raises(Misconfigured) as caught:
        load(environ)
    return str(caught.value).splitlines()


def test_nothing_set_gives_the_defaults() -> None:
    """An empty environment is valid and gives the documented defaults."""
    settings = load({})
    assert settings.database_url is None
    assert (settings.poll_interval_s, settings.window_days, settings.in_flight) == (900, 30, 2)
    assert (settings.hold_records, settings.hold_share, settings.hold_runs) == (10, 0.2, 3)
    assert settings.api_hosts == frozenset()


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping `load` reads the process's environment, but a hand-built Settings never does."""
    monkeypatch.setenv("ROLLCALL_POLL_INTERVAL_S", "60")
    assert load().poll_interval_s == 60
    assert Settings().poll_interval_s == 900
    assert Settings(poll_interval_s=7).poll_interval_s == 7


def test_the_catalogue_loads_to_the_defaults() -> None:
    """An environment file written from the catalogue changes nothing and holds no machine's path."""
    written = {setting.name: setting.default for setting in catalogue()}
    assert load(written) == load({})
    assert not any(str(Path.home()) in default for default in written.values())


def test_every_setting_is_described() -> None:
    """Each setting has a name of our two kinds, a description, and only the four secrets are secret."""
    for setting in catalogue():
        assert setting.name.startswith("ROLLCALL_") or setting.name in SECRETS
        assert setting.description
        unit = re.search(r"_(S|DAYS)$", setting.name)
        assert not unit or {"S": "second", "DAYS": "day"}[unit[1]] in setting.description
    assert [setting.name for setting in catalogue() if setting.secret] == SECRETS


def test_empty_means_not_set() -> None:
    """An empty or blank value counts as not set, as compose files write it."""
    settings = load({"ROLLCALL_METRICS_PORT": "", "DATABASE_URL": " ", "ROLLCALL_IN_FLIGHT": ""})
    assert (settings.metrics_port, settings.database_url, settings.in_flight) == (None, None, 2)


def test_values_are_read() -> None:
    """Lists, levels and numbers are read from text, blanks around them ignored."""
    settings = load(
        {
            "ROLLCALL_API_HOSTS": "127.0.0.1:8080, API.Example.org,[::1]",
            "ROLLCALL_LOG_LEVEL": "debug",
            "ROLLCALL_WRITER_TURN_S": " 0.5 ",
            "ROLLCALL_METRICS_PORT": "9102",
        }
    )
    assert settings.api_hosts == {"127.0.0.1:8080", "api.example.org", "[::1]"}
    assert (settings.log_level, settings.writer_turn_s, settings.metrics_port) == ("DEBUG", 0.5, 9102)


def test_an_unknown_name_is_an_error_with_a_guess() -> None:
    """A misspelt ROLLCALL_* name stops the start and the likely name is offered."""
    assert problems(ROLLCALL_POL_INTERVAL_S="5") == [
        "ROLLCALL_POL_INTERVAL_S: unknown setting; did you mean ROLLCALL_POLL_INTERVAL_S?"
    ]
    assert problems(ROLLCALL_QQQ="5") == ["ROLLCALL_QQQ: unknown setting"]
    assert problems(rollcall_in_flight="1") == ["rollcall_in_flight: unknown setting; did you mean ROLLCALL_IN_FLIGHT?"]


def test_other_peoples_names_are_left_alone() -> None:
    """Foreign names and ROLLCALL_DEV_* are no concern of ours."""
    load({"PATH": "/bin", "ROLLCALLING": "x", "ROLLCALL_DEV_ANYTHING": "x"})


@pytest.mark.parametrize("name", [setting.name for setting in catalogue() if not setting.secret])
def test_only_secrets_have_files(name: str) -> None:
    """`*_FILE` exists for secrets only; elsewhere it is an unknown name."""
    assert problems(**{f"{name}_FILE": "x"})[0].startswith(f"{name}_FILE: unknown setting")


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_stand_in_a_file(name: str, tmp_path: Path) -> None:
    """`<NAME>_FILE` gives the same as `<NAME>`, without the file's final newline."""
    file = tmp_path / "secret"
    file.write_text(URLS[name] + "\n", encoding="utf-8")
    assert load({f"{name}_FILE": str(file)}) == load({name: URLS[name]})


def test_a_bad_file_is_named_by_its_setting(tmp_path: Path) -> None:
    """A file that is missing, empty, binary or one too many is told by the setting's name only."""
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\xff")
    assert problems(REDIS_URL_FILE=CANARY) == ["REDIS_URL_FILE: the file cannot be read (No such file or directory)"]
    assert problems(REDIS_URL_FILE=str(empty)) == ["REDIS_URL_FILE: the file is empty"]
    assert problems(REDIS_URL_FILE=str(binary)) == ["REDIS_URL_FILE: the file is not text in UTF-8"]
    assert problems(REDIS_URL="redis://h", REDIS_URL_FILE=str(empty)) == [
        "REDIS_URL: also set by REDIS_URL_FILE; keep one of the two"
    ]


def test_every_problem_is_one_line() -> None:
    """All problems are told at once, one line each, each starting with the setting's name."""
    lines = problems(
        ROLLCALL_NEVER_HEARD_OF="1",
        ROLLCALL_IN_FLIGHT="3",
        ROLLCALL_LOG_FORMAT="xml",
        ROLLCALL_WINDOW_DAYS="31",
        ROLLCALL_HOLD_SHARE="1.5",
        ROLLCALL_FETCH_TIMEOUT_S="inf",
        ROLLCALL_API_HOSTS="https://api.example.org/v1",
        ROLLCALL_METRICS_PORT="http",
        DATABASE_URL="mysql://h/x",
    )
    assert sorted(line.partition(":")[0] for line in lines) == [
        "DATABASE_URL",
        "ROLLCALL_API_HOSTS",
        "ROLLCALL_FETCH_TIMEOUT_S",
        "ROLLCALL_HOLD_SHARE",
        "ROLLCALL_IN_FLIGHT",
        "ROLLCALL_LOG_FORMAT",
        "ROLLCALL_METRICS_PORT",
        "ROLLCALL_NEVER_HEARD_OF",
        "ROLLCALL_WINDOW_DAYS",
    ]


def test_a_lease_outlives_a_request() -> None:
    """A part's lease must be longer than a request may take, or healthy work would be sent twice."""
    assert problems(ROLLCALL_PART_LEASE_S="30") == ["ROLLCALL_PART_LEASE_S: must be above ROLLCALL_FETCH_TIMEOUT_S"]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("DATABASE_URL", "postgres://u:p@h/x"),
        ("DATABASE_URL", "postgresql://postgres:@/postgres?host=/run/pg"),
        ("DATABASE_URL", "postgresql://u:p@h1:5432,h2:5432/x"),
        ("REDIS_URL", "rediss://h:6380/1"),
        ("CELERY_BROKER_URL", "amqp://h:5672;amqp://h2:5672"),
        ("CELERY_BROKER_URL", "redis://h"),
    ],
)
def test_urls_our_drivers_take_are_accepted(name: str, url: str) -> None:
    """Both Postgres schemes, sockets, several hosts, TLS and both brokers are accepted as written."""
    settings = load({name: url})
    assert url in {
        secret.get_secret_value()
        for secret in (settings.database_url, settings.redis_url, settings.celery_broker_url)
        if secret
    }


@given(
    name=st.sampled_from([setting.name for setting in catalogue()]),
    template=st.sampled_from(["{}", "x://u:{}@h", "redis://:{}/x@h", "{}:{}", "postgres://u:{}@[h"]),
    as_file=st.booleans(),
)
def test_no_problem_tells_a_value(name: str, template: str, as_file: bool) -> None:
    """Whatever is set to whatever, neither the refusal's traceback nor the settings' repr shows it."""
    environ = {f"{name}_FILE" if as_file else name: template.replace("{}", CANARY)}
    try:
        shown = repr(load(environ)) if name in SECRETS else ""
    except Misconfigured as error:
        shown = "".join(traceback.format_exception(error))
    assert CANARY not in shown


def test_what_is_needed_says_what_to_do() -> None:
    """Asking for an address that is not set raises Misconfigured with the two ways out."""
    settings = load({})
    for ask in (settings.require_database, settings.require_redis, settings.require_broker):
        with pytest.raises(Misconfigured, match=r"is not set: set \w+_URL, or run `rollcall up`"):
            ask()
    with pytest.raises(Misconfigured, match="set ROLLCALL_VAULT_KEYS"):
        settings.require_vault_keys()


def test_what_is_set_is_given() -> None:
    """The accessors return what is set."""
    settings = load(URLS)
    assert settings.require_database().get_secret_value() == URLS["DATABASE_URL"]
    assert settings.require_vault_keys().get_secret_value() == URLS["ROLLCALL_VAULT_KEYS"]
    assert settings.require_broker().get_secret_value() == URLS["CELERY_BROKER_URL"]


def test_the_broker_is_redis_unless_said_otherwise() -> None:
    """CELERY_BROKER_URL falls back to REDIS_URL."""
    assert load({"REDIS_URL": "redis://h"}).require_broker().get_secret_value() == "redis://h"
