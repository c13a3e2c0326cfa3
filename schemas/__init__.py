"""Shapes that cross a boundary: wire, records, events, states, messages."""
