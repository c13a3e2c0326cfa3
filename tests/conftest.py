"""Fixtures of all tests: the run's servers, a simulator, and the harness on both."""

pytest_plugins = ("tests.fixtures.servers", "tests.fixtures.harness")
