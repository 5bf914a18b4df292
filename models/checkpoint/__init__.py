"""Weights in and out: load, save and describe a checkpoint."""

from models.checkpoint.folder import load, save
from models.errors import CheckpointError
from models.formats.diffusers_read import read_spec

__all__ = ["CheckpointError", "load", "read_spec", "save"]
