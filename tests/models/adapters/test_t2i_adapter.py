"""T2I-Adapters against `diffusers`, from every layout that is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.adapters.control_net import open_control
from models.adapters.controls import Rows, scaled, weights
from models.checkpoint import CheckpointError, load
from models.formats.identify import read_spec
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import load_unet, raw_t2i, t2i_adapter
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow

KINDS = {
    "sd1": ("sd1", {}),
    "grey": ("sd1", {"channels": 1}),
    "light": ("sd1", {"light": True}),
    "xl": ("xl", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: sd_folders.write(folder, name) for name in ("sd1", "xl")}


@pytest.mark.parametrize("layout", ["folder", "file", "raw"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_eps_of_each_kind_and_layout(models, kind, layout, tmp_path):
    family, options = KINDS[kind]
    unet, ours = load_unet(models[family]), load(models[family])
    network = t2i_adapter(unet, **options)
    path = tmp_path / "adapter"
    network.save_pretrained(path)
    if layout == "file":
        path /= "diffusion_pytorch_model.safetensors"
    elif layout == "raw":
        path = tmp_path / "raw.safetensors"
        save_file(raw_t2i(network), path)
    g = torch.Generator().manual_seed(5)
    # Sides of SDXL's latents may be odd: its features have a cell for two.
    h, w = 8, 8 if family == "sd1" else 7
    x, pixels = torch.randn(2, 4, h, w, generator=g), torch.rand(2, 3, 8 * h, 8 * w, generator=g)
    context = torch.randn(2, 77, unet.config["cross_attention_dim"], generator=g)
    t, pooled, added = torch.tensor([1, 801]), None, {}
    if family == "xl":
        texts, sizes = torch.randn(2, 24, generator=g), torch.arange(12).reshape(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": texts, "time_ids": sizes}}
        pooled = torch.cat([texts, unet.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)
    control = open_control(path, ours.spec)
    rows = Rows(x, t, context, pooled)
    inputs = control.inputs(control.prepare(pixels), rows)
    strengths = torch.tensor([weights(control, "balanced", 0.6, True)] * 2)
    eps = ours.unet(*rows, adapters=scaled(inputs, strengths))
    pixels = pixels.mean(1, keepdim=True) if "channels" in options else pixels
    pixels = torch.nn.functional.pad(pixels, (0, -8 * w % network.downscale_factor, 0, 0), mode="replicate")
    features = [0.6 * feature for feature in network(pixels)]
    theirs = unet(x, t, context, down_intrablock_additional_residuals=features, **added).sample
    assert relative_error(eps, theirs) <= LIMIT
    assert relative_error(eps, ours.unet(*rows)) > 0.01
    assert not control.every_step


def test_an_adapter_of_another_model_is_refused_with_both_numbers(models, tmp_path):
    t2i_adapter(load_unet(models["xl"])).save_pretrained(tmp_path / "adapter")
    spec = read_spec(models["sd1"])
    with pytest.raises(CheckpointError, match=r"features have \(16, 32, 48, 48\) channels, the model's \(32"):
        open_control(tmp_path / "adapter", replace(spec, unet=replace(spec.unet, channels=(32, 32, 48, 48))))
    with pytest.raises(
        CheckpointError, match=r"take \(16, 16, 32, 32\) pixels for a cell, the model's \(8, 16"
    ):
        open_control(tmp_path / "adapter", read_spec(models["sd1"]))


def test_missing_tensors_are_named(models, tmp_path):
    tensors = raw_t2i(t2i_adapter(load_unet(models["sd1"])))
    tensors.pop("body.3.block2.bias")
    save_file(tensors, tmp_path / "raw.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing keys: body\.1\.resnets\.1\.block2\.bias"):
        open_control(tmp_path / "raw.safetensors", read_spec(models["sd1"]))
