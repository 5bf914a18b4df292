"""ControlNet units of A1111's API as the native fields `controls` and `reference_images`.

Where the extension differs from the native API, its rules decide: resize modes, preprocessors and their
resolution. A control's window is the native one: a step acts if it lies inside completely, while the
extension adds the step after it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from models.spec import ControlOption, ModelSpec
from service.api.a1111.checks import shown_name
from service.api.a1111.controlnet_modules import RESOLUTION_SLIDER, detect, fitted, perfect_resolution
from service.api.a1111.controlnet_units import ReadUnit
from service.requests import images
from service.requests.checks import require

TYPES = {
    "OpenPose": "openpose",
    "Depth": "depth",
    "Soft Edge": "soft_edge",
    "Hard Edge": "hard_edge",
    "Normal Map": "normal",
    "Segmentation": "segmentation",
    "Tile": "tile",
    "Inpaint": "inpaint",
}


class Target(NamedTuple):
    """What units are for: the model, the size of the image, and img2img's own image at that size."""

    spec: ModelSpec
    width: int
    height: int
    image: Image.Image | None
    inpaints: bool


@dataclass(frozen=True)
class Guides:
    """The units of a request, and what they are for."""

    units: tuple[ReadUnit, ...]
    target: Target

    def fields(self) -> dict[str, Any]:
        """The native fields `controls` and `reference_images`. Raises InvalidRequest."""
        controls = [control_of(unit, unit.option, self.target) for unit in self.units if unit.option]
        references = [entry for unit in self.units if not unit.option for entry in references_of(unit)]
        return {"controls": controls or None, "reference_images": references or None}

    def maps(self) -> list[str]:
        """The control images that the extension appends to those of a response: PNG files in base64."""
        shown = (unit for unit in self.units if unit.option and unit.unit.save_detected_map is not False)
        return [png(image) for unit in shown if (image := control_map(unit, self.target))]


def references_of(unit: ReadUnit) -> list[dict[str, Any]]:
    """The entries of `reference_images`. Raises InvalidRequest."""
    require([(f"{unit.field}.image", bool(unit.sources), "is required")])
    shared = {"adapter": unit.name, "scale": unit.scale, **unit.window}
    return [{**shared, "image": source} for source in unit.sources]


def control_of(unit: ReadUnit, option: ControlOption, target: Target) -> dict[str, Any]:
    """An entry of `controls`. Raises InvalidRequest."""
    kind = TYPES.get(unit.unit.union_control_type or "")
    needs_mask = option.needs_mask(kind)
    has_image = bool(unit.sources) or target.image is not None
    require(
        (
            (f"{unit.field}.image", has_image, "is required in txt2img"),
            (
                f"{unit.field}.model",
                target.inpaints or not needs_mask,
                "is an inpainting control: use img2img with a mask",
            ),
            (
                f"{unit.field}.module",
                needs_mask or not unit.module.inpaints,
                f"needs an inpainting control, which {shown_name(unit.name)} is not",
            ),
            (
                f"{unit.field}.union_control_type",
                not option.types or kind in option.types,
                f"must be one of {', '.join(name for name, kind in TYPES.items() if kind in option.types)}",
            ),
        )
    )
    return {
        "model": unit.name,
        "image": control_map(unit, target),
        "scale": unit.scale,
        "mode": unit.mode,
        "type": kind if option.types else None,
        **unit.window,
    }


def png(image: Image.Image) -> str:
    return base64.b64encode(images.encode(np.asarray(image), "png")).decode()


def control_map(unit: ReadUnit, target: Target) -> Image.Image | None:
    """The control image at the target's size; None for the inpainting request's own image."""
    if not unit.sources and (unit.module.inpaints or target.image is None):
        return None
    pixels = np.asarray(unit.sources[0] if unit.sources else target.image)
    width, height, mode = target.width, target.height, unit.resize_mode
    resolution = int(RESOLUTION_SLIDER.read(unit.unit.processor_res))
    if unit.unit.pixel_perfect:
        resolution = perfect_resolution(pixels, width, height, mode)
    made = detect(pixels, unit.module, resolution, unit.unit.threshold_a, unit.unit.threshold_b)
    return Image.fromarray(fitted(made, width, height, mode))
