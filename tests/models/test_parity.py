"""Networks and whole runs against the `diffusers` package, on the same random weights."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.checkpoint import load
from tests.checkpoints.tiny import byte_tokenizer, fill_randomly
from tests.helpers.numbers import LIMIT, relative_error

PROMPTS = ["red apple on a blue background", ""]


def sd1(tokenizer):
    """Stable Diffusion 1.x, small: 8 heads everywhere, no attention at the deepest level."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64, 64), cross_attention_dim=48, attention_head_dim=8,
        norm_num_groups=16,
    )  # fmt: skip
    return unet, DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def sd2(tokenizer):
    """Stable Diffusion 2.x, small: heads and depth by level, linear projections, v-prediction."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 96), cross_attention_dim=48, attention_head_dim=(2, 4, 6),
        norm_num_groups=16, use_linear_projection=True, layers_per_block=1,
        transformer_layers_per_block=(1, 2, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet, DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="v_prediction",
    )  # fmt: skip


@pytest.fixture(scope="module", params=[sd1, sd2], ids=["sd1", "sd2"])
def pair(request, tmp_path_factory):
    """(the reference pipeline, what we load from the folder that it saved)."""
    tokenizer = byte_tokenizer()
    unet, scheduler = request.param(tokenizer)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), layers_per_block=2, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=96, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip
    for seed, network in enumerate((unet, vae, text)):
        fill_randomly(network, seed)
    reference = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return reference, load(folder)


@torch.inference_mode()
def test_eps(pair):
    reference, ours = pair
    x, t, context = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 77, 48)
    assert relative_error(ours.unet(x, t.float(), context), reference.unet(x, t, context).sample) <= LIMIT


@torch.inference_mode()
def test_sides_need_not_be_equal(pair):
    reference, ours = pair
    x, t, context = torch.randn(1, 4, 16, 8), torch.tensor([321]), torch.randn(1, 77, 48)
    assert relative_error(ours.unet(x, t, context), reference.unet(x, t, context).sample) <= LIMIT


@torch.inference_mode()
def test_decode(pair):
    reference, ours = pair
    z = torch.randn(2, 4, 8, 8)
    assert relative_error(ours.autoencoder.decode(z), reference.vae.decode(z).sample) <= LIMIT


@torch.inference_mode()
def test_encode(pair):
    reference, ours = pair
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    theirs = reference.vae.encode(x).latent_dist
    assert relative_error(ours.autoencoder.encode(x), theirs.mode()) <= LIMIT
    assert relative_error(ours.autoencoder.moments(x)[1], theirs.logvar) <= LIMIT


@torch.inference_mode()
def test_text_context(pair):
    reference, ours = pair
    prompts = [*PROMPTS, "Ünïcode 🍎, long " + "and longer " * 20]
    ids = reference.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    theirs = reference.text_encoder(ids).last_hidden_state
    assert relative_error(ours.conditioner(prompts), theirs) <= LIMIT
    assert relative_error(ours.conditioner.from_ids(ids), theirs) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("scale", [5.0])
@torch.inference_mode()
def test_the_final_picture_of_a_guided_run(pair, scale):
    reference, ours = pair
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = reference(
        PROMPTS[0], num_inference_steps=10, guidance_scale=scale, latents=noise, output_type="pt"
    ).images
    ours_x = ours.sample(PROMPTS[:1], [0], 10, scale)
    assert relative_error((ours_x / 2 + 0.5).clamp(0, 1), picture) <= 1e-4
