"""The app: every command, and what an error means to a shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from worker.cli import connectors, deadletters, events, holds, processes, status, syncs, up, vault
from worker.cli.demo.command import demo
from worker.cli.printing import print_error
from worker.errors import Misconfigured, OwnerMustAct, Refused, RollcallError, TryLater

DONE, FAILED, USAGE, UNREACHABLE, LATER, OWNER, CONFIGURATION = 0, 1, 2, 69, 75, 77, 78
_UNREACHABLE = {"database_unreachable", "redis_unreachable", "broker_unreachable"}
_ARGUMENTS = {
    "tenant_invalid", "name_invalid", "actor_invalid", "key_malformed", "region_unknown", "region_mismatch",
    "base_url_invalid", "https_required", "host_not_allowed", "argument_invalid", "ambiguous_name",
}  # fmt: skip

app = typer.Typer(
    name="rollcall",
    help="Keeps a live and trustworthy copy of ElevenLabs workspaces.",
    epilog="Begin with: rollcall up  |  then, in another terminal: rollcall connectors add --help",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("up")(up.up)
app.command("demo")(demo)
app.add_typer(connectors.app, name="connectors")
app.command("sync")(syncs.sync)
app.command("runs")(syncs.runs)
app.command("status")(status.status)
app.add_typer(events.app, name="events")
app.add_typer(holds.app, name="holds")
app.add_typer(deadletters.app, name="deadletter")
app.add_typer(vault.app, name="vault")
app.command("settings")(processes.settings)
app.command("migrate")(processes.migrate)
app.command("beat")(processes.beat)
app.command("worker")(processes.worker)
app.command("writer")(processes.writer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (0 done, 1 failed, 2 usage, 69, 75, 77, 78: see `exit_code`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        # Outside of JSON, typer shows its own errors, with the usage line.
        result = command.main(arguments, prog_name="rollcall", standalone_mode=not as_json)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else FAILED
    except typer.Abort:
        return FAILED
    except typer.TyperException as error:
        print_error(Refused("usage", error.format_message()), as_json=as_json)
        return USAGE
    except RollcallError as error:
        print_error(error, as_json=as_json)
        return exit_code(error)
    return result if isinstance(result, int) else DONE


def exit_code(error: RollcallError) -> int:
    """Give the exit code of an error: 69 unreachable, 75 try later, 77 the owner must act, 78 configuration."""
    match error:
        case TryLater():
            return UNREACHABLE if error.reason in _UNREACHABLE else LATER
        case OwnerMustAct():
            return OWNER
        case Misconfigured():
            return CONFIGURATION
        case Refused() if error.reason in _ARGUMENTS:
            return USAGE
    return FAILED
