"""Settings: every name an operator may set, its unit, its default and its bounds.

`load` is the one reader of the environment; a `Settings(...)` built by hand reads nothing but its arguments.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self, TypeAlias, get_args
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from worker.errors import Misconfigured

PREFIX: Final = "ROLLCALL_"
DEV_PREFIX: Final = "ROLLCALL_DEV_"
"""Names below it belong to test and development tools and are not looked at here."""

LogFormat: TypeAlias = Literal["auto", "json", "console"]
LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

_HOST: Final = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_POSTGRES: Final = ("postgresql", "postgres")
_REDIS: Final = ("redis", "rediss")
_AMQP: Final = ("amqp", "amqps")


def _url(*schemes: str) -> AfterValidator:
    def check(secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        try:
            parts = urlsplit(secret.get_secret_value())
            if not {",", ";"} & set(parts.netloc):  # libpq and kombu take several hosts, urllib one
                _ = parts.port
        except ValueError:
            # `from None`: urllib's own text may quote a piece of the password.
            raise ValueError("is not a URL; percent-encode special characters in the password") from None
        if parts.scheme not in schemes:
            raise ValueError("must start with " + " or ".join(f"{scheme}://" for scheme in schemes))
        return secret

    return AfterValidator(check)


def _hosts(value: object) -> object:
    if not isinstance(value, str):
        return value
    hosts = [host.strip().lower() for host in value.split(",") if host.strip()]
    if not all(_HOST.fullmatch(host) for host in hosts):
        raise ValueError("must be host or host:port, separated by commas, without scheme or path")
    return frozenset(hosts)


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Hosts = Annotated[frozenset[str], NoDecode, BeforeValidator(_hosts)]
Wait = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
DatabaseUrl = Annotated[SecretStr | None, _url(*_POSTGRES)]
RedisUrl = Annotated[SecretStr | None, _url(*_REDIS)]
BrokerUrl = Annotated[SecretStr | None, _url(*_REDIS, *_AMQP)]


class Settings(BaseSettings):
    """What one process needs to know. Names ending in `_s` are seconds, in `_days` days of 24 hours."""

    model_config = SettingsConfigDict(
        alias_generator=lambda field_name: PREFIX + field_name.upper(),
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    database_url: DatabaseUrl = Field(
        None, alias="DATABASE_URL", description="Postgres, as postgresql://user:password@host:port/database"
    )
    redis_url: RedisUrl = Field(
        None, alias="REDIS_URL", description="Redis or Valkey: streams and snapshots; rediss:// for TLS"
    )
    celery_broker_url: BrokerUrl = Field(
        None, alias="CELERY_BROKER_URL", description="Celery's broker, redis:// or amqp://; default REDIS_URL"
    )
    vault_keys: SecretStr | None = Field(
        None, description="master keys id:base64key[,id:base64key...]; the first seals, all open"
    )

    api_hosts: Hosts = Field(
        frozenset(),
        description="hosts a connector's base URL may name beside the provider's: host[:port], by commas",
    )
    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("rollcall"),
        description="where `rollcall up` keeps its own servers' data; default the user's data directory",
    )
    log_format: LogFormat = Field("auto", description="auto: console on a terminal, else json")
    log_level: Annotated[LogLevel, BeforeValidator(_upper)] = Field("INFO", description="least level written")
    metrics_host: str = Field("127.0.0.1", description="address the metrics are served on")
    metrics_port: Port | None = Field(None, description="port the metrics are served on; empty: not served")

    poll_interval_s: Count = Field(900, description="seconds between two polls of a connector")
    reconcile_interval_s: Count = Field(86_400, description="seconds between two syncs diffed against Postgres")
    reprobe_interval_s: Count = Field(3600, description="seconds between two tries of a dead key; slows to daily")
    usage_lookback_days: Count = Field(3, description="latest UTC days of usage that each poll asks for")
    backfill_days: Count = Field(90, description="days of usage that the first sync asks for")
    window_days: Annotated[int, Field(ge=1, le=30)] = Field(30, description="most UTC days in one usage request")
    part_days: Count = Field(90, description="most UTC days of usage in one part of a run; fewer if they hold much")

    in_flight: Annotated[int, Field(ge=1, le=2)] = Field(2, description="requests in flight per connector")
    worker_slots: Annotated[int, Field(ge=2, le=48)] = Field(
        16, description="threads of one worker process, at most 48; backfills fill at most half"
    )
    fetch_timeout_s: Wait = Field(30, description="seconds until one request to the provider is given up")
    part_lease_s: Wait = Field(120, description="seconds after which an unsettled part is sent again")
    part_attempts: Count = Field(8, description="tries of a part before it fails")
    dispatch_interval_s: Wait = Field(5, description="seconds between two looks for due connectors")
    dispatch_batch: Count = Field(500, description="most connectors claimed in one look")

    partitions: Annotated[int, Field(ge=1, le=256)] = Field(
        4, description="event streams; read at the very first start only, then fixed in Postgres"
    )
    stream_ceiling_entries: Count = Field(
        50_000, description="most entries of one partition (an entry: up to 500 events of about 250 bytes)"
    )
    event_retention_s: Count = Field(604_800, description="seconds that events stay for slow subscribers")
    writer_turn_s: Wait = Field(1.0, description="seconds a writer holds a partition before it lets others")
    writer_batch_entries: Count = Field(200, description="most stream entries read at once")
    db_pool_size: Count = Field(
        4, description="most Postgres connections of one process; each plans its statements by itself"
    )
    shutdown_grace_s: Wait = Field(20, description="seconds work may take to finish after a stop signal")

    hold_records: Annotated[int, Field(ge=0)] = Field(
        10, description="removals are held if more records than this and more than the share go missing"
    )
    hold_share: Share = Field(0.2, description="share of a listing, 0 to 1; see ROLLCALL_HOLD_RECORDS")
    hold_runs: Count = Field(3, description="a held record is removed when missing in so many runs in a row")
    run_retention_days: Count = Field(14, description="days finished runs are kept")
    people_retention_days: Count = Field(30, description="days removed people's names are kept")

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the sources not wanted are not named
        cls, _settings: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_others: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Believe the arguments only; `load` brings the environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _lease_outlives_request(self) -> Self:
        if self.part_lease_s <= self.fetch_timeout_s:
            raise ValueError("ROLLCALL_PART_LEASE_S: must be above ROLLCALL_FETCH_TIMEOUT_S")
        return self

    def require_database(self) -> SecretStr:
        """Return DATABASE_URL, or raise Misconfigured."""
        return _required("DATABASE_URL", self.database_url)

    def require_redis(self) -> SecretStr:
        """Return REDIS_URL, or raise Misconfigured."""
        return _required("REDIS_URL", self.redis_url)

    def require_broker(self) -> SecretStr:
        """Return CELERY_BROKER_URL, else REDIS_URL, or raise Misconfigured."""
        return self.celery_broker_url or self.require_redis()

    def require_vault_keys(self) -> SecretStr:
        """Return ROLLCALL_VAULT_KEYS, or raise Misconfigured."""
        return _required("ROLLCALL_VAULT_KEYS", self.vault_keys)


def _required(name: str, value: SecretStr | None) -> SecretStr:
    if value is None:
        raise Misconfigured(
            "setting_missing",
            f"{name} is not set: set {name}, or run `rollcall up` which brings its own servers",
        )
    return value


class Setting(NamedTuple):
    """One line of the listing: `default` as it is written in an environment, empty for none."""

    name: str
    default: str
    description: str
    secret: bool


def _written(value: object) -> str:
    if value is None or value is PydanticUndefined:
        return ""
    return ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def catalogue() -> tuple[Setting, ...]:
    """List every setting in the order of declaration; loading all the defaults equals loading nothing."""
    return tuple(
        Setting(
            name=field.alias or "",
            default=_written(field.default),  # a factory is not asked: no machine's path in a listing
            description=field.description or "",
            secret=SecretStr in get_args(field.annotation),
        )
        for field in Settings.model_fields.values()
    )


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environ`, by default the process's own environment.

    An empty value counts as not set. A secret may stand in a file that `<NAME>_FILE` names instead.

    Raises:
        Misconfigured: with one line per problem; no line shows a value.

    """
    environ = os.environ if environ is None else environ
    given = {name: text.strip() for name, text in environ.items() if text.strip()}
    secrets = [setting.name for setting in catalogue() if setting.secret]
    known = {setting.name for setting in catalogue()} | {_file(name) for name in secrets}
    problems = _unknown_names(given, known)
    for name in secrets:
        try:
            given |= _from_file(name, given)
        except ValueError as error:
            problems.append(str(error))
    source = EnvSettingsSource(Settings)
    source.env_vars = given
    try:
        loaded = Settings(**source())
    except ValidationError as error:
        problems += _lines(error)
    if problems:
        raise Misconfigured("settings_invalid", "\n".join(problems))
    return loaded


