"""Errors of reading and writing model files."""


class CheckpointError(Exception):
    """A model that cannot be loaded or saved. The message is one line for the operator."""
