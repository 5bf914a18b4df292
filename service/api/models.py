"""Loading, unloading and rescanning models. Where API keys are set, these calls need an admin key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request

from service.api.native import while_connected
from service.api.routing import JSONRoute
from service.requests.model_schemas import IgnoredFile, ModelState, Rescan, state_of
from service.requests.response_schemas import error_responses
from service.worker.backend import Backend

router = APIRouter(prefix="/models", tags=["models"], route_class=JSONRoute)

ERRORS: dict[str, Any] = {"responses": error_responses(404, 422, 499, 500, 503, 504, 507)}
UNLOAD_ERRORS: dict[str, Any] = {"responses": error_responses(404, 409, 422, 499, 500, 503)}


def supervisor_of(request: Request) -> Backend:
    supervisor: Backend = request.app.state.supervisor
    supervisor.check_open()
    return supervisor


@router.post("/rescan", **ERRORS, summary="Read the folders of models again")
async def rescan(request: Request) -> Rescan:
    """Reads the folders of `--model-dir` and `--lora-dir`, and answers when all workers serve what is there.

    Jobs under way keep their model, even if its file is gone or has changed. A file that cannot be used is
    ignored, with the reason.
    """
    supervisor = supervisor_of(request)
    before = list(supervisor.specs)
    await while_connected(request, supervisor.rescan())
    specs = supervisor.specs
    return Rescan(
        models=[state_of(name, supervisor.models.loaded(name)) for name in specs],
        added=[name for name in specs if name not in before],
        removed=[name for name in before if name not in specs],
        loras=in_order(name for spec in specs.values() for name in spec.loras),
        embeddings=in_order(name for spec in specs.values() for name in spec.embeddings),
        ignored=[IgnoredFile(file=file, reason=reason) for file, reason in supervisor.models.ignored],
    )


@router.post("/{name}/load", **ERRORS, summary="Load a model")
async def load_model(name: str, request: Request) -> ModelState:
    """Answers when the model is loaded. With `--model-memory`, other models that no job uses may be unloaded
    for it.
    """
    return await set_loaded(name, True, request)


@router.post("/{name}/unload", **UNLOAD_ERRORS, summary="Unload a model")
async def unload_model(name: str, request: Request) -> ModelState:
    """Waits until no job uses the model, unloads it, and answers. If jobs use it until the timeout of
    requests, the answer is a 409. A later request loads the model again.
    """
    return await set_loaded(name, False, request)


async def set_loaded(name: str, load: bool, request: Request) -> ModelState:
    supervisor = supervisor_of(request)
    await while_connected(request, supervisor.set_loaded(name, load))
    return state_of(name, supervisor.models.loaded(name))


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted."""
    return sorted(set(names))
