"""Tiny VAEs in the layouts in which they are published, against `diffusers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from models.adapters.tiny_vae import open_decoder
from models.errors import CheckpointError
from tests.checkpoints.tiny import fill_randomly, tiny_spec, upscaler_spec
from tests.helpers.numbers import LIMIT, relative_error

LATENT = 4 * torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
SPEC = tiny_spec().autoencoder


@pytest.fixture(scope="module")
def reference() -> AutoencoderTiny:
    network = AutoencoderTiny().eval()
    fill_randomly(network, 0)
    return network


@pytest.fixture(scope="module")
def files(reference: AutoencoderTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every layout."""
    folder = tmp_path_factory.mktemp("taesd")
    reference.save_pretrained(folder / "folder")
    state = load_file(folder / "folder" / "diffusion_pytorch_model.safetensors")
    raw = {}
    for key, tensor in state.items():
        part, _, number, rest = key.split(".", 3)
        if part == "decoder":
            raw[f"{int(number) + 1}.{rest}"] = tensor
    combined = {f"taesd_decoder.{key}": tensor for key, tensor in raw.items()}
    combined |= {
        "taesd_encoder.0.weight": torch.zeros(1),
        "vae_scale": torch.ones(()),
        "vae_shift": torch.zeros(()),
    }
    save_file(raw, folder / "taesd_decoder.safetensors")
    save_file(combined, folder / "combined.safetensors")
    torch.save(raw, folder / "taesd_decoder.pth")
    return {
        "folder": folder / "folder",
        "diffusers": folder / "folder" / "diffusion_pytorch_model.safetensors",
        "raw": folder / "taesd_decoder.safetensors",
        "pickle": folder / "taesd_decoder.pth",
        "combined": folder / "combined.safetensors",
    }


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["folder", "diffusers", "raw", "pickle", "combined"])
def test_every_layout_decodes_as_diffusers_does(files, reference, layout):
    decoder = open_decoder(files[layout], SPEC, allow_pickle=True)
    expected = reference.decode(LATENT).sample
    assert expected.shape == (1, 3, 48, 40)
    assert relative_error(decoder(LATENT), expected) <= LIMIT


def test_files_that_do_not_fit_are_refused_by_name(files, tmp_path):
    with pytest.raises(CheckpointError, match="cells of 8 pixels, the model's 4 and 4"):
        open_decoder(files["raw"], upscaler_spec().autoencoder)
    with pytest.raises(CheckpointError, match="pickle"):
        open_decoder(files["pickle"], SPEC)
    state = load_file(files["raw"])
    del state["19.bias"]
    save_file(state, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError, match=r"missing.*19\.bias"):
        open_decoder(tmp_path / "incomplete.safetensors", SPEC)
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no decoder"):
        open_decoder(tmp_path / "other.safetensors", SPEC)


def test_a_folder_of_another_kind_is_refused(files, tmp_path):
    config = json.loads((files["folder"] / "config.json").read_text())
    for name, value in (("_class_name", "AutoencoderKL"), ("act_fn", "silu")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=value):
            open_decoder(tmp_path, SPEC)
