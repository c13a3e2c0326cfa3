"""The provider's endpoints as a table: path, scope, how a request is read, and how it is answered."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from worker.dev.simulator import activity, analytics, audit, listings
from worker.dev.simulator.world import Workspace, World

ANALYTICS: Final = "workspace_analytics_full_read"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says: its query string, its body, and the id in its path if there is one."""

    query: Mapping[str, str]
    body: bytes
    path_id: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route. `read` validates and makes hashable arguments, `answer` makes the JSON value.

    `scope` is the permission a key needs; `admit` may refuse before anything is answered. Which scope a read
    needs is known for members and audit logs (official SDK), seen in the wild for user and analytics, and
    assumed for the others.
    """

    method: str
    path: str
    scope: str
    read: Callable[[World, Asked], Hashable]
    answer: Callable[[World, Workspace, Any], Any]
    admit: Callable[[Workspace], None] | None = None


def _listing(path: str, scope: str, answer: Callable[[World, Workspace], Any]) -> Endpoint:
    return Endpoint("GET", path, scope, lambda _, __: None, lambda world, workspace, _: answer(world, workspace))


ENDPOINTS: Final = (
    _listing("/v1/user", "user_read", listings.user),
    _listing("/v1/user/subscription", "user_read", listings.subscription),
    _listing("/v1/workspace/members", "workspace_members_read", listings.members),
    _listing("/v1/workspace/groups", "workspace_read", listings.groups),
    _listing("/v1/service-accounts", "workspace_read", listings.accounts),
    Endpoint(
        "GET",
        "/v1/service-accounts/{id}/api-keys",
        "workspace_read",
        lambda _, asked: asked.path_id,
        listings.account_keys,
    ),
    Endpoint(
        "POST",
        "/v1/workspace/analytics/query/usage-by-product-over-time",
        ANALYTICS,
        lambda world, asked: analytics.read_credit_query(world, asked.body),
        analytics.credit_usage,
    ),
    Endpoint(
        "POST",
        "/v1/workspace/analytics/usage",
        ANALYTICS,
        lambda world, asked: analytics.read_cost_query(world, asked.body),
        analytics.cost_usage,
    ),
    Endpoint(
        "GET",
        "/v1/usage/character-stats",
        ANALYTICS,
        lambda world, asked: activity.read_stats_query(world, asked.query),
        activity.character_stats,
    ),
    Endpoint(
        "POST",
        "/v1/workspace/analytics/requests",
        ANALYTICS,
        lambda world, asked: activity.read_requests_query(world, asked.body),
        activity.api_requests,
    ),
    Endpoint(
        "GET",
        "/v1/workspace/audit-logs",
        "audit_log_read",
        lambda world, asked: audit.read_audit_query(world, asked.query),
        audit.audit_logs,
        audit.admit_audit,
    ),
)
