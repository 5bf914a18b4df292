"""Few-step models and LoRAs over HTTP: defaults, guidance as an input, the images of `diffusers`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import LCMScheduler

from tests.checkpoints import sd_folders
from tests.checkpoints.lora_files import ATTENTION, as_peft, random_lora, shapes_of, write_lora
from tests.helpers.clients import alone, error_of, image_of, post, together, worst_psnr
from tests.helpers.images import psnr
from tests.helpers.servers import Server

pytestmark = pytest.mark.slow

LCM = {"model": "dreamshaper", "prompt": "red apple", "seed": 7}
DMD2, LORA = "dmd2_sdxl_4step", "Hyper-SDXL-8steps-lora"


@pytest.fixture(scope="module")
def pipelines() -> dict:
    return {"dreamshaper": sd_folders.pipeline("lcm-dreamshaper"), DMD2: sd_folders.pipeline("xl")}


@pytest.fixture(scope="module")
def server(start_server, pipelines, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("few-step")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    changes = as_peft(random_lora(shapes_of(folder / DMD2, *ATTENTION)))
    lora = write_lora(folder / f"{LORA}.safetensors", changes)
    with start_server(*(folder / name for name in pipelines), LDM_LORA=f"fast={lora}") as server:
        yield server


def listed(server: Server) -> dict:
    return {model["name"]: model for model in server.client.get("/models").json()["models"]}


@torch.inference_mode()
def theirs(pipeline, **options):
    """The image that a pipeline makes from the noise of seed 7, (H, W, 3) from 0 to 255."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(1, 4, 8, 8, generator=generator)
    return (
        pipeline("red apple", latents=start, generator=generator, output_type="np", **options).images[0] * 255
    )


def test_defaults_are_the_usual_settings(server):
    models = listed(server)
    defaults = models["dreamshaper"]["defaults"]
    assert (defaults["sampler"], defaults["steps"], defaults["guidance_scale"]) == ("lcm", 4, 8.5)
    assert defaults["spacing"] is None
    assert models["dreamshaper"]["few_step"]["kind"] == "LCM"
    assert (models[DMD2]["defaults"]["sampler"], models[DMD2]["defaults"]["spacing"]) == ("lcm", "trailing")
    assert models[DMD2]["lora_settings"]["fast"] == {
        "kind": "Hyper-SD", "steps": 8, "guidance_scale": 1.0, "sampler": "ddim", "spacing": "trailing",
        "eta": 0.0,
    }  # fmt: skip
    assert not models["dreamshaper"]["loras"]


@pytest.mark.parametrize("scale", [8.5, 2.0])
def test_a_consistency_model_gives_the_image_of_diffusers(server, pipelines, scale):
    expected = theirs(pipelines["dreamshaper"], num_inference_steps=4, guidance_scale=scale)
    assert psnr(image_of(post(server, LCM | {"guidance_scale": scale})), expected) > 45


def test_guidance_scales_share_a_call_of_one_row_an_image(server):
    bodies = [LCM | {"guidance_scale": scale, "seed": seed} for seed, scale in enumerate((1.5, 4.0, 8.0))]
    images = alone(server, bodies)
    assert psnr(images[0], images[1]) < 40
    with ThreadPoolExecutor() as pool:
        assert worst_psnr(images, together(server, pool, bodies)) > 40
    calls = server.client.get("/activity").json()["calls"]
    assert calls
    assert all(call["rows"] <= 3 for call in calls)


def test_a_negative_prompt_is_refused_where_guidance_is_an_input(server):
    answer = post(server, LCM | {"negative_prompt": "blue"})
    assert error_of(answer, 422)["param"] == "negative_prompt"


def test_dmd2_gives_the_image_of_diffusers(server, pipelines):
    pipeline = pipelines[DMD2]
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    expected = theirs(pipeline, num_inference_steps=4, timesteps=[999, 749, 499, 249], guidance_scale=1.0)
    body = {"model": DMD2, "prompt": "red apple", "seed": 7}
    assert psnr(image_of(post(server, body)), expected) > 45


def test_a_lora_runs_with_the_settings_that_are_listed_for_it(server):
    body = {"model": DMD2, "prompt": "red apple", "seed": 7}
    settings = dict(listed(server)[DMD2]["lora_settings"]["fast"])
    del settings["kind"]
    with_lora = image_of(post(server, body | settings | {"loras": {"fast": 1.0}}))
    assert psnr(with_lora, image_of(post(server, body | settings))) < 40
