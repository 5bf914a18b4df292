"""Resolves inpainting requests: masks, outpainting and regions that are generated at another size."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from models.spec import ModelSpec
from service.engine.job import LatentFill
from service.requests import checks, images
from service.requests.checks import require
from service.requests.defaults import coalesce, round_up, with_defaults
from service.requests.inpainting import MaskedImage, Paste, blurred, extended, region_of
from service.requests.resolved_request import ResolvedRequest, with_inputs, with_parameters
from service.requests.schemas import InpaintRequest
from service.settings import Settings

LATENT_FILL: dict[str, LatentFill] = {"noise": "noise", "empty": "zeros"}  # of `fill`


def inpaint(
    request: InpaintRequest, spec: ModelSpec, settings: Settings, soft_mask: Image.Image | None = None
) -> ResolvedRequest:
    """Resolve an inpainting request, on a canvas of the next larger size that the model supports.

    With area: masked, the canvas is a region of the image, resized to the requested or the model's size.
    """
    masked = read_masked(request, settings, soft_mask)
    size, region = masked.image.size, None
    canvas = round_up(size[0], spec.size_multiple), round_up(size[1], spec.size_multiple)
    if request.area == "masked":
        canvas = coalesce(request.width, spec.defaults.width), coalesce(request.height, spec.defaults.height)
    resolved = with_defaults(request, spec, size, canvas, coalesce(request.strength, 1.0))
    sized_by_image = "extend" if request.extend else "image"
    checks.check_limits(resolved, spec, settings, sized_by_image if request.area == "whole" else "width")
    work = masked
    if request.area == "masked":
        region = region_of(masked.mask, request.padding, *canvas)
        work = masked.cropped(region).resized(*canvas)
        resolved = replace(resolved, region=True)
        resolved = with_parameters(resolved, width=canvas[0], height=canvas[1], padding=request.padding)
    image = work.image if request.fill == "original" else work.filled()
    pasted = soft_mask is not None or request.mask_blur or request.extend or region
    return with_inputs(
        replace(resolved, latent_fill=LATENT_FILL.get(request.fill, "image")),
        image=images.extend(image, *canvas),
        mask=images.extend(work.binary_mask, *canvas),
        paste=Paste(masked, region) if pasted else None,
    )


def read_masked(
    request: InpaintRequest, settings: Settings, soft_mask: Image.Image | None = None
) -> MaskedImage:
    """The image and its mask, extended and blurred. soft_mask: see resolve(). Raises InvalidRequest."""
    image = images.read_image(request.image, "image", settings.max_input_pixels)
    left, top, right, bottom = request.extend.sides if request.extend else (0, 0, 0, 0)
    size = image.width + left + right, image.height + top + bottom
    checks.check_inpainting(request, size, settings.max_input_pixels)
    if soft_mask is not None:
        mask = soft_mask
    elif request.mask is not None:
        mask = images.read_mask(request.mask, "mask", settings.max_input_pixels)
        checks.check_mask(mask, image)
    else:
        require([("mask", size != image.size, "is required")])
        mask = Image.new("L", image.size)
    masked = MaskedImage(image, blurred(mask, request.mask_blur))
    if request.extend is None:
        return masked
    return extended(masked, request.extend.sides, request.mask_blur)
