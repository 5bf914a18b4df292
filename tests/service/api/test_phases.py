"""Requests whose runs have several phases, over HTTP: hires, refiner, guidance in a part of the run."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints.tiny import write_tiny_model
from tests.helpers.clients import error_of, image_of, open_image, post
from tests.helpers.images import base64_of, psnr
from tests.helpers.servers import Server, wait_until

BODY = {"model": "tiny", "prompt": "red apple", "seed": 3, "steps": 4}
HIRES = {"scale": 1.5, "strength": 0.5, "upscaler": "lanczos"}
REFINER = {"model": "refiner", "switch_at": 0.5}
MIXED = [
    BODY,
    BODY | {"hires": HIRES, "n": 2},
    BODY | {"hires": HIRES | {"upscaler": "latent", "prompt": "blue pear"}, "sampler": "euler_ancestral"},
    BODY | {"hires": HIRES, "refiner": REFINER, "guidance_end": 0.5},
    BODY | {"refiner": REFINER, "guidance_rescale": 0.7},
    BODY | {"model": "refiner", "guidance_start": 0.25, "guidance_end": 0.75},
    BODY | {"width": 96, "height": 96},
]


@pytest.fixture(scope="module")
def phased(start_server, tiny, tmp_path_factory) -> Iterator[Server]:
    """A server of two models, whose images do not depend on other jobs."""
    refiner = write_tiny_model(tmp_path_factory.mktemp("models") / "refiner", seed=1)
    with start_server(tiny, refiner, LDM_INVARIANT="1", LDM_BUCKETS="8") as server:
        yield server


def files(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [image["data"] for image in answer.json()["images"]]


def test_all_phases_share_calls_without_changing_a_bit(phased):
    alone = [files(post(phased, body)) for body in MIXED]
    with ThreadPoolExecutor(len(MIXED)) as pool:
        assert list(pool.map(lambda body: files(post(phased, body)), MIXED)) == alone
    assert len({file for each in alone for file in each}) == sum(map(len, alone))


@pytest.mark.parametrize("step", [5, 25, 34])
def test_a_crash_in_any_phase_changes_no_bit(phased, step):
    """The first pass has 20 UNet calls, the second 10 of the base and then 10 of the refiner."""
    request = BODY | {"steps": 20, "hires": HIRES | {"strength": 1.0}, "refiner": REFINER}
    body = {"task": "generate", "request": request}
    job = "/jobs/" + phased.client.post("/jobs", json=body).json()["id"]
    wait_until(lambda: phased.client.get(job).json()["step"] >= step)
    os.kill(phased.worker(), signal.SIGKILL)
    wait_until(lambda: phased.client.get(job).json()["status"] not in ("queued", "running"))
    ended = phased.client.get(job).json()
    assert [image["data"] for image in ended["result"]["images"]] == files(post(phased, request))


def test_the_image_has_the_size_of_the_second_pass_and_is_repeated_by_its_parameters(phased):
    made = post(phased, BODY | {"hires": HIRES, "width": 64, "height": 72})
    assert [(image["width"], image["height"]) for image in made.json()["images"]] == [(96, 104)]
    (warning,) = made.json()["warnings"]
    assert warning == "hires gives 96x108, which was reduced to 96x104: sides are multiples of 8"
    parameters = json.loads(open_image(made).text["parameters"])
    assert (parameters["width"], parameters["height"]) == (64, 72)
    assert image_of(made).shape == (104, 96, 3)
    assert (image_of(post(phased, parameters)) == image_of(made)).all()


def test_the_second_pass_is_image_to_image(phased):
    first = open_image(post(phased, BODY)).convert("RGB")
    enlarged = first.resize((96, 96), Image.Resampling.LANCZOS)
    second = BODY | {"init_image": base64_of(enlarged), "strength": 0.5}
    assert (image_of(post(phased, second)) == image_of(post(phased, BODY | {"hires": HIRES}))).all()


def test_one_job_counts_the_calls_of_both_passes(phased):
    body = {"task": "generate", "request": BODY | {"hires": HIRES}, "preview_every": 1}
    job = phased.client.post("/jobs", json=body).json()
    events = phased.client.get(f"/jobs/{job['id']}/events").text
    states = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    running = [state for state in states if state.get("steps")]
    assert {state["steps"] for state in running} == {4 + 2}
    assert [state["step"] for state in running] == sorted(state["step"] for state in running)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"hires": {"scale": 1.0}}, "hires.scale"),
        ({"hires": {"scale": 8.5}}, "hires.scale"),
        ({"hires": {"width": 32}}, "hires.width"),
        ({"hires": {"scale": 8}, "width": 512, "height": 512}, "hires.scale"),
        ({"hires": {"upscaler": "refiner"}}, "hires.upscaler"),
        ({"hires": {"strength": 0.0}}, "hires.strength"),
        ({"hires": {"steps": 60}, "sampler": "lcm"}, "hires.steps"),
        ({"hires": {"prompt": "(a:99)"}, "prompt_weights": True}, "hires.prompt"),
        ({"hires": {"noise": 1}}, "hires.noise"),
        ({"hires": {}, "refiner": {"model": "tiny"}}, "refiner.model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_field(phased, changes, param):
    assert error_of(post(phased, BODY | changes), 422)["param"] == param


def test_a1111s_hires_fix_is_the_native_one(bundled):
    body = {"prompt": "red apple", "steps": 6, "cfg_scale": 3, "seed": 7, "sampler_name": "Euler"}
    body |= {"width": 64, "height": 64}
    body |= {"enable_hr": True, "denoising_strength": 0.6, "hr_scale": 1.5, "hr_second_pass_steps": 3}
    body |= {"hr_upscaler": "Latent (antialiased)", "hr_prompt": "green apple"}
    answer = bundled.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    for line in ("Denoising strength: 0.6", "Hires upscale: 1.5", "Hires steps: 3", "Size: 64x64"):
        assert line in info["infotexts"][0]
    native = {"prompt": "red apple", "steps": 6, "guidance_scale": 3.0, "seed": 7, "sampler": "euler"}
    native |= {"width": 64, "height": 64, "prompt_syntax": "a1111"}
    # int(3 / 0.6) = 5 steps, of which the last 3 run
    hires = {"scale": 1.5, "steps": 5, "strength": 0.6, "upscaler": "latent_antialiased"}
    hires["prompt"] = "green apple"
    expected = image_of(post(bundled, native | {"hires": hires}))
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))))
    assert made.shape == (96, 96, 3)
    assert psnr(made, expected) > 40


def test_an_upscaling_model_may_enlarge_the_image_between_the_passes(bundled):
    body = {"model": "emoji", "prompt": "red apple", "steps": 3, "seed": 7, "width": 64, "height": 64}
    hires = {"upscaler": "emoji-upscale", "strength": 0.6, "scale": 2.0}
    made = image_of(post(bundled, body | {"hires": hires}))
    first = base64_of(open_image(post(bundled, body)).convert("RGB"))
    answer = bundled.client.post("/upscale", json={"model": "emoji-upscale", "image": first, "seed": 7})
    enlarged = open_image(answer).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
    second = body | {"init_image": base64_of(enlarged), "strength": 0.6, "width": 128, "height": 128}
    assert psnr(made, image_of(post(bundled, second))) > 40
    a1111 = {"prompt": "red apple", "steps": 3, "enable_hr": True, "hr_upscaler": "emoji-upscale"}
    answer = bundled.client.post("/sdapi/v1/txt2img", json=a1111 | {"width": 64, "height": 64})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "names",
    [
        {"hr_sampler_name": "Euler"},
        {"scheduler": "Karras", "hr_scheduler": "Karras"},
        {"hr_scheduler": "Automatic"},
    ],
)
def test_a1111s_hires_fix_takes_the_names_of_the_first_pass(bundled, names):
    body = {"prompt": "red apple", "steps": 1, "width": 64, "height": 64, "enable_hr": True}
    assert bundled.client.post("/sdapi/v1/txt2img", json=body | names).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler"),
        ({"hr_scheduler": "Karras"}, "hr_scheduler"),
        ({"hr_sampler_name": "DDIM"}, "hr_sampler_name"),
        ({"hr_checkpoint_name": "other"}, "hr_checkpoint_name"),
        ({"denoising_strength": 0.0}, "denoising_strength"),
        ({"hr_resize_x": 32, "hr_resize_y": 32}, "hr_resize_x"),
        ({"firstphase_width": 64}, "firstphase_width"),
        ({"hr_scale": 1.0}, "hr_scale"),
    ],
)
def test_a1111s_hires_fix_refuses_what_is_not_done(bundled, changes, param):
    body = {"prompt": "red apple", "steps": 2, "enable_hr": True, "sampler_name": "Euler"} | changes
    assert error_of(bundled.client.post("/sdapi/v1/txt2img", json=body), 422)["param"] == param
