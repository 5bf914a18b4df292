"""`ldm inspect` of controls, IP-Adapters and image encoders, and what they are called as models."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel

from models.adapters.inspection import as_json, as_text, inspect_adapter
from models.checkpoint import CheckpointError
from models.formats.identify import identify, read_spec
from service.cli.main import main
from service.model_paths import ModelPathError, locate
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import published, write_control, write_t2i_adapter
from tests.checkpoints.ip_files import ip_adapter, write_image_encoder
from tests.checkpoints.sd_files import bare, hollow

pytestmark = pytest.mark.slow

SHARED = ("block_out_channels", "cross_attention_dim", "attention_head_dim", "use_linear_projection",
          "transformer_layers_per_block", "down_block_types", "addition_embed_type",
          "addition_time_embed_dim", "projection_class_embeddings_input_dim")  # fmt: skip
SD1, SD2, XL = (
    {key: unet[key] for key in SHARED if key in unet}
    for unet in (sd_folders.SD1, sd_folders.SD2, sd_folders.XL)
)
SMALL = XL | {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
UNION = XL | {"num_control_type": 8}


def controlled(options: dict, kind=ControlNetModel) -> dict[str, torch.Tensor]:
    return bare(partial(kind, **options)).state_dict()


def flat(options: dict, kind: str) -> dict[str, torch.Tensor]:
    unet = bare(partial(UNet2DConditionModel, **options))
    return {
        f"{part}.{key}": value
        for part, inner in ip_adapter(unet, kind).items()
        for key, value in inner.items()
    }


def adapted(**options) -> dict[str, torch.Tensor]:
    return bare(partial(T2IAdapter, **options)).state_dict()


@pytest.mark.parametrize(
    ("tensors", "kind", "base", "line"),
    [
        (lambda: controlled(SD1), "a ControlNet", "Stable Diffusion 1.x", "8 pixels for a latent cell"),
        (lambda: controlled(SD2), "a ControlNet", "Stable Diffusion 2.x", "364,228,240, 1389.4 MiB"),
        (lambda: controlled(SMALL), "a ControlNet", "Stable Diffusion XL", "3 channels"),
        (lambda: controlled(UNION, ControlNetUnionModel), "a ControlNet++ (union)", "Stable Diffusion XL",
         "segmentation, tile, inpaint"),
        (lambda: published(bare(partial(ControlNetModel, **SD1))), "a ControlNet", "Stable Diffusion 1.x",
         "8 pixels for a latent cell"),
        (lambda: adapted(), "a T2I-Adapter", "Stable Diffusion 1.x or 2.x", "320, 640, 1280, 1280"),
        (lambda: adapted(adapter_type="full_adapter_xl", downscale_factor=16), "a T2I-Adapter",
         "Stable Diffusion XL", "16 pixels for a cell"),
        (lambda: flat(sd_folders.SD1, "plain"), "an IP-Adapter", "Stable Diffusion 1.x",
         "projected vector, 24 wide"),
    ],
)  # fmt: skip
def test_kind_base_and_facts_of_published_shapes(tensors, kind, base, line, tmp_path):
    report = inspect_adapter(hollow(tmp_path / "a.safetensors", tensors()))
    assert (report.adapter, report.base_model, report.problems) == (kind, base, ())
    assert line in as_text(report)
    assert json.loads(as_json(report))["parameters"] == report.parameters > 0


def test_folders_and_what_does_not_fit(tiny, tmp_path):
    spec = read_spec(tiny)
    control, other = (
        write_control(tmp_path / "c", tiny),
        write_control(tmp_path / "d", sd_folders.write(tmp_path, "sd1")),
    )
    assert inspect_adapter(control, model=spec).problems == ()
    (problem,) = inspect_adapter(other, model=spec).problems
    assert "does not fit tiny: its input blocks have [16, 16," in problem
    assert inspect_adapter(write_t2i_adapter(tmp_path / "t", tiny), model=spec).problems == ()
    assert inspect_adapter(write_image_encoder(tmp_path / "e")).adapter == "a CLIP image encoder"
    assert inspect_adapter(tiny) is None


def test_the_command_prints_it_and_fails_on_missing_tensors(tiny, tmp_path, capsys):
    folder = write_control(tmp_path / "edges", tiny)
    assert main(["inspect", str(folder), "--base", str(tiny)]) == 0
    assert "adapter     a ControlNet" in capsys.readouterr().out
    broken = {key: value for key, value in controlled(SD1).items() if key != "controlnet_mid_block.bias"}
    assert main(["inspect", str(hollow(tmp_path / "b.safetensors", broken))]) == 1
    assert "PROBLEM     1 missing keys: controlnet_mid_block.bias" in capsys.readouterr().out


def test_an_adapter_given_as_a_model_is_named(tiny, tmp_path):
    folder = write_control(tmp_path / "edges", tiny)
    expected = "edges is a ControlNet, which is added to a model with --controlnet"
    with pytest.raises(CheckpointError, match=expected):
        identify(folder)
    with pytest.raises(ModelPathError, match=expected):
        locate(str(folder))
    with pytest.raises(ModelPathError, match="a CLIP image encoder, which is added to a model with --image"):
        locate(str(write_image_encoder(tmp_path / "e")))