def _unknown_names(given: Mapping[str, str], known: set[str]) -> list[str]:
    problems = []
    for name in sorted(given):
        if not name.upper().startswith(PREFIX) or name.startswith(DEV_PREFIX) or name in known:
            continue
        # Compared without the prefix, which would make everything look alike.
        ours = [other.removeprefix(PREFIX) for other in known if other.startswith(PREFIX)]
        near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), ours, n=1)
        problems.append(f"{name}: unknown setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else ""))
    return problems


def _file(name: str) -> str:
    return f"{name}_FILE"


def _from_file(name: str, given: Mapping[str, str]) -> dict[str, str]:
    if _file(name) not in given:
        return {}
    if name in given:
        raise ValueError(f"{name}: also set by {_file(name)}; keep one of the two")
    # The path is not shown: whoever confuses the two names has put the secret itself there.
    try:
        text = Path(given[_file(name)]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"{_file(name)}: the file cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{_file(name)}: the file is not text in UTF-8") from None
    if not text:
        raise ValueError(f"{_file(name)}: the file is empty")
    return {name: text}


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        message = problem["msg"].removeprefix("Value error, ")
        # A rule over several settings has no place of its own; its message names them.
        lines.append(f"{problem['loc'][0]}: {message[0].lower()}{message[1:]}" if problem["loc"] else message)
    return lines
