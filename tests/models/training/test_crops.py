"""The upscaler's data: sharp images and degraded ones; and the measure of visible seams."""

import numpy as np
import torch
from PIL import Image

from models.spec import ScheduleSpec, UpscalingSpec
from models.training.crops import as_jpeg, dead_leaves, degrade, draw_crop, larger, smaller
from models.training.evaluate import psnr
from models.training.evaluate_upscaler import seams
from models.training.scenes import SIZE, Atlas
from models.training.upscaler import batches, make_network, parts
from tests.checkpoints.tiny import random_model, upscaler_spec
from tests.helpers.environment import needs_font


def test_dead_leaves_vary_with_the_seed() -> None:
    images = [dead_leaves(np.random.default_rng(seed)) for seed in range(6)]
    for image in images:
        assert image.shape == (SIZE, SIZE, 3)
        assert image.std() > 3
    assert psnr(images[0], images[1]) < 20
    assert (dead_leaves(np.random.default_rng(0)) == images[0]).all()


@needs_font
def test_crops_are_of_glyphs_and_of_leaves() -> None:
    atlas, rng = Atlas(("red apple", "rocket", "ghost")), np.random.default_rng(0)
    crops = [draw_crop(atlas, rng) for _ in range(8)]
    assert all(crop.shape == (SIZE, SIZE, 3) and crop.dtype == np.uint8 for crop in crops)


def test_degraded_images_resemble_the_resampled_one() -> None:
    rng = np.random.default_rng(0)
    image = dead_leaves(rng)
    clean = smaller([image])[0]
    kinds = [psnr(degrade(image, rng), clean) for _ in range(40)]
    assert min(kinds) > 12  # every one shows it
    assert np.mean(np.array(kinds) > 30) > 0.3  # many are only resampled
    assert np.mean(np.array(kinds) < 30) > 0.2  # and many are worse
    files = [as_jpeg(Image.fromarray(clean), quality) for quality in (40, 95)]
    assert psnr(files[0], clean) < psnr(files[1], clean)


def test_smaller_and_larger_are_inverse_in_size() -> None:
    image = dead_leaves(np.random.default_rng(1))
    assert larger(smaller([image])).shape == (1, SIZE, SIZE, 3)


def test_jumps_at_tile_borders_are_measured() -> None:
    reference = np.zeros((8, 32, 3), np.uint8)
    grain = np.random.default_rng(0).integers(0, 20, reference.shape).astype(np.uint8)
    stepped = grain.copy()
    stepped[:, 16:] += 60
    assert seams(grain, reference, [16]) < 2
    assert seams(stepped, reference, [16]) > 4


def test_parts_of_crops_have_64_pixels_a_side() -> None:
    crops = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    batch = next(parts(crops, 5, seed=0))
    assert batch.shape == (5, 3, 64, 64)
    assert batch.min() >= -1
    assert batch.max() <= 1


def test_low_resolution_images_have_noise_of_the_given_level() -> None:
    autoencoder = random_model(upscaler_spec()).autoencoder
    data = {"latents": torch.zeros(4, 4, 8, 8), "low": torch.full((4, 3, 3, 8, 8), 255, dtype=torch.uint8)}
    spec = UpscalingSpec(ScheduleSpec(0.0001, 0.02, "linear"), 350, residual=True)
    batch = next(batches(data, autoencoder, 2.0, spec, 64, seed=0))
    assert torch.allclose(batch.concat_channels[:, 3:], -batch.z)  # nothing but what the resampled image has
    spread = batch.concat_channels[:, :3].flatten(1).std(1)
    assert (spread[batch.level == 0] < 0.02).all()
    assert (spread[batch.level > 200] > 0.3).all()
    assert 0.4 < (batch.level == 0).float().mean() < 0.8


def test_neighbouring_noise_levels_start_with_similar_embeddings() -> None:
    table = make_network(upscaler_spec().unet).label_emb.weight
    near = torch.nn.functional.cosine_similarity(table[4], table[5], dim=0)
    far = torch.nn.functional.cosine_similarity(table[0], table[9], dim=0)
    assert near > far
