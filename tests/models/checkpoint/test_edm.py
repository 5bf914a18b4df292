"""Playground v2.5 and CosXL: models of SDXL's shape that were trained on noise levels (EDM)."""

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import load, save
from models.checkpoint.conversion import convert
from models.conditioning.conditioner import ConditioningInput
from models.formats.identify import identify
from models.sampling.samplers import plan
from models.sampling.step import step
from models.sampling.table import ALPHA, SIGMA, T
from tests.checkpoints import sd_files, sd_folders
from tests.helpers.numbers import relative_error

pytestmark = pytest.mark.slow

PROMPT = "red apple on a blue background!"
STEPS = 4


@torch.inference_mode()
def run(model, sampler, guidance, noise, concat=None):
    """The image of a run with Karras' noise levels."""
    table = plan(model.schedule, sampler, STEPS, spacing="karras")
    state = torch.zeros(1, 1 + table.history, 4, 8, 8)
    state[:, 0] = noise
    rows = model.step_rows(guidance)
    stacked = None if concat is None else concat[list(rows.rows)]
    contexts = [model.context_pair(ConditioningInput(PROMPT))]
    eps = model.predictor(contexts, stacked, guidance, None, rows)
    for line in torch.from_numpy(table.coeffs).float()[:, None]:
        state = step(state, eps(state[:, 0], line[:, T], line[:, ALPHA : SIGMA + 1]), line)
    return (model.decode(state[:, 0]) / 2 + 0.5).clamp(0, 1)


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "sampler", "data", "most"), [("playground", "dpmpp_2m", 0.5, 80), ("cosxl", "euler", 1.0, 120)]
)
@torch.inference_mode()
def test_runs_as_in_diffusers(tmp_path, name, sampler, data, most):
    reference = sd_folders.pipeline(name)
    reference.save_pretrained(tmp_path / name)
    model = load(tmp_path / name)
    assert (model.spec.schedule.sigma_range, model.spec.schedule.sigma_data) == ((0.002, most), data)
    assert (model.spec.defaults.sampler, model.spec.defaults.spacing) == ("dpmpp_2m", "karras")
    # Theirs starts from noise of sqrt(sigma^2 + 1), whatever the data's standard deviation is.
    start = noise() * ((most**2 + data**2) / (most**2 + 1)) ** 0.5
    theirs = reference(
        PROMPT, latents=start, num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt"
    ).images
    assert relative_error(run(model, sampler, 3.0, noise()), theirs) <= 2e-4
    save(model, tmp_path / "saved" / name, torch.float32)
    assert load(tmp_path / "saved" / name).spec == model.spec


@torch.inference_mode()
def test_cosxl_edits_with_a_scaled_latent(tmp_path):
    reference = sd_folders.pipeline("cosxl-edit")
    reference.save_pretrained(tmp_path / "cosxl-edit")
    model = load(tmp_path / "cosxl-edit")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    theirs = reference(
        PROMPT, image=image, latents=noise(), num_inference_steps=STEPS, guidance_scale=3.0,
        image_guidance_scale=1.5, output_type="pt",
    ).images  # fmt: skip
    concat = model.concat_channels(8, 8, edited=model.encode_edited(2 * image - 1))
    assert relative_error(run(model, "euler", 3.0, noise(), concat), theirs) <= 2e-4


PLAYGROUND = {"edm_mean": [-1.7, 1.9, -1.4, 2.5], "edm_std": [8.5, 5.9, 6.5, 5.2]}
COSXL = {"edm_vpred.sigma_max": [120.0], "edm_vpred.sigma_min": [0.002]}


@pytest.mark.parametrize(
    ("marks", "family", "scale", "levels"),
    [
        (PLAYGROUND, "Playground v2.5", 1.0, ((0.002, 80), 0.5, "edm")),
        (COSXL, "CosXL", 0.13025, ((0.002, 120), 1.0, "v_prediction")),
    ],
)
@torch.inference_mode()
def test_single_files(tmp_path, marks, family, scale, levels):
    row = sd_files.narrow(sd_files.ROWS["sdxl"])
    tensors = sd_files.published("sdxl", row, sd_files.reference(row))
    tensors |= {key: torch.tensor(values) for key, values in marks.items()}
    file = tmp_path / "any.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    assert identify(file).family == family
    model = load(file)
    schedule = model.spec.schedule
    assert (schedule.sigma_range, schedule.sigma_data, schedule.prediction) == levels
    assert model.spec.autoencoder.scale_factor == scale
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.autoencoder.decode(model.autoencoder.encode(x))
    assert relative_error(model.decode(model.encode(x)), expected) <= 1e-5
    convert(file, tmp_path / "any")
    again = load(tmp_path / "any").spec
    for part in ("schedule", "autoencoder", "defaults"):
        assert getattr(again, part) == getattr(model.spec, part)
