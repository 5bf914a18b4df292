"""The second pass at a larger size, on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from torch.nn.functional import interpolate

from models.checkpoint import load, save
from models.sampling.samplers import plan
from models.tiles import cut, merge
from models.upscalers import covering_size
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Previewed, Started
from service.engine.job import Hires, Refiner
from tests.checkpoints.sd_folders import pipeline
from tests.checkpoints.tiny import random_model, upscaler_spec, write_tiny_model
from tests.helpers.fake_runner import make_job, of, outcomes
from tests.helpers.images import psnr
from tests.helpers.torch_runner import KEY, run_jobs

FIELDS = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 4.0}
HIRES = Hires(128, 96, 4, 0.5, "latent", "p", "")


def hires(**changes) -> Hires:
    return Hires(**(vars(HIRES) | changes))


def pixels(image: bytes, width: int, height: int) -> np.ndarray:
    return np.frombuffer(image, np.uint8).reshape(height, width, 3)


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save(random_model(replace(upscaler_spec(), name="up")), folder / "up")
    return {"m": tiny, "k": write_tiny_model(folder / "k", seed=1), "up": folder / "up"}


@pytest.fixture
def runner(paths: dict[str, Path]) -> TorchRunner:
    return TorchRunner(Registry(paths, load), (8,), invariant=True)


def second_noise(seed: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(4, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("upscaler", ["lanczos", "nearest"])
def test_the_second_pass_is_image_to_image_from_the_resampled_first_image(runner, upscaler):
    own = hires(
        width=128, height=128, upscaler=upscaler, steps=6, strength=0.7, prompt="q", negative_prompt="r"
    )
    (image,) = run_jobs(runner, make_job("a", **FIELDS, hires=own, seed=3))["a"]
    (first,) = run_jobs(runner, make_job("a", **FIELDS, seed=3))["a"]
    resampling = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[upscaler]
    enlarged = np.asarray(Image.fromarray(pixels(first, 64, 64)).resize((128, 128), resampling))
    again = make_job(
        "a", **FIELDS | {"width": 128, "height": 128, "steps": 6}, prompt="q", negative_prompt="r",
        image=enlarged.tobytes(), strength=0.7, seed=3,
    )  # fmt: skip
    assert image == run_jobs(runner, again)["a"][0]


@pytest.mark.parametrize(
    ("upscaler", "mode", "antialias"),
    [
        ("latent", "bilinear", False),
        ("latent_bicubic_antialiased", "bicubic", True),
        ("latent_nearest_exact", "nearest-exact", False),
    ],
)
@torch.inference_mode()
def test_the_latent_is_interpolated_and_noise_of_the_same_seed_added(runner, upscaler, mode, antialias):
    job = make_job("a", **FIELDS, hires=hires(width=96, height=96, upscaler=upscaler), seed=3)
    runner.shape(job)
    runner.start(job)
    while not runner.jobs["a"].ends_phase(runner.jobs["a"].images[0]):
        runner.step([KEY])
    z = runner.jobs["a"].images[0].x
    expected = interpolate(z[None], (12, 12), mode=mode, antialias=antialias)[0]
    assert runner.prepare(KEY)
    alpha, sigma = plan(runner.registry["m"].schedule, "ddim", 4, 0.0, 0.5).start
    image = runner.jobs["a"].images[0]
    assert torch.allclose(image.x, alpha * expected + sigma * second_noise(3, 12, 12), atol=1e-5)
    assert torch.equal(image.x_0, expected)


@pytest.mark.parametrize(
    ("size", "target", "covering"),
    [
        ((64, 64), (128, 96), (128, 128)),
        ((64, 32), (64, 64), (128, 64)),
        ((512, 768), (1024, 1536), (1024, 1536)),
    ],
)
def test_an_image_of_other_proportions_is_cropped(size, target, covering):
    assert covering_size(size, target) == covering


def test_one_job_counts_the_steps_of_both_passes_and_previews_both(runner):
    events: list = []
    engine = Engine(runner, events.append, 8, 4, iter(range(10**6)).__next__)
    engine.submit(make_job("a", **FIELDS, hires=HIRES, n=2, preview_every=1, preview_decoded=True))
    while engine.busy:
        engine.tick()
    assert of(events, Started) == [Started("a", 2 * (4 + 2))]
    previews = {(event.step, event.width, event.height) for event in of(events, Previewed)}
    assert previews == {*((step, 64, 64) for step in (1, 2, 3, 4)), (5, 128, 96)}
    assert outcomes(events) == {"a": "done"}


@pytest.mark.parametrize(("upscaler", "ticks"), [("lanczos", 2), ("lanczos", 4), ("lanczos", 5), ("up", 8)])
def test_an_interrupted_job_has_images_of_the_final_size(runner, upscaler, ticks):
    events: list = []
    engine = Engine(runner, events.append, 8, 1, iter(range(10**6)).__next__)
    engine.submit(
        make_job("a", **FIELDS, hires=hires(upscaler=upscaler, model=upscaler == "up"), preview_every=10)
    )
    for _ in range(ticks):
        engine.tick()
    engine.interrupt("a")
    while engine.busy:
        engine.tick()
    assert [len(image) for image in events[-1].images] == [128 * 96 * 3]


def test_an_upscaling_model_enlarges_the_image_between_the_passes(runner):
    own = hires(width=96, height=96, upscaler="up", model=True, strength=0.5)
    (image,) = run_jobs(runner, make_job("a", **FIELDS, hires=own, seed=3))["a"]
    (first,) = run_jobs(runner, make_job("a", **FIELDS, seed=3))["a"]
    spec = runner.specs["up"]
    factor, defaults = spec.autoencoder.factor, spec.defaults
    upscaled = make_job(
        "up", model="up", width=64 * factor, height=64 * factor, scale=factor, image=first, seed=3,
        prompt="p",
        steps=defaults.steps, sampler=defaults.sampler, eta=defaults.eta, noise_level=defaults.noise_level,
        guidance_scale=defaults.guidance_scale if spec.guided else 1.0,
    )  # fmt: skip
    tiles = cut(64, 64, spec.tile)
    assert len(tiles.corners) > 1
    side = factor * tiles.size[0]
    parts = (pixels(part, side, side) for part in run_jobs(runner, upscaled)["up"])
    whole = Image.fromarray(merge(parts, tiles, factor).round().astype(np.uint8))
    enlarged = np.asarray(whole.resize((96, 96), Image.Resampling.LANCZOS))
    again = make_job(
        "a", **FIELDS | {"width": 96, "height": 96}, image=enlarged.tobytes(), strength=0.5, seed=3
    )
    assert image == run_jobs(runner, again)["a"][0]


def test_neighbours_change_no_bit(runner):
    jobs = [
        make_job("plain", **FIELDS),
        make_job("large", **FIELDS | {"width": 128, "height": 96}),
        make_job("hires", **FIELDS, hires=HIRES, n=2),
        make_job("lanczos", **FIELDS, hires=hires(upscaler="lanczos"), sampler="euler_ancestral"),
        make_job("model", **FIELDS, hires=hires(upscaler="up", model=True), preview_every=1),
        make_job(
            "upscaler",
            **FIELDS | {"model": "up", "width": 128, "height": 128},
            scale=4,
            image=bytes(32 * 32 * 3),
        ),
        make_job("interval", **FIELDS, hires=HIRES, guidance_start=0.5, guidance_rescale=0.7),
        make_job("refined", **FIELDS, hires=hires(strength=1.0), refiner=Refiner("k", 0.5)),
        make_job("refiner", **FIELDS, refiner=Refiner("k", 0.5)),
    ]
    together = run_jobs(runner, *jobs)
    assert together == {job.id: run_jobs(runner, job)[job.id] for job in jobs}
    assert len(set(together.values())) == len(jobs)


@torch.inference_mode()
def test_the_second_pass_is_that_of_diffusers(tmp_path):
    base = pipeline("sd1")
    base.save_pretrained(tmp_path / "m")
    second = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    texts = {"prompt": "red apple", "negative_prompt": "pear", "guidance_scale": 4.0}
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    z = base(**texts, num_inference_steps=5, latents=start, output_type="latent").images
    z = interpolate(z, (16, 16), mode="bilinear")
    noised = torch.Generator().manual_seed(7)
    expected = (
        second(
            **texts, image=z, strength=0.6, num_inference_steps=10, generator=noised, output_type="np"
        ).images[0]
        * 255
    )
    job = make_job(
        "a", **FIELDS | {"steps": 5}, prompt="red apple", negative_prompt="pear", seed=7,
        hires=Hires(128, 128, 10, 0.6, "latent", "red apple", "pear"),
    )  # fmt: skip
    runner = TorchRunner(Registry({"m": tmp_path / "m"}, load), (2,))
    (image,) = run_jobs(runner, job)["a"]
    assert psnr(pixels(image, 128, 128), expected) > 40
