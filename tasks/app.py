"""The Celery app: JSON, ids only, late acknowledgement, one message at a time; waiting lives in Postgres."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Final
from uuid import UUID

import celery.signals
import structlog
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from schemas.connectors import Dataset, RunKind
from schemas.messages import MESSAGE_VERSION
from worker.errors import TryLater
from worker.plan import Sending, messages
from worker.settings import Settings

log = structlog.get_logger()

DISPATCH: Final = "rollcall.dispatch"
SYNC: Final = "rollcall.sync"
FETCH: Final = "rollcall.fetch"
BACKFILL: Final = "rollcall.backfill"
QUEUES: Final = (DISPATCH, SYNC, FETCH, BACKFILL)
VISIBILITY_TIMEOUT_S: Final = 3600
"""After this the broker redelivers what was never acknowledged; the ledger is much quicker, and is relied on."""
SOCKET_TIMEOUT_S: Final = 5.0
"""A broker that accepts but does not answer is given up after this."""

app = Celery("rollcall")
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    result_backend=None,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_acks_on_failure_or_timeout=True,
    task_create_missing_queues=False,
    task_queues=[Queue(name) for name in QUEUES],
    task_default_queue=SYNC,
    task_send_sent_event=False,
    worker_send_task_events=False,
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_connection_timeout=SOCKET_TIMEOUT_S,
    broker_heartbeat=10,
    broker_pool_limit=4,
    worker_consumer="tasks.consumer:PromptConsumer",
    timezone="UTC",
    enable_utc=True,
    imports=("tasks.consumer", "tasks.dispatch", "tasks.sync", "tasks.fetch", "tasks.upkeep"),
)


@celery.signals.setup_logging.connect
def _keep_our_logging(**_: object) -> None:
    """Keep Celery from taking the root logger: `worker.logs` has it."""


def configure(settings: Settings) -> Celery:
    """Point the app at its broker and write its one schedule entry."""
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for chatty in ("celery.worker.strategy", "celery.app.trace", "celery.beat"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    broker = settings.require_broker().get_secret_value()
    app.conf.update(
        broker_url=broker,
        broker_transport_options=_transport_options(broker),
        beat_schedule={
            "dispatch-due": {
                "task": "rollcall.dispatch_due",
                "schedule": settings.dispatch_interval_s,
                "kwargs": {"v": MESSAGE_VERSION},
                "options": {"queue": DISPATCH, "expires": settings.dispatch_interval_s},
            }
        },
    )
    return app


def _transport_options(broker: str) -> dict[str, object]:
    if not broker.startswith(("redis", "rediss", "sentinel")):
        return {"confirm_publish": True}
    return {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "retry_on_timeout": True,
    }


_PUBLISH_RETRY = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 0.5}


def _send(name: str, queue: str, **kwargs: object) -> None:
    try:
        app.send_task(
            name,
            kwargs={"v": MESSAGE_VERSION, **kwargs},
            queue=queue,
            retry=True,
            retry_policy=_PUBLISH_RETRY,
            ignore_result=True,
        )
    except (OperationalError, OSError) as error:
        raise TryLater("broker_unreachable", f"The broker takes no messages ({type(error).__name__}).") from error


def task_of(datasets: Collection[Dataset]) -> str:
    """Name the fetch task of a message after what it mostly carries."""
    if all(d.dimension for d in datasets):
        return "rollcall.fetch_usage"
    if set(datasets) == {Dataset.SERVICE_ACCOUNTS}:
        return "rollcall.fetch_service_accounts"
    return "rollcall.fetch_members"


def send(sendings: Sequence[Sending]) -> None:
    """Send fetch messages, each for several connectors; blocking.

    Raises:
        TryLater: the broker is away; `sendings` were not all sent (the ledger sends them again).

    """
    for message in messages(sendings):
        queue = FETCH if message[0].kind is RunKind.POLL else BACKFILL
        datasets = {dataset for sending in message for dataset in sending.datasets}
        _send(task_of(datasets), queue, part_ids=[str(part_id) for sending in message for part_id in sending.lanes])


def send_sync(run_id: UUID) -> None:
    """Send `rollcall.sync_connector`; blocking. Raises `TryLater` as `send` does."""
    _send("rollcall.sync_connector", SYNC, run_id=str(run_id))


def send_tidy() -> None:
    """Send `rollcall.upkeep.tidy`; blocking. Raises `TryLater` as `send` does."""
    _send("rollcall.upkeep.tidy", DISPATCH)


def waiting_messages(names: Sequence[str]) -> dict[str, int]:
    """Count the messages waiting in these queues at the broker; blocking.

    Raises:
        TryLater: the broker is away.

    """
    counts = {}
    queues = {name: app.amqp.queues[name] for name in names}
    # Once connected, kombu lets its driver's own errors through.
    away = (OperationalError, *app.connection_for_write().connection_errors)
    try:
        with app.pool.acquire(block=True, timeout=SOCKET_TIMEOUT_S) as connection:
            connection.ensure_connection(max_retries=1, timeout=SOCKET_TIMEOUT_S)
            for name, queue in queues.items():
                # Declared, not only looked for: an empty queue of Redis does not exist.
                counts[name] = queue.bind(connection.default_channel).queue_declare().message_count
    except away as error:
        raise TryLater("broker_unreachable", f"The broker does not answer ({type(error).__name__}).") from error
    return counts
