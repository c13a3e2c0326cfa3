"""Postgres: the ledger, the chain of versions, the facts. SQL stands beside the code that asks it."""
