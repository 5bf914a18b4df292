"""Handlers, a file for each API."""
