"""The control door under /_control: how tests and benchmarks shape the world. Loopback only, no key."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, fields, replace
from ipaddress import ip_address
from typing import Any, Final

import orjson
from aiohttp import web

from worker.dev.simulator.faults import read_fault
from worker.dev.simulator.generate import PRODUCTS, Spec
from worker.dev.simulator.mutations import apply
from worker.dev.simulator.payload import (
    REQUIRED,
    BadPayload,
    Field,
    day,
    flag,
    integer,
    list_of,
    moment,
    number,
    one_of,
    optional,
    read,
    text,
)
from worker.dev.simulator.quirks import Quirks
from worker.dev.simulator.random_changes import apply_random
from worker.dev.simulator.truth import truth
from worker.dev.simulator.world import AccessKey, Workspace, World

SCOPES: Final = Field(optional(list_of(text)), None)
SPEC_FIELDS: Final = {
    "members": Field(integer(1, 1_000_000)),
    "groups": Field(integer(0, 200)),
    "service_accounts": Field(integer(0, 2_000)),
    "keys_per_account": Field(integer(0, 2_000)),
    "history_days": Field(integer(0, 3_650)),
    "products": Field(integer(1, len(PRODUCTS))),
    "usage_rows_per_day": Field(integer(0, 100_000)),
    "mode": Field(one_of("credits", "cost")),
    "cost_since": Field(optional(day)),
    "tier": Field(text),
}
KEY_FIELDS: Final = {"api_key": Field(optional(text), None), "scopes": SCOPES}
QUIRK_FIELDS: Final = {
    "credits_column": Field(one_of("credits_used", "total_usage", "total_charge_count")),
    "units": Field(one_of("credits", "", "null", None)),
    "time_form": Field(one_of("iso", "naive", "epoch_s", "epoch_ms")),
    "gzip": Field(optional(flag)),
    "cost_refusal_status": Field(one_of(400, 403, 409, 422)),
    "scope_form": Field(one_of(401, 403)),
    **{one.name: Field(flag) for one in fields(Quirks) if one.type is bool},
}

Body = Any
Action = Callable[["Control", web.Request, Body], Any]


class Control:
    """Carries out control requests on a world; every method returns the JSON answered."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _workspace(self, request: web.Request) -> Workspace:
        found = self._world.workspaces.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound(text=f"there is no workspace {request.match_info['name']!r}")
        return found

    def _key(self, request: web.Request) -> AccessKey:
        workspace, asked = self._workspace(request), request.match_info["key"]
        found = workspace.keys.get(asked) or self._world.keys.get(asked)
        if found is None or found.workspace is not workspace:
            raise web.HTTPNotFound(text="this workspace has no such access key")
        return found

    def _put(self, name: str, asked: Body) -> dict[str, Any]:
        values = read(asked, {**SPEC_FIELDS, **KEY_FIELDS}, "workspace")
        secret, scopes = values.pop("api_key"), values.pop("scopes")
        spec = Spec(**values)
        if spec.cost_since is not None and spec.mode != "cost":
            raise BadPayload("workspace.cost_since: needs mode cost")
        key = self._world.put_workspace(name, spec, api_key=secret, scopes=scopes)
        return self._world.describe(key)

    def put_workspace(self, request: web.Request, asked: Body) -> Any:
        """Create or replace one workspace."""
        return self._put(request.match_info["name"], {} if asked is None else asked)

    def put_workspaces(self, _: web.Request, asked: Body) -> Any:
        """Create or replace many: a list of `{name, ...}`."""
        made = []
        for item in list_of(lambda item: item)(asked):
            spec = dict(item) if isinstance(item, dict) else {}
            made.append(self._put(text(spec.pop("name", None)), spec))
        return made

    def list_workspaces(self, _: web.Request, __: Body) -> Any:
        """List all workspaces with their access keys."""
        return [
            {
                "name": found.name,
                "workspace_id": found.workspace_id,
                "keys": [
                    {"api_key": key.secret, "key_id": key.key_id, "state": key.state} for key in found.keys.values()
                ],
            }
            for found in self._world.workspaces.values()
        ]

    def delete_workspace(self, request: web.Request, _: Body) -> Any:
        """Forget a workspace; its keys are unknown from now on."""
        self._world.drop_workspace(self._workspace(request).name)
        return {}

    def mint(self, request: web.Request, asked: Body) -> Any:
        """Add an access key."""
        values = read({} if asked is None else asked, KEY_FIELDS, "key")
        key = self._world.mint(self._workspace(request), secret=values["api_key"], scopes=values["scopes"])
        return self._world.describe(key)

    def kill(self, request: web.Request, asked: Body) -> Any:
        """Make an access key stop working."""
        how = {"how": Field(one_of("disabled", "expired", "deleted"), "disabled")}
        key = self._key(request)
        key.state = read({} if asked is None else asked, how, "kill")["how"]
        return {"key_id": key.key_id, "state": key.state}

    def revive(self, request: web.Request, _: Body) -> Any:
        """Make an access key work again."""
        key = self._key(request)
        key.state = "live"
        return {"key_id": key.key_id, "state": key.state}

    def set_scopes(self, request: web.Request, asked: Body) -> Any:
        """Give an access key other scopes; null means all."""
        key = self._key(request)
        scopes = read(asked, {"scopes": Field(SCOPES.check, REQUIRED)}, "key")["scopes"]
        key.scopes = None if scopes is None else frozenset(scopes)
        return {"key_id": key.key_id, "scopes": scopes}

    def mutate(self, request: web.Request, asked: Body) -> Any:
        """Apply a list of operations, all of them or none."""
        workspace = self._workspace(request)
        today = self._world.today()
        draft = workspace.state.draft()
        done: list[dict[str, Any]] = []
        for item in list_of(lambda item: item)([asked] if isinstance(asked, dict) else asked):
            if isinstance(item, dict) and item.get("op") == "random":
                done += apply_random(draft, item, today)
            else:
                done.append(apply(draft, item, today))
        workspace.state = draft
        workspace.generation += 1
        at = self._world.now().isoformat()
        workspace.history += [{"at": at, **item} for item in done]
        return done

    def set_quirks(self, request: web.Request, asked: Body) -> Any:
        """Merge switches into a workspace's quirks."""
        workspace = self._workspace(request)
        workspace.quirks = replace(workspace.quirks, **read(asked, QUIRK_FIELDS, "quirks"))
        workspace.generation += 1
        return asdict(workspace.quirks)

    def set_faults(self, request: web.Request, asked: Body) -> Any:
        """Replace the fault rules of one workspace, or of all where none is named."""
        rules = list_of(read_fault)(asked)
        if "name" in request.match_info:
            self._workspace(request).faults = rules
        else:
            self._world.faults = rules
        return {"rules": len(rules)}

    def set_latency(self, _: web.Request, asked: Body) -> Any:
        """Delay every provider answer."""
        latency_ms = read(asked, {"ms": Field(number(0, 600_000), REQUIRED)}, "latency")["ms"]
        self._world.latency_s = latency_ms / 1000
        return {"ms": latency_ms}

    def set_clock(self, _: web.Request, asked: Body) -> Any:
        """Pin the time, or let it run with null."""
        self._world.pinned = read(asked, {"now": Field(optional(moment), REQUIRED)}, "clock")["now"]
        return {"now": self._world.now().isoformat()}

    def get_truth(self, request: web.Request, _: Body) -> Any:
        """Tell what is true of a workspace, for days from `from` to `to`, both included."""
        bounds = read(dict(request.query), {"from": Field(day, None), "to": Field(day, None)}, "truth")
        return truth(self._world, self._workspace(request), bounds["from"], bounds["to"])

    def stats(self, _: web.Request, __: Body) -> Any:
        """Tell what was asked since the last reset; requests with an unknown key stand under ""."""
        requests: dict[str, dict[str, int]] = {}
        for (name, path), times in self._world.requests.items():
            requests.setdefault(name, {})[path] = times
        found = self._world.workspaces.values()
        return {
            "total": self._world.requests.total(),
            "requests": requests,
            "max_concurrent": {one.name: one.most_in_flight for one in found if one.most_in_flight},
            "statuses": {str(status): times for status, times in sorted(self._world.statuses.items())},
        }

    def reset_stats(self, _: web.Request, __: Body) -> Any:
        """Count from zero."""
        self._world.reset_stats()
        return {}

    def history(self, request: web.Request, _: Body) -> Any:
        """List what was done to a workspace, oldest first."""
        return self._workspace(request).history


