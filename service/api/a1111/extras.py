"""A1111's upscaling ("extras"): with a model or by resampling, by a factor or to a size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from models.spec import ModelSpec
from service.api.a1111.checks import ignored_warning
from service.api.a1111.schemas import Extras
from service.requests import images
from service.requests.background import Submission
from service.requests.checks import require, supports_any
from service.requests.defaults import coalesce
from service.requests.metadata import NONE, Metadata
from service.requests.resolve import TASKS_OF, build_request
from service.requests.response import Result
from service.requests.schemas import UpscaleRequest
from service.settings import Settings

NO_UPSCALER = "None"
RESAMPLING = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
SIDE, FACTOR = 512, 2.0  # A1111's defaults of upscaling_resize_w and _h, and of upscaling_resize
UNSUPPORTED = ("extras_upscaler_2_visibility", "gfpgan_visibility", "codeformer_visibility")


def is_upscaler(spec: ModelSpec) -> bool:
    return supports_any(spec, TASKS_OF[UpscaleRequest])


def upscaler_names(specs: Mapping[str, ModelSpec]) -> Sequence[str]:
    return [NO_UPSCALER, *RESAMPLING, *(name for name, spec in specs.items() if is_upscaler(spec))]


@dataclass(frozen=True)
class Upscaling:
    """One image to upscale by `scale` to `size`, and then to crop to its middle, of the size `window`."""

    image: Image.Image
    size: tuple[int, int]
    window: tuple[int, int]
    scale: float

    def finish(
        self,
        image: Image.Image,
        resampling: Image.Resampling = Image.Resampling.LANCZOS,
        metadata: Metadata = NONE,
    ) -> bytes:
        """The file of the upscaled image, resized to `size` if necessary, and cropped."""
        if image.size != self.size:
            image = image.resize(self.size, resampling)
        (width, height), (w, h) = self.size, self.window
        left, upper = (width - w) // 2, (height - h) // 2
        return images.encode(np.asarray(image.crop((left, upper, left + w, upper + h))), "png", metadata)


def check(body: Extras, specs: Mapping[str, ModelSpec]) -> str:
    """Raise InvalidRequest for unsupported values; return the warnings about ignored fields, as HTML."""
    known = upscaler_names(specs)
    name = coalesce(body.upscaler_1, NO_UPSCALER)
    require([("upscaler_1", name in known, f"must be one of {', '.join(known)}")])
    for unsupported in UNSUPPORTED:
        require([(unsupported, not getattr(body, unsupported), "is not supported; it must be 0")])
    warnings = ignored_warning("These fields have no effect here", body.model_extra or {})
    return "".join(f"<p>{escape(warning)}</p>" for warning in warnings)


def read(body: Extras, file: str, param: str, settings: Settings) -> Upscaling:
    """Decode one image, and compute the sizes to upscale to. Raises InvalidRequest."""
    most = settings.max_input_pixels
    image = images.read_image(file, param, most)
    width, height = image.size
    if body.resize_mode == 1:
        window = coalesce(body.upscaling_resize_w, SIDE), coalesce(body.upscaling_resize_h, SIDE)
        names = "upscaling_resize_w", "upscaling_resize_h"
        require(
            (name, side <= most, f"must be at most {most}") for name, side in zip(names, window, strict=True)
        )
        scale = max(window[0] / width, window[1] / height)
        size = max(window[0], round(width * scale)), max(window[1], round(height * scale))
        window = window if coalesce(body.upscaling_crop, True) else size
    else:
        scale = coalesce(body.upscaling_resize, FACTOR)
        size = window = max(1, int(width * scale)), max(1, int(height * scale))
    require([("upscaling_resize", size[0] * size[1] <= most, f"must give an image of at most {most} pixels")])
    return Upscaling(image, size, window, scale)


def needs_model(body: Extras) -> bool:
    shrinks = body.resize_mode != 1 and coalesce(body.upscaling_resize, FACTOR) <= 1
    return not shrinks and coalesce(body.upscaler_1, NO_UPSCALER) not in (NO_UPSCALER, *RESAMPLING)


def resample(body: Extras, file: str, param: str, settings: Settings) -> bytes:
    """The finished file, resampled; with the upscaler "None" the unchanged image. Raises InvalidRequest."""
    work = read(body, file, param, settings)
    if coalesce(body.upscaler_1, NO_UPSCALER) == NO_UPSCALER:
        return images.encode(np.asarray(work.image), "png")
    return work.finish(work.image, RESAMPLING.get(body.upscaler_1 or "", RESAMPLING["Lanczos"]))


def submission(body: Extras, file: str, param: str, settings: Settings) -> Submission:
    """Upscaling with a model by a whole factor, then resampling to the size. Raises InvalidRequest."""
    work = read(body, file, param, settings)
    fields = {"image": work.image, "model": body.upscaler_1, "scale": max(2, math.ceil(work.scale))}

    def encode(result: Result, index: int) -> bytes:
        if work.scale <= 1:
            return work.finish(work.image)
        source = result.resolved.digital_source
        return work.finish(Image.fromarray(result.pixels(index)), metadata=Metadata(source=source))

    return Submission(build_request(UpscaleRequest, fields), encode=encode)
