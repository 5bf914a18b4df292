"""Images beside the prompt in the context of the retrieval-augmented model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.formats.identify import read_spec
from models.latent_diffusion import LatentDiffusion
from tests.checkpoints.ldm_models import write


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LatentDiffusion:
    return load(write(tmp_path_factory.mktemp("models"), "rdm768"))


@torch.inference_mode()
def test_vectors_of_length_1_follow_the_prompts_and_the_unconditional_row_is_zeros(model):
    text = model.context_pair(ConditioningInput("red apple")).tokens  # (2, 1, C)
    vectors = 3 * torch.randn(4, text.shape[-1], generator=torch.Generator().manual_seed(1))
    inputs = ConditioningInput("red apple", neighbours=vectors)
    tokens = model.context_pair(inputs).tokens
    wanted = torch.cat([text[1], vectors / vectors.norm(dim=-1, keepdim=True)])
    torch.testing.assert_close(tokens[1], wanted)
    assert (tokens[0] == 0).all()
    assert model.context_shape(inputs) == tokens.shape[1:] == (5, text.shape[-1])


@torch.inference_mode()
def test_a_negative_prompt_has_zeros_in_place_of_the_neighbours(model):
    vectors = torch.ones(2, model.spec.unet.context_width)
    tokens = model.context_pair(ConditioningInput("apple", "red", neighbours=vectors)).tokens
    assert (tokens[0, :1] != 0).any()
    assert (tokens[0, 1:] == 0).all()


@torch.inference_mode()
def test_neighbours_change_the_image_and_their_order_does_not(model):
    vectors = torch.randn(2, model.spec.unet.context_width, generator=torch.Generator().manual_seed(1))
    none, some, turned = (
        model.sample(
            [ConditioningInput("apple", neighbours=given)], [1], steps=2, guidance_scale=5.0, size=(128, 128)
        )
        for given in (None, vectors, vectors.flip(0))
    )
    assert (some - none).abs().mean() > 0.01
    torch.testing.assert_close(some, turned, atol=1e-4, rtol=0)


def test_which_models_take_neighbours(tiny: Path, model):
    assert model.spec.takes_neighbours
    assert not read_spec(tiny).takes_neighbours
