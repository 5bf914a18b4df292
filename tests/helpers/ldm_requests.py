"""A request body for each model of the latent diffusion paper, and the tasks that each model lists."""

from __future__ import annotations

import numpy as np

from service.requests.labels import colour_of
from service.requests.schemas import GenerateRequest, InpaintRequest, UpscaleRequest
from tests.helpers.images import IMAGE, MASK, png

GUIDANCE = 3.0
rng = np.random.default_rng(1)
SMALL = rng.integers(0, 256, (16, 24, 3), np.uint8)
CLASSES = rng.integers(0, 182, (32, 32)).repeat(2, 0).repeat(2, 1)  # class of each pixel, from 0
BOXES = [
    {"name": 7, "x": 0.1, "y": 0.2, "w": 0.5, "h": 0.3},
    {"name": "599", "x": 0.75, "y": 0.5, "w": 0.9, "h": 0.25},
]


def painted(classes: np.ndarray) -> str:
    """A segmentation map as an image in base64; class i has the colour of label i + 1."""
    table = np.array([colour_of(number) for number in range(1, 183)], np.uint8)
    return png(table[classes])


SIDES = {
    "lsun_churches": 128,
    "rdm768": 128,
}  # image sides that are not 64, which their size_multiple forbids
BODIES = {
    "celebahq": {},
    "lsun_churches": {},
    "cin256": {"class_label": 999},
    "cin256-v2": {"class_label": "17", "guidance_scale": GUIDANCE},
    "text2img256": {"prompt": "red apple", "negative_prompt": "blue", "guidance_scale": GUIDANCE},
    "txt2img-1p4B": {"prompt": "blue apple", "guidance_scale": GUIDANCE},
    "inpainting_big": {"image": png(IMAGE), "mask": png(MASK)},
    "bsr_sr": {"image": png(SMALL)},
    "layout2img": {"boxes": BOXES},
    "semantic_synthesis": {"segmentation": painted(CLASSES)},
    "rdm768": {"prompt": "red apple", "guidance_scale": GUIDANCE},
}


def schema_of(name: str):
    return {"inpainting_big": InpaintRequest, "bsr_sr": UpscaleRequest}.get(name, GenerateRequest)


TASKS = {  # model -> tasks, inputs, whether guidance is supported, number of labels
    "celebahq": (["unconditional"], [], False, 0),
    "lsun_churches": (["unconditional"], [], False, 0),
    "cin256": (["class-to-image"], ["class_label"], False, 1000),
    "cin256-v2": (["class-to-image"], ["class_label"], True, 1000),
    "text2img256": (["text-to-image", "image-to-image", "inpainting"], ["prompt"], True, 0),
    "txt2img-1p4B": (["text-to-image", "image-to-image", "inpainting"], ["prompt"], True, 0),
    "inpainting_big": (["inpainting"], [], False, 0),
    "bsr_sr": (["upscaling"], [], False, 0),
    "layout2img": (["layout-to-image"], ["boxes"], False, 8191),
    "semantic_synthesis": (["layout-to-image"], ["segmentation"], False, 182),
    "rdm768": (["text-to-image", "image-to-image", "inpainting"], ["prompt"], True, 0),
}
