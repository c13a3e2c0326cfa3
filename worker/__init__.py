"""Rollcall: a live and trustworthy copy of ElevenLabs workspaces."""
