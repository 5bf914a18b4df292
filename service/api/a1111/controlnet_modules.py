"""The preprocessors ("modules") of A1111's ControlNet extension that need no trained weights.

The extension resizes an image to the preprocessor's resolution first, and the result to the image's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.requests.images import Pixels
from service.requests.preprocessing import Thresholds, blur, canny, invert

JUST, CROP, FILL = "Just Resize", "Crop and Resize", "Resize and Fill"
# Older names, and the numbers of Forge and of old versions of the extension.
RESIZE_MODES: Mapping[str | int, str] = {
    **{name: name for name in (JUST, CROP, FILL)},
    **dict(enumerate((JUST, CROP, FILL))),
    "Inner Fit (Scale to Fit)": CROP,
    "Scale to Fit (Inner Fit)": CROP,
    "Outer Fit (Shrink to Fit)": FILL,
    "Envelope (Outer Fit)": FILL,
}
RESOLUTION = 512  # of preprocessors, along the image's shorter side
MULTIPLE = 64  # of the sides that a preprocessor gets
FEW_COLOURS = range(3, 200)  # of maps such as segmentations, whose colours must not be mixed
NONE = "none"


@dataclass(frozen=True)
class Slider:
    """A number that a module takes: its name in the extension's page, its default and its range."""

    name: str
    default: float
    low: float
    high: float
    step: float = 1

    def read(self, value: float | None) -> float:
        """The value, or the default for one outside the range."""
        return value if value is not None and self.low <= value <= self.high else self.default

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "value": self.default, "min": self.low, "max": self.high, "step": self.step
        }  # fmt: skip


RESOLUTION_SLIDER = Slider("Resolution", RESOLUTION, 64, 2048, 8)


@dataclass(frozen=True)
class Module:
    """A preprocessor. run: (H, W, 3) pixels and the values of its sliders -> its result, of the same shape.

    resizes: it works at RESOLUTION, not at the image's own size; inpaints: it marks the mask's pixels.
    """

    run: Callable[[Pixels, float, float], Pixels]
    a: Slider | None = None
    b: Slider | None = None
    resizes: bool = True
    inpaints: bool = False

    def thresholds(self, a: float | None, b: float | None) -> tuple[float, float]:
        return (self.a.read(a) if self.a else -1, self.b.read(b) if self.b else -1)

    @property
    def sliders(self) -> list[Slider]:
        first = [RESOLUTION_SLIDER] if self.resizes else []
        return [*first, *(slider for slider in (self.a, self.b) if slider)]


def unchanged(pixels: Pixels, a: float, b: float) -> Pixels:
    return pixels


def whitened(pixels: Pixels, a: float, b: float) -> Pixels:
    """White where every channel is above a."""
    white = pixels.min(axis=2, keepdims=True) > a
    return np.repeat(white, 3, axis=2).astype(np.uint8) * 255


def downsampled(pixels: Pixels, rate: float, b: float) -> Pixels:
    """The mean of areas of rate x rate pixels; 1.1 is the smallest rate that changes anything."""
    import cv2

    if rate < 1.1:
        return pixels
    size = max(1, int(pixels.shape[1] / rate)), max(1, int(pixels.shape[0] / rate))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def scribble_xdog(pixels: Pixels, threshold: float, b: float) -> Pixels:
    """White lines where two Gaussian blurs differ (Winnemöller et al. 2012)."""
    import cv2

    image = pixels.astype(np.float32)
    fine, coarse = cv2.GaussianBlur(image, (0, 0), 0.5), cv2.GaussianBlur(image, (0, 0), 5.0)
    difference = (255 - np.min(coarse - fine, axis=2)).clip(0, 255).astype(np.uint8)
    lines = 2 * (255 - difference.astype(np.float32)) > threshold
    return np.repeat(lines[:, :, None], 3, axis=2).astype(np.uint8) * 255


def lineart_standard(pixels: Pixels, a: float, b: float) -> Pixels:
    """Lines that are darker than a blur of the image, white on black."""
    import cv2

    image = pixels.astype(np.float32)
    intensity = np.min(cv2.GaussianBlur(image, (0, 0), 6.0) - image, axis=2).clip(0, 255)
    strong = intensity[intensity > 8]
    lines = intensity / max(16.0, float(np.median(strong)) if strong.size else 0.0) * 127
    return np.repeat(lines.clip(0, 255)[:, :, None], 3, axis=2).astype(np.uint8)


