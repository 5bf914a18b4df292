"""SDXL's refiner: conditioned on an aesthetic score, with the second text encoder alone."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from models.checkpoint import load, save
from models.conditioning.conditioner import ConditioningInput
from models.formats.identify import identify
from models.sampling.samplers import plan
from models.sampling.step import step
from models.sampling.table import ALPHA, SIGMA, T
from tests.checkpoints import sd_folders
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow

PROMPT = "red apple on a blue background!"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(the pipeline, the model in the folder that it was saved in)."""
    reference = sd_folders.pipeline("xl-refiner")
    folder = tmp_path_factory.mktemp("refiner") / "xl-refiner"
    reference.save_pretrained(folder)
    assert identify(folder).family == "Stable Diffusion XL refiner"
    return reference, load(folder)


@torch.inference_mode()
@pytest.mark.parametrize("unwanted", ["", "blue pear"])
def test_conditions(pair, unwanted):
    """An empty negative prompt is encoded as any other; the scores are 2.5 and 6."""
    reference, ours = pair
    context = ours.context_pair(ConditioningInput(PROMPT, unwanted, size=(64, 96)))
    tokens, null, pooled, null_pooled = reference.encode_prompt(PROMPT, negative_prompt=unwanted or None)
    assert relative_error(context.tokens, torch.cat([null, tokens])) <= LIMIT
    assert relative_error(context.pooled[:, :24], torch.cat([null_pooled, pooled])) <= LIMIT
    ids = torch.tensor([[96, 64, 0, 0, 2.5], [96, 64, 0, 0, 6.0]])
    expected = reference.unet.add_time_proj(ids.flatten()).reshape(2, -1)
    assert relative_error(context.pooled[:, 24:], expected) <= LIMIT


@torch.inference_mode()
def test_an_image_is_refined_as_in_diffusers(pair, monkeypatch):
    reference, ours = pair
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    theirs = reference(
        PROMPT, image=image, strength=0.6, num_inference_steps=5, guidance_scale=5.0, output_type="pt",
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    table = plan(ours.schedule, "ddim", 5, strength=0.6)
    x = table.start[0] * ours.encode(2 * image - 1) + table.start[1] * noise
    eps = ours.predictor([ours.context_pair(ConditioningInput(PROMPT))], None, 5.0)
    for line in torch.from_numpy(table.coeffs).float()[:, None]:
        x = step(x[:, None], eps(x, line[:, T], line[:, ALPHA : SIGMA + 1]), line)[:, 0]
    assert relative_error((ours.decode(x) / 2 + 0.5).clamp(0, 1), theirs) <= 1e-4


def test_a_saved_refiner_is_the_same(pair, tmp_path):
    save(pair[1], tmp_path / "xl-refiner", torch.float32)
    assert load(tmp_path / "xl-refiner").spec == pair[1].spec
