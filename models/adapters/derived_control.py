"""ControlNets that are stored as changes of their base model's weights.

Control-LoRA    X.up and X.down: W = W_base + up down; other tensors are stored whole
difference      tensors that the base model has too are stored minus those; small ones are left out
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from models.checkpoint.weights import Weights
from models.formats.safetensors import Stored, contiguous
from models.networks.unet import UNet

LORA_MARK, DIFFERENCE_MARK = "lora_controlnet", "difference"  # empty tensors that name the kind
UP, DOWN, WEIGHT = ".up", ".down", ".weight"


def derived(tensors: Weights, unet: UNet) -> Weights:
    """The whole weights, in float32, under the native names of a ControlNet.

    unet: of the base model. A tensor that is neither in the file nor in the UNet stays missing.
    """
    base: dict[str, Tensor] = unet.state_dict()
    marks = {LORA_MARK, DIFFERENCE_MARK}
    subtracted = DIFFERENCE_MARK in tensors.stored

    def read(key: str) -> Tensor:
        if key.removesuffix(WEIGHT) + UP in tensors.stored:
            up, down = (tensors.read(key.removesuffix(WEIGHT) + end).float() for end in (UP, DOWN))
            change = up.flatten(1) @ down.flatten(1)
            return base[key].float() + change.reshape(base[key].shape)
        if key not in tensors.stored:
            return base[key].float()
        own = tensors.read(key).float()
        return base[key].float() + own if subtracted and key in base else own

    stored = {key: whole(tuple(value.shape)) for key, value in base.items() if is_copied(key)}
    for key, entry in tensors.stored.items():
        if key.endswith(UP) and key.removesuffix(UP) + DOWN in tensors.stored:
            down = tensors.stored[key.removesuffix(UP) + DOWN].shape
            stored[key.removesuffix(UP) + WEIGHT] = whole((entry.shape[0], *down[1:]))
        elif not key.endswith(DOWN) and key not in marks:
            stored[key] = replace(entry, dtype="float32")
    return Weights(stored, read)


def is_copied(key: str) -> bool:
    """Whether a ControlNet has a tensor of the UNet."""
    return not key.startswith(("output_blocks.", "out."))


def whole(shape: tuple[int, ...]) -> Stored:
    """The entry of a tensor that is computed, not read from a file."""
    return Stored("float32", shape, contiguous(shape), 0, 0)
