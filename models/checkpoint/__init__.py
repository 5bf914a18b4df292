"""Reads and writes checkpoints: load, save, inspect, convert."""

from models.checkpoint.loading import load
from models.checkpoint.saving import save
from models.errors import CheckpointError
from models.formats.identify import read_spec

__all__ = ["CheckpointError", "load", "read_spec", "save"]
