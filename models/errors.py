"""What goes wrong with models' files."""


class CheckpointError(Exception):
    """A model that cannot be loaded or saved; the message is one sentence for a person."""
