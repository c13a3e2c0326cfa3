"""The provider: its protocol as pure functions, and the one client that speaks it."""
