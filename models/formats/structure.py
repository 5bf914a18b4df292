"""One error for tensors that do not form a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import CheckpointError


@contextmanager
def checked_structure(what: str) -> Iterator[None]:
    """Errors of finding out a network's shape, or of building it, become a CheckpointError about `what`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{what} has an unsupported structure: {error} is missing") from error
    except (IndexError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{what} has an unsupported structure: {error}") from error
