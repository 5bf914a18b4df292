"""From a photograph to a control image, by methods that need no trained weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

from service.requests.images import Pixels

Preprocessor = Literal["none", "canny", "invert", "threshold", "blur"]
PREPROCESSORS: tuple[Preprocessor, ...] = get_args(Preprocessor)
# Parts of the names of preprocessors in other programs that are trained networks.
TRAINED = (
    "depth", "hed", "lineart", "mediapipe", "mlsd", "normal", "openpose", "pidinet", "pose", "scribble",
    "seg", "softedge", "teed", "zoe",
)  # fmt: skip
LOW, HIGH = 100, 200  # default thresholds of canny
BLUR_SIGMA = 9.0  # pixels; A1111's default
HALF = 127  # of threshold: larger values become white


class Thresholds(NamedTuple):
    """Of canny: gradients above `high` are edges, those above `low` if they continue an edge."""

    low: int = LOW
    high: int = HIGH


def canny(pixels: Pixels, thresholds: Thresholds) -> Pixels:
    """Edges (Canny 1986), white on black, as OpenCV finds them in a colour image."""
    import cv2  # takes a moment, which requests without canny do not need

    edges = cv2.Canny(pixels, thresholds.low, thresholds.high)
    return np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8)


def invert(pixels: Pixels, thresholds: Thresholds) -> Pixels:
    """Black lines on white become white lines on black, which control networks expect."""
    return 255 - pixels


def threshold(pixels: Pixels, thresholds: Thresholds) -> Pixels:
    """White where every channel is above HALF, else black."""
    white = pixels.min(axis=2, keepdims=True) > HALF
    return np.repeat(white, 3, axis=2).astype(np.uint8) * 255


def blur(pixels: Pixels, thresholds: Thresholds, sigma: float = BLUR_SIGMA) -> Pixels:
    """Gaussian blur."""
    import cv2

    return cv2.GaussianBlur(pixels, (0, 0), sigmaX=sigma).astype(np.uint8)


METHODS: dict[Preprocessor, Callable[[Pixels, Thresholds], Pixels]] = {
    "none": lambda pixels, thresholds: pixels,
    "canny": canny,
    "invert": invert,
    "threshold": threshold,
    "blur": blur,
}


def preprocess(pixels: Pixels, method: Preprocessor, thresholds: Thresholds) -> Pixels:
    """The control image of (H, W, 3) pixels, of the same shape."""
    return METHODS[method](pixels, thresholds)


def refusal(name: str) -> str:
    """What an error says about a preprocessor that this service does not have."""
    expected = f"must be one of {', '.join(PREPROCESSORS)}"
    if any(part in name.lower() for part in TRAINED):
        return f"{expected}; others are trained networks: send their result, with preprocess none"
    return expected
