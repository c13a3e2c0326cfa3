"""Fixtures of all tests: the run's servers, a simulator, and the harness on both."""

from hypothesis import settings

# No test depends on the machine's speed.
settings.register_profile("rollcall", deadline=None)
settings.load_profile("rollcall")

pytest_plugins = ("tests.fixtures.servers", "tests.fixtures.harness")
