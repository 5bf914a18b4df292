"""Calls to load and unload models, which wait until jobs permit them."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.job import WeightsKey


@dataclass
class ModelCall:
    """A call to load a model, or to unload it when no job uses it.

    id: None for a call that nobody waits for.
    """

    id: str | None
    model: str
    load: bool
    no_room_with: frozenset[WeightsKey] = frozenset()  # busy models that left no memory for the model
