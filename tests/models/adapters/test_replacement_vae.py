"""A separate VAE: from each layout it is the model's autoencoder; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from models.adapters import replacement_vae
from models.checkpoint import CheckpointError, load
from service.device.loading import build
from service.model_paths import ModelPathError, locate_vaes
from service.settings import Settings
from tests.checkpoints.tiny import tiny_model, write_tiny_model
from tests.helpers.fake_runner import make_job
from tests.helpers.torch_runner import run_jobs

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The vae folder of another model of the same shape."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=50) / "vae"


def layouts(other: Path, folder: Path) -> dict[str, Path]:
    """One VAE in each layout that is read."""
    tensors = load(other.parent).autoencoder.state_dict()
    first = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
    kinds = {
        "bare": tensors | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())},
        "prefixed": first,
        "whole": first | {"model.diffusion_model.out.2.bias": torch.zeros(4)},
    }
    for name, kind in kinds.items():
        save_file(kind, folder / f"{name}.safetensors")
    return {"folder": other, "diffusers": other / WEIGHTS} | {n: folder / f"{n}.safetensors" for n in kinds}


def test_every_layout_gives_the_autoencoder_of_diffusers(tiny, other, tmp_path):
    base, reference = load(tiny), AutoencoderKL.from_pretrained(other, low_cpu_mem_usage=False).float()
    z, x = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        decoded, encoded = reference.decode(z).sample, reference.encode(x).latent_dist.mode()
        for path in layouts(other, tmp_path).values():
            changed = replacement_vae.with_vae(base, path)
            for ours, theirs in (
                (changed.autoencoder.decode(z), decoded),
                (changed.autoencoder.encode(x), encoded),
            ):
                assert ((ours - theirs).norm() / theirs.norm()).item() <= 3e-5
            assert changed.unet is base.unet
        assert not torch.allclose(base.autoencoder.decode(z), decoded, atol=0.1)


def folder_of(other: Path, target: Path, **changes) -> Path:
    """Its folder with another configuration."""
    folder = Path(shutil.copytree(other, target))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"scaling_factor": 0.13025},
            "for another model: its scaling_factor is 0.13025, the model's 0.18215",
        ),
        ({"latent_channels": 8}, "its latent_channels is 8, the model's 4"),
        ({"norm_num_groups": 4}, "its groups is 4, the model's 8"),
        ({"use_quant_conv": False}, "use_quant_conv"),
    ],
)
def test_a_folder_of_another_shape_or_factor_is_refused(tiny, other, tmp_path, changes, named):
    folder = folder_of(other, tmp_path / "vae", **changes)
    with pytest.raises(CheckpointError, match=named):
        replacement_vae.open_vae(folder, load(tiny).spec.autoencoder)


def test_missing_and_misshaped_tensors_are_named(other, tmp_path):
    own, tensors = tiny_model().spec.autoencoder, load_file(other / WEIGHTS)
    bias = "decoder.conv_in.bias"
    for change, named in (
        ({bias: torch.zeros(3)}, rf"1 misshaped keys: {bias} \(3,\)"),
        ({"more": torch.zeros(1)}, "1 unexpected keys: more"),
        ({bias: None}, f"1 missing keys: {bias}"),
    ):
        kept = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        save_file(kept, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=named):
            replacement_vae.open_vae(tmp_path / "bad.safetensors", own)


def test_it_decodes_what_the_service_makes(tiny, other):
    job = make_job("x", model="tiny", width=64, height=64)
    settings = Settings(dtype="float32", device="cpu", vae=(str(other),))
    (changed,) = run_jobs(build(settings, {"tiny": tiny}), job)["x"]
    (own,) = run_jobs(build(Settings(dtype="float32", device="cpu"), {"tiny": tiny}), job)["x"]
    assert changed != own
    with pytest.raises(CheckpointError, match="does not fit"):
        build(Settings(device="cpu", vae=(str(tiny / "unet" / WEIGHTS),)), {"tiny": tiny})


def test_which_model_it_is_for(other):
    assert locate_vaes([str(other)], ["a"]) == {"a": other}
    assert locate_vaes([f"b={other}"], ["a", "b"]) == {"b": other}
    for named, message in (
        ([str(other)], "with MODEL one of a, b"),
        (["a=nowhere"], "no VAE at 'nowhere'"),
        ([f"a={other}"] * 2, "two VAEs are given for 'a'"),
    ):
        with pytest.raises(ModelPathError, match=message):
            locate_vaes(named, ["a", "b"])
