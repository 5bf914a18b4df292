"""A1111's fields that divide a run into phases: the refiner."""

from __future__ import annotations

from typing import Any

from service.api.a1111.checks import NO_MODEL
from service.api.a1111.schemas import Processing
from service.api.a1111.session import A1111Session
from service.requests.checks import require


def refiner_of(body: Processing, session: A1111Session) -> dict[str, Any] | None:
    """The native field `refiner`; None without one. Raises InvalidRequest, and NotFound for the model."""
    name, switch_at = body.refiner_checkpoint, body.refiner_switch_at
    if name is None or name in NO_MODEL or (switch_at is not None and switch_at >= 1):
        return None
    is_part = switch_at is not None and switch_at > 0
    require([("refiner_switch_at", is_part, "must be above 0 with refiner_checkpoint")])
    return {"model": session.find(name, "refiner_checkpoint"), "switch_at": switch_at}
