"""The command line: what an operator does by hand, and the processes that run for long."""

from worker.cli.app import main

__all__ = ["main"]
