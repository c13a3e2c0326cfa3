"""Run the simulator: `python -m worker.dev.simulator --port 0`."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from worker.dev.simulator.app import make_app
from worker.dev.simulator.world import World

try:
    import uvloop
except ImportError:  # not made for every platform
    _run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
else:
    _run = uvloop.run

# A hanging answer must not hold up the end.
SHUTDOWN_S = 0.5


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.dev.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="file to write the port to once listening")
    parser.add_argument("--seed", type=int, default=0, help="what all data is derived from")
    parser.add_argument("--quiet", action="store_true", help="do not print the address")
    parser.add_argument("--latency-ms", type=float, default=0, help="delay of every provider answer")
    return parser.parse_args(argv)


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    world = World(seed=arguments.seed, latency_ms=arguments.latency_ms)
    runner = web.AppRunner(make_app(world), access_log=None, shutdown_timeout=SHUTDOWN_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await runner.setup()
    try:
        site = web.TCPSite(runner, arguments.host, arguments.port, backlog=1024)
        await site.start()
        port = runner.addresses[0][1]
        if arguments.port_file is not None:
            _write_whole(arguments.port_file, str(port))
        if not arguments.quiet:
            sys.stdout.write(json.dumps({"url": f"http://{arguments.host}:{port}"}) + "\n")
            sys.stdout.flush()
        await stop.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    _run(serve(_arguments(sys.argv[1:])))
