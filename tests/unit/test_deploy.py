"""What is shipped to run Rollcall agrees with the settings, the metrics and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from pydantic import SecretStr

from deploy.env_example import FILE, render
from worker import metrics
from worker.settings import Settings, catalogue, load
from worker.vault import Vault

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROCESSES = {"migrate", "beat", "worker", "writer"}
SECRETS = {setting.name for setting in catalogue() if setting.secret}
KNOWN = {setting.name for setting in catalogue()} | {f"{name}_FILE" for name in SECRETS}
CLOSING_S = 15
"""What a worker may need beyond ROLLCALL_SHUTDOWN_GRACE_S: its connections and its loop are closed after it."""


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compose() -> Any:
    return read_yaml("compose.yaml")


def pods() -> Iterator[tuple[str, Any]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        document = read_yaml(f"kubernetes/{path.name}")
        if document["kind"] in {"Deployment", "Job"}:
            yield path.stem, document["spec"]["template"]["spec"]


PODS = dict(pods())


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_the_example_environment_lists_every_setting() -> None:
    """`env.example` is what the settings make it: when it drifts, run `python -m deploy.env_example`."""
    assert FILE.read_text(encoding="utf-8") == render()


def test_the_example_environment_changes_nothing() -> None:
    """Used as it is, with every comment taken off, it gives the defaults."""
    lines = [line.lstrip("#") for line in render().splitlines() if re.match(r"#?[A-Z_]+=", line)]
    assert load(dict(line.split("=", 1) for line in lines)) == load({})


def test_processes_are_the_same_everywhere(compose: Any) -> None:
    """Procfile, compose file and manifests run the same four commands."""
    procfile = dict(line.split(": ") for line in (ROOT / "Procfile").read_text().splitlines())
    assert procfile == {"release": "rollcall migrate"} | {name: f"rollcall {name}" for name in PROCESSES - {"migrate"}}
    ours = {name: service for name, service in compose["services"].items() if service["image"] == "rollcall"}
    assert {name: service["command"] for name, service in ours.items()} == {name: [name] for name in PROCESSES}
    assert {name: pod["containers"][0]["args"] for name, pod in PODS.items()} == {name: [name] for name in PROCESSES}


def test_environments_hold_known_settings_only(compose: Any) -> None:
    """An unknown ROLLCALL_* name stops the start, so none is shipped; values are valid; secrets come from files."""
    config = read_yaml("kubernetes/config.yaml")["data"]
    given: list[Mapping[str, str]] = [config]
    given += [service["environment"] for service in compose["services"].values() if service["image"] == "rollcall"]
    given += [
        {item["name"]: item["value"] for item in container["env"]}
        for pod in PODS.values()
        for container in pod["containers"]
    ]
    for environment in given:
        assert environment.keys() <= KNOWN
        assert not environment.keys() & SECRETS
        load({name: value for name, value in environment.items() if not name.endswith("_FILE")})


def test_secrets_are_mounted_where_they_are_read(compose: Any) -> None:
    """Each *_FILE of a process names a secret that this very process is given, and none is given in vain."""
    for service in compose["services"].values():
        files = {value for name, value in service.get("environment", {}).items() if name.endswith("_FILE")}
        assert files <= {f"/run/secrets/{name}" for name in service["secrets"]}
        assert service["image"] != "rollcall" or len(files) == len(service["secrets"])
        assert set(service["secrets"]) <= compose["secrets"].keys()


@pytest.mark.parametrize("name", PODS)
def test_pods_mount_their_secrets(name: str) -> None:
    """Each *_FILE of a pod is a mounted key of the one Secret, and nothing else is mounted."""
    pod = PODS[name]
    container = pod["containers"][0]
    files = {item["value"] for item in container["env"] if item["name"].endswith("_FILE")}
    mount = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "secrets")
    volume = next(v["secret"] for v in pod["volumes"] if v["name"] == "secrets")
    assert files == {f"{mount}/{item['path']}" for item in volume["items"]}
    assert {item["key"] for item in volume["items"]} <= read_yaml("kubernetes/secret.example.yaml")["stringData"].keys()


@pytest.mark.parametrize("name", PODS)
def test_pods_are_closed(name: str) -> None:
    """No pod gets a Service's variables, an account's token, root, or more time to end than it is given."""
    pod = PODS[name]
    config = read_yaml("kubernetes/config.yaml")["data"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["terminationGracePeriodSeconds"] >= float(config["ROLLCALL_SHUTDOWN_GRACE_S"]) + CLOSING_S


def test_manifests_name_no_namespace_and_are_all_applied() -> None:
    """Manifests go to the namespace of whoever applies them, and the list of them leaves out the example only."""
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    for path in files:
        assert "namespace" not in read_yaml(f"kubernetes/{path}").get("metadata", {})
    assert set(read_yaml("kubernetes/kustomization.yaml")["resources"]) == files - {
        "kustomization.yaml",
        "secret.example.yaml",
    }


def test_containers_have_time_to_end(compose: Any) -> None:
    """A container is given longer to end than its process takes."""
    grace_s = Settings().shutdown_grace_s + CLOSING_S
    for service in compose["services"].values():
        assert seconds(service["stop_grace_period"]) >= grace_s


def test_redis_never_evicts_and_keeps_what_it_took(compose: Any) -> None:
    """The compose file's Valkey runs as the streams need it."""
    command = " ".join(compose["services"]["valkey"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command


def test_servers_are_checked_before_processes_start(compose: Any) -> None:
    """Every process waits for the migration, the migration for Postgres, and both servers have a health check."""
    services = compose["services"]
    assert {name for name, service in services.items() if "healthcheck" in service} == {"postgres", "valkey"}
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in PROCESSES - {"migrate"}:
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert services["worker"]["deploy"]["replicas"] == services["writer"]["deploy"]["replicas"] == 2


def test_made_secrets_are_accepted_and_made_once(tmp_path: Path) -> None:
    """What `make-secrets` writes are settings that load, in a folder closed to others, and never overwritten."""
    folder = tmp_path / "se crets"
    command = ["/bin/sh", str(DEPLOY / "make-secrets"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    names = {"DATABASE_URL": "database_url", "REDIS_URL": "redis_url", "ROLLCALL_VAULT_KEYS": "vault_keys"}
    settings = load({f"{name}_FILE": str(folder / file) for name, file in names.items()})
    vault = Vault(settings.require_vault_keys())
    sealed = vault.seal(SecretStr("key"), tenant_id="t", connector_id="c")
    assert vault.open(sealed, tenant_id="t", connector_id="c").get_secret_value() == "key"
    password = (folder / "postgres_password").read_text().strip()
    assert password in settings.require_database().get_secret_value()
    assert (folder / "valkey_conf").read_text().split()[1] in settings.require_redis().get_secret_value()
    assert folder.stat().st_mode & 0o077 == 0
    before = {file.name: file.read_text() for file in folder.iterdir()}
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    assert {file.name: file.read_text() for file in folder.iterdir()} == before


def test_the_image_holds_the_product_only() -> None:
    """The image is built from the product's folders and runs as nobody in particular."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = {word.removeprefix("./") for line in lines if line.startswith("COPY ") for word in line.split()[1:]}
    assert {"schemas", "tasks", "worker"} <= copied
    assert not copied & {"tests", "deploy", "."}
    assert "USER 10001:10001" in lines
    allowed = {line.removeprefix("!") for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split()}
    assert {"pyproject.toml", "README.md", "LICENSE", "schemas", "tasks", "worker"} <= allowed


def samples() -> dict[str, set[str]]:
    """Give the labels of each time series that our metrics write."""
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            name, labels = next(iter(metric.describe())).name, set(metric._labelnames)
            if isinstance(metric, Histogram):
                found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
            else:
                found[f"{name}_total" if isinstance(metric, Counter) else name] = labels
    return found


def expressions() -> Iterator[str]:
    dashboard = json.loads((DEPLOY / "grafana/rollcall.json").read_text(encoding="utf-8"))
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for group in read_yaml("prometheus/rules.yaml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_dashboards_and_alerts_name_what_exists(expression: str) -> None:
    """Every metric and label of a panel or an alert is one that we write."""
    known = samples()
    used = re.findall(r"\b(rollcall_\w+)(?:\{([^}]*)\})?", expression)
    assert used
    for name, matchers in used:
        assert name in known
        assert set(re.findall(r"(\w+)=", matchers)) <= known[name]
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
    assert grouped <= {"instance"}.union(*(known[name] for name, _ in used))
    assert expression.count("(") == expression.count(")")


def test_alerts_say_what_to_do() -> None:
    """Every alert has a severity, a summary and a description; panels have numbers of their own."""
    rules = [rule for group in read_yaml("prometheus/rules.yaml")["groups"] for rule in group["rules"]]
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
    assert len({rule["alert"] for rule in rules}) == len(rules)
    panels = json.loads((DEPLOY / "grafana/rollcall.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_licence_is_whole() -> None:
    """LICENSE is the Apache License 2.0 that the package says it is."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_scripts_can_be_run() -> None:
    """What is started by its name is executable."""
    assert all(os.access(ROOT / script, os.X_OK) for script in (".ci/run", "deploy/make-secrets"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a space in its path and nothing but the Makefile and the project file."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    environment = {"PATH": os.environ["PATH"]}  # a make around this test would hand down its variables
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)


def test_every_target_is_listed_and_knows_its_options(elsewhere: Path) -> None:
    """`make` lists the targets, each can be planned in a path with spaces, and options reach the commands."""
    listed = {line.split()[0] for line in make(elsewhere).stdout.splitlines()}
    assert listed == {"help", "demo", "test", "lint", "bench", "chaos", "publish", "clean"}
    for target in listed:
        assert make(elsewhere, "--dry-run", target, "VENV=an other/venv").returncode == 0
    assert make(elsewhere, "--dry-run", "demo", "KEEP=1").stdout.endswith('".venv/bin"/rollcall demo --keep\n')
    assert make(elsewhere, "--dry-run", "bench", "CASE=sync").stdout.endswith("-m tests.bench sync\n")
    checked = make(elsewhere, "--dry-run", "bench", "CASE=sync", "CHECK=1").stdout
    assert checked.endswith("-m tests.bench --check sync\n")
    chaos = make(elsewhere, "--dry-run", "chaos", "SEED=7", "DURATION=60").stdout
    assert chaos.endswith('-m tests.system.chaos --seed "7" --duration "60"\n')


def test_without_a_fit_python_make_says_what_to_do(elsewhere: Path) -> None:
    """When no candidate is a Python of 3.11 or newer, nothing is made and the message names what is needed."""
    old = elsewhere / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(elsewhere, "demo", "PYTHONS=no-such-python ./old-python")
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr
    assert not (elsewhere / ".venv").exists()


def test_what_is_installed_is_not_installed_again(elsewhere: Path) -> None:
    """A stamp of this project file and this folder makes a second run quick; of another one it counts for nothing."""
    (elsewhere / ".venv/bin").mkdir(parents=True)
    (elsewhere / ".venv/bin/python").symlink_to("/bin/true")
    (elsewhere / ".venv/bin/rollcall").symlink_to("/bin/true")
    cksum = subprocess.run(["/bin/sh", "-c", "cksum < pyproject.toml"], cwd=elsewhere, capture_output=True, check=True)
    stamp = elsewhere / ".venv/.rollcall-base"
    stamp.write_text(f"{cksum.stdout.decode().strip()} {elsewhere}\n")
    assert make(elsewhere, "demo", "PYTHONS=no-such-python").returncode == 0
    stamp.write_text(f"{cksum.stdout.decode().strip()} /elsewhere\n")
    assert make(elsewhere, "demo", "PYTHONS=no-such-python").returncode != 0
