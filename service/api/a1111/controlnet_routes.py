"""The endpoints of A1111's ControlNet extension."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from PIL import Image
from pydantic import AliasChoices, BaseModel, Field

from service.api.a1111 import controlnet
from service.api.a1111.controlnet_modules import (
    ALIASES,
    MODULES,
    NONE,
    RESOLUTION,
    RESOLUTION_SLIDER,
    detect,
    find_module,
)
from service.api.a1111.controlnet_units import names_of
from service.api.a1111.schemas import Body
from service.api.a1111.session import A1111Session
from service.api.auth import caller_of
from service.api.routing import ClientErrorRoute
from service.errors import InvalidRequest
from service.requests import images
from service.requests.response_schemas import error_responses

VERSION = 3  # of the extension's API
UNITS = 3  # that its page shows
NO_MODEL = "None"
# Tabs of the extension's page -> words in the names of their modules and models; "All" has every one.
TYPES = {
    "All": (),
    "Canny": ("canny",),
    "Lineart": ("lineart",),
    "Scribble/Sketch": ("scribble", "sketch"),
    "Tile/Blur": ("tile", "blur"),
    "Inpaint": ("inpaint",),
    "IP-Adapter": ("ip-adapter", "ip_adapter"),
}

router = APIRouter(prefix="/controlnet", route_class=ClientErrorRoute)

READ: dict[str, Any] = {"responses": error_responses(422, 500, 503)}
WRITE: dict[str, Any] = {"responses": error_responses(400, 408, 413, 415, 422, 429, 500, 503)}


class ControlNetVersion(BaseModel):
    version: int = VERSION


class ControlNetSettings(BaseModel):
    control_net_unit_count: int = UNITS


class ControlNetModels(BaseModel):
    model_list: list[str]


class ControlNetModules(BaseModel):
    module_list: list[str]
    module_detail: Annotated[
        dict[str, dict[str, Any]], Field(description="whether a module needs no model, and its sliders")
    ]


class ControlNetTypes(BaseModel):
    control_types: Annotated[
        dict[str, dict[str, Any]],
        Field(description="tab of the page -> module_list, model_list, default_option and default_model"),
    ]


class ControlNetDetect(Body):
    """POST /controlnet/detect."""

    controlnet_module: str | None = None
    controlnet_input_images: Annotated[
        list[str] | None,
        Field(
            description="files in base64; webuiapi's name of the field is controlnet_images",
            validation_alias=AliasChoices("controlnet_input_images", "controlnet_images"),
        ),
    ] = None
    controlnet_processor_res: Annotated[
        float | None, Field(description="of the shorter side; default and for other values: 512")
    ] = None
    controlnet_threshold_a: float | None = None
    controlnet_threshold_b: float | None = None


class ControlNetDetected(BaseModel):
    images: Annotated[list[str], Field(description="PNG files in base64")]
    info: str = "Success"


def names(request: Request) -> list[str]:
    """The controls and reference adapters of all models, by name."""
    session: A1111Session = request.app.state.a1111.of(caller_of(request))
    found = {name for spec in session.specs.values() for name in names_of(spec)}
    return sorted(found)


@router.get("/version", **READ, summary="Version of the extension's API")
async def read_controlnet_version() -> ControlNetVersion:
    """Always 3."""
    return ControlNetVersion()


@router.get("/settings", **READ, summary="Number of units")
async def read_controlnet_settings() -> ControlNetSettings:
    """The number of units in the extension's page; requests may have more."""
    return ControlNetSettings()


@router.get("/model_list", **READ, summary="ControlNets, T2I-Adapters and IP-Adapters")
async def list_controlnet_models(request: Request) -> ControlNetModels:
    """Lists the names for `model` of a unit, of all checkpoints. Hashes are not computed."""
    return ControlNetModels(model_list=names(request))


@router.get("/module_list", **READ, summary="Preprocessors")
async def list_controlnet_modules(alias_names: bool = False) -> ControlNetModules:
    """Lists the names for `module` of a unit. Those that are trained networks are not available."""
    shown = {name: alias for alias, name in ALIASES.items()} if alias_names else {}
    table = {shown.get(name, name): module for name, module in MODULES.items()}
    return ControlNetModules(
        module_list=list(table),
        module_detail={
            name: {"model_free": False, "sliders": [slider.describe() for slider in module.sliders]}
            for name, module in table.items()
        },
    )


@router.get("/control_types", **READ, summary="Modules and models, by the tabs of the extension's page")
async def list_control_types(request: Request) -> ControlNetTypes:
    """Sorts modules and models into tabs by their names."""
    models = names(request)
    return ControlNetTypes(control_types={tab: tab_of(words, models) for tab, words in TYPES.items()})


def tab_of(words: tuple[str, ...], models: list[str]) -> dict[str, Any]:
    def fits(name: str) -> bool:
        return not words or any(word in name.lower() for word in words)

    own_modules = [name for name in MODULES if name == NONE or fits(name)]
    own_models = [NO_MODEL, *filter(fits, models)]
    return {
        "module_list": own_modules,
        "model_list": own_models,
        "default_option": own_modules[1] if words and len(own_modules) > 1 else NONE,
        "default_model": own_models[1] if words and len(own_models) > 1 else NO_MODEL,
    }


@router.post("/detect", **WRITE, summary="Make control images")
async def detect_controlnet_maps(body: ControlNetDetect, request: Request) -> ControlNetDetected:
    """Runs a preprocessor on images, at its resolution."""
    state = request.app.state
    with state.supervisor.reserve_slot(caller_of(request).client):
        return await asyncio.to_thread(detected, body, state.settings.max_input_pixels)


def detected(body: ControlNetDetect, max_pixels: int) -> ControlNetDetected:
    """Raises InvalidRequest."""
    module = find_module(body.controlnet_module or NONE)
    if module is None:
        raise InvalidRequest("controlnet_module is not available", param="controlnet_module")
    if not body.controlnet_input_images:
        raise InvalidRequest("controlnet_input_images has no image", param="controlnet_input_images")
    resolution = int(RESOLUTION_SLIDER.read(body.controlnet_processor_res or RESOLUTION))
    made = []
    for index, file in enumerate(body.controlnet_input_images):
        pixels = np.asarray(images.read_image(file, f"controlnet_input_images.{index}", max_pixels))
        a, b = body.controlnet_threshold_a, body.controlnet_threshold_b
        made.append(controlnet.png(Image.fromarray(detect(pixels, module, resolution, a, b))))
    return ControlNetDetected(images=made)