MODULES: Mapping[str, Module] = {
    NONE: Module(unchanged, resizes=False),
    "canny": Module(
        lambda pixels, a, b: canny(pixels, Thresholds(int(a), int(b))),
        Slider("Canny Low Threshold", 100, 1, 255),
        Slider("Canny High Threshold", 200, 1, 255),
    ),
    "invert": Module(lambda pixels, a, b: invert(pixels, Thresholds()), resizes=False),
    "threshold": Module(whitened, Slider("Binarization Threshold", 127, 0, 255)),
    "blur_gaussian": Module(
        lambda pixels, a, b: blur(pixels, Thresholds(), a), Slider("Sigma", 9, 0.01, 64, 0.01)
    ),
    "tile_resample": Module(downsampled, Slider("Down Sampling Rate", 1, 1, 8, 0.01), resizes=False),
    "scribble_xdog": Module(scribble_xdog, Slider("XDoG Threshold", 32, 1, 64)),
    "lineart_standard": Module(lineart_standard),
    "inpaint_only": Module(unchanged, resizes=False, inpaints=True),
    "inpaint_global_harmonious": Module(unchanged, resizes=False, inpaints=True),
}
ALIASES = {  # the names in the extension's page
    "invert (from white bg & black line)": "invert",
    "lineart_standard (from white bg & black line)": "lineart_standard",
    "inpaint": "inpaint_global_harmonious",
}
REFERENCE_MODULES = re.compile(r"ip-adapter[\w-]*|none")  # reference images have no preprocessor here


def find_module(name: str) -> Module | None:
    """The module of this name or alias."""
    plain = name.strip().lower()
    return MODULES.get(ALIASES.get(plain, plain))


def detect(pixels: Pixels, module: Module, resolution: int, a: float | None, b: float | None) -> Pixels:
    """A module's result for an image of any size."""
    thresholds = module.thresholds(a, b)
    if not module.resizes:
        return module.run(pixels, *thresholds)
    height, width = pixels.shape[:2]
    scale = resolution / min(height, width)
    resized = resampled(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    padding = [(0, -side % MULTIPLE) for side in resized.shape[:2]]
    result = module.run(np.pad(resized, (*padding, (0, 0)), mode="edge"), *thresholds)
    return result[: resized.shape[0], : resized.shape[1]]


def perfect_resolution(pixels: Pixels, width: int, height: int, mode: str) -> int:
    """The resolution at which a result needs no resizing for a width x height image."""
    rows, columns = pixels.shape[:2]
    ratios = height / rows, width / columns
    scale = min(ratios) if mode == FILL else max(ratios)
    return int(max(MULTIPLE, round(scale * min(rows, columns))))


def fitted(pixels: Pixels, width: int, height: int, mode: str) -> Pixels:
    """A control image at width x height: stretched, cropped, or surrounded by its edge's median colour."""
    rows, columns = pixels.shape[:2]
    if (columns, rows) == (width, height):
        return pixels
    if mode == JUST:
        return mapped(pixels, width, height)
    ratios = height / rows, width / columns
    scale = min(ratios) if mode == FILL else max(ratios)
    resized = mapped(pixels, max(1, round(columns * scale)), max(1, round(rows * scale)))
    top, left = (height - resized.shape[0]) // 2, (width - resized.shape[1]) // 2
    if mode == CROP:
        return resized[-top : height - top, -left : width - left]
    edges = (resized[0], resized[-1], resized[:, 0], resized[:, -1])
    colour = np.median(np.concatenate(edges), axis=0).astype(np.uint8)
    canvas = np.tile(colour, (height, width, 1))
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


def mapped(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resized as a map: few colours are not mixed, and two stay two."""
    import cv2

    if pixels.shape[:2] == (height, width):
        return pixels
    colours = len(np.unique(pixels.reshape(-1, 3), axis=0))
    if colours in FEW_COLOURS:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    resized = resampled(pixels, width, height)
    is_binary = colours == 2 and {*np.unique(pixels)} == {0, 255}
    if not is_binary:
        return resized
    _, black_and_white = cv2.threshold(resized[:, :, 0], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.repeat(black_and_white[:, :, None], 3, axis=2).astype(np.uint8)


def resampled(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resized: means of areas if it becomes smaller, cubic interpolation if larger."""
    import cv2

    smaller = width * height < pixels.shape[0] * pixels.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width, height), interpolation=how).astype(np.uint8)
