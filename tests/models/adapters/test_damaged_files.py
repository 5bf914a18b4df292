"""Controls, IP-Adapters and image encoders with damaged headers: refused with one kind of error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.adapters.control_net import open_control
from models.adapters.image_encoder import open_image_encoder
from models.adapters.inspection import inspect_adapter
from models.adapters.ip_adapter import open_adapter
from models.checkpoint import CheckpointError
from models.formats.identify import read_spec
from models.spec import ModelSpec
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import control_net, published, raw_t2i, t2i_adapter
from tests.checkpoints.ip_files import image_encoder, ip_adapter, write_image_encoder
from tests.checkpoints.sd_files import hollow

pytestmark = pytest.mark.slow

ROUNDS = 60
SIZES = (0, 1, 2, 3, 8, 64, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return sd_folders.write(tmp_path_factory.mktemp("models"), "xl")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("encoder"))


def tensors_of(kind: str) -> dict[str, Tensor]:
    unet = sd_folders.unet(sd_folders.ROWS["xl"], True)
    if kind.startswith("IP"):
        parts = ip_adapter(unet, "plus" if "Plus" in kind else "plain").items()
        return {f"{part}.{key}": value for part, inner in parts for key, value in inner.items()}
    made: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ControlNet": lambda: control_net(unet).state_dict(),
        "native ControlNet": lambda: published(control_net(unet)),
        "ControlNet++": lambda: control_net(unet, union=6).state_dict(),
        "T2I-Adapter": lambda: raw_t2i(t2i_adapter(unet)),
        "image encoder": lambda: image_encoder().state_dict(),
    }
    return made[kind]()


KINDS = (
    "ControlNet",
    "native ControlNet",
    "ControlNet++",
    "T2I-Adapter",
    "IP-Adapter",
    "IP-Adapter Plus",
    "image encoder",
)


def damaged(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """The tensors with a few of them missing, or of another shape."""
    changed = dict(tensors)
    # Structures are read from few tensors, which have low numbers in their names.
    keys = sorted(tensors, key=lambda key: (sum(map(int, filter(str.isdecimal, key.split(".")))), len(key)))
    for key in draw.choices(keys[: len(keys) // 2], k=draw.randint(1, 3)):
        if draw.random() < 0.3:
            changed.pop(key, None)
        else:
            sides = draw.choices(SIZES, k=draw.randint(0, 4))
            changed[key] = torch.empty(
                sides if draw.random() < 0.5 else [*tensors[key].shape[:1], *sides[:1]], device="meta"
            )
    return changed


def opened(kind: str, file: Path, spec: ModelSpec, encoder: Path) -> object:
    if kind.startswith("IP"):
        return open_adapter(file, encoder, spec)
    return open_image_encoder(file) if kind == "image encoder" else open_control(file, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_any_change_of_shapes_is_refused_as_such(folder, encoder, kind, tmp_path):
    draw, spec, tensors = random.Random(kind), read_spec(folder), tensors_of(kind)
    refused = 0
    for _ in range(ROUNDS):
        file = hollow(tmp_path / "a.safetensors", damaged(tensors, draw))
        inspect_adapter(file, model=spec)
        try:
            opened(kind, file, spec, encoder)
        except CheckpointError:
            refused += 1
    assert refused >= 0.8 * ROUNDS


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "ControlNetXSAdapter"}, "_class_name is 'ControlNetXSAdapter'; supported are"),
        ({"norm_num_groups": 0}, "norm_num_groups must be a positive integer"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types has 'AttnDownBlock2D'"),
        ({"block_out_channels": "wide"}, "block_out_channels must be a positive integer"),
        ({"controlnet_conditioning_channel_order": "hsv"}, "channel_order is 'hsv'; supported: rgb, bgr"),
        ({"layers_per_block": 10**6}, "layers_per_block must be at most 256"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', which is not supported"),
        ({"norm_num_groups": 7}, "must be multiples of norm_num_groups, 7"),
    ],
)
def test_values_of_a_configuration_are_refused_by_name(folder, changes, named, tmp_path):
    control_net(sd_folders.unet(sd_folders.ROWS["xl"], True)).save_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text()) | changes
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        open_control(tmp_path / "c", read_spec(folder))
