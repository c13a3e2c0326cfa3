"""Finding: the settings of a command, from the environment or from the stack that `rollcall up` runs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from worker import logs
from worker.dev.stack import find_running
from worker.errors import Misconfigured
from worker.settings import PREFIX, Settings, load

_OF_STACK = {"DATABASE_URL": "database_url", "REDIS_URL": "redis_url", f"{PREFIX}VAULT_KEYS": "vault_keys"}


def find_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; without DATABASE_URL and REDIS_URL, add those of the stack running on the data folder.

    Raises:
        Misconfigured: a setting is wrong, or there is neither.

    """
    environ = os.environ if environ is None else environ
    settings = load(environ)
    if settings.database_url is not None or settings.redis_url is not None:
        return settings
    try:
        running = find_running(settings.data_dir)
    except OSError:  # somebody else's folder: their stack is not for us
        running = None
    if running is None:
        raise Misconfigured(
            "no_servers",
            "No servers: set DATABASE_URL and REDIS_URL, or run `rollcall up` in another terminal",
        )
    return settings_beside(environ, running)


def settings_beside(environ: Mapping[str, str], running: Mapping[str, object]) -> Settings:
    """Read the settings, completed by what a stack tells of itself; what the environment sets stays."""
    merged = dict(environ)
    for name, word in _OF_STACK.items():
        if word in running and not environ.get(name) and not environ.get(f"{name}_FILE"):
            merged[name] = str(running[word])
    hosts = running.get("api_hosts")
    if isinstance(hosts, list):
        merged[f"{PREFIX}API_HOSTS"] = ",".join(filter(None, [environ.get(f"{PREFIX}API_HOSTS", ""), *map(str, hosts)]))
    return load(merged)


def command_settings() -> Settings:
    """Find the settings of a command that ends soon; only errors are logged, as its output is the result."""
    settings = find_settings()
    logs.configure(settings.log_format, "ERROR", process="cli")
    return settings


def process_settings(process: str) -> Settings:
    """Find the settings of a process that runs for long, and set up its logs."""
    settings = find_settings()
    logs.configure(settings.log_format, settings.log_level, process=process)
    return settings
