"""The `ldm` command."""
