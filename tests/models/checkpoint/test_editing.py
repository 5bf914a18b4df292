"""InstructPix2Pix: models that edit an image by an instruction, with guidance by text and by image."""

import pytest
import torch

from models.checkpoint import load, save
from models.conditioning.conditioner import ConditioningInput
from models.formats.identify import identify
from tests.checkpoints import sd_folders
from tests.helpers.numbers import relative_error

pytestmark = pytest.mark.slow

PROMPT, UNWANTED = "make it a pear!", "blue"


@pytest.mark.parametrize("name", ["pix2pix", "xl-pix2pix"])
@torch.inference_mode()
def test_edits_as_in_diffusers(tmp_path, name):
    reference = sd_folders.pipeline(name)
    reference.save_pretrained(tmp_path / name)
    assert identify(tmp_path / name).family.endswith(" InstructPix2Pix")
    model = load(tmp_path / name)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    theirs = reference(
        PROMPT, image=image, negative_prompt=UNWANTED, num_inference_steps=3, guidance_scale=6.0,
        image_guidance_scale=2.0, latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)),
        output_type="pt",
    ).images  # fmt: skip
    concat = model.concat_channels(8, 8, edited=model.encode_edited(2 * image - 1))
    ours = model.sample(
        [ConditioningInput(PROMPT, UNWANTED)], [7], 3, 6.0, [concat], image_guidance_scale=2.0
    )
    assert relative_error((ours / 2 + 0.5).clamp(0, 1), theirs) <= 1e-4
    save(model, tmp_path / "saved" / name, torch.float32)
    assert load(tmp_path / "saved" / name).spec == model.spec