_ONE: Final = "/_control/workspaces/{name}"
ROUTES: Final[tuple[tuple[str, str, Action], ...]] = (
    ("GET", "/_control/workspaces", Control.list_workspaces),
    ("POST", "/_control/workspaces", Control.put_workspaces),
    ("PUT", _ONE, Control.put_workspace),
    ("DELETE", _ONE, Control.delete_workspace),
    ("POST", f"{_ONE}/keys", Control.mint),
    ("POST", f"{_ONE}/keys/{{key}}/kill", Control.kill),
    ("POST", f"{_ONE}/keys/{{key}}/revive", Control.revive),
    ("POST", f"{_ONE}/keys/{{key}}/scopes", Control.set_scopes),
    ("POST", f"{_ONE}/mutate", Control.mutate),
    ("POST", f"{_ONE}/quirks", Control.set_quirks),
    ("POST", f"{_ONE}/faults", Control.set_faults),
    ("GET", f"{_ONE}/truth", Control.get_truth),
    ("POST", "/_control/faults", Control.set_faults),
    ("POST", "/_control/latency", Control.set_latency),
    ("POST", "/_control/clock", Control.set_clock),
    ("GET", "/_control/stats", Control.stats),
    ("POST", "/_control/stats/reset", Control.reset_stats),
    ("GET", "/_control/history/{name}", Control.history),
)


def _handler(control: Control, action: Action) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            if not ip_address(request.remote or "0.0.0.0").is_loopback:  # noqa: S104 - stands for nobody, binds nothing
                return _json(403, {"error": "the control door opens to loopback only"})
            raw = await request.read()
            return _json(200, action(control, request, orjson.loads(raw) if raw else None))
        except web.HTTPNotFound as error:
            return _json(404, {"error": error.text})
        except ValueError as error:
            return _json(400, {"error": str(error)})

    return handle


def _json(status: int, value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def add_control(app: web.Application, world: World) -> None:
    """Add the control routes to an application; an unknown control path is a plain 404."""
    control = Control(world)
    for method, path, action in ROUTES:
        app.router.add_route(method, path, _handler(control, action))
