from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from models.sampling import samplers
from service.api.a1111.samplers import SAMPLERS, choose_sampler
from service.api.a1111.schemas import TextToImage


@pytest.mark.parametrize(
    ("name", "scheduler", "ours"),
    [
        ("Euler a", "automatic", ("euler_ancestral", None)),
        ("Euler a", "Automatic", ("euler_ancestral", None)),
        ("Euler a", "", ("euler_ancestral", None)),
        ("k_euler_a", None, ("euler_ancestral", None)),
        ("Euler a", "Karras", ("euler_ancestral", "karras")),
        ("Euler a Karras", None, ("euler_ancestral", "karras")),
        ("Euler a", "exponential", ("euler_ancestral", "exponential")),
        ("Euler", "Karras", ("euler", "karras")),
        ("Euler", "simple", ("euler", "simple")),
        ("euler", "SGM Uniform", ("euler", "sgm_uniform")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M", "Karras", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M Karras", "Automatic", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M Karras", "Exponential", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M SGM Uniform", None, ("dpmpp_2m", "sgm_uniform")),
        ("DPM++ 2M", "polyexponential", ("dpmpp_2m", "exponential")),
        ("DPM++ 2M", "uniform", ("dpmpp_2m", "linspace")),
        ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ SDE Karras", None, ("dpmpp_sde", "karras")),
        ("DPM++ 3M SDE", "Beta", ("dpmpp_3m_sde", "beta")),
        ("Heun", None, ("heun", None)),
        ("LMS Karras", None, ("lms", "karras")),
        ("DPM2", "Automatic", ("dpm2", "karras")),
        ("k_dpm_2_a", "Simple", ("dpm2_ancestral", "simple")),
        ("TCD", "Karras", ("tcd", None)),
        ("PLMS", None, ("plms", None)),
        ("DDIM", "normal", ("ddim", None)),
        ("euler_ancestral", "normal", ("euler_ancestral", "linspace")),  # ComfyUI's names
        ("dpmpp_2m", "karras", ("dpmpp_2m_karras", None)),
        (None, None, ("euler", None)),
    ],
)
def test_samplers_by_a1111s_names(name, scheduler, ours):
    choice = choose_sampler(TextToImage(sampler_name=name, scheduler=scheduler))
    assert (choice.sampler, choice.spacing) == ours


def test_every_combination_is_a_native_sampler_and_spacing():
    for row in SAMPLERS.values():
        for native, spacing in row.native.values():
            assert native in samplers.SAMPLERS
            assert spacing is None or spacing in samplers.spacings_of(native)


def test_eta_is_for_ddim_and_turns_euler_a_into_euler():
    assert choose_sampler(TextToImage(sampler_name="DDIM", eta=0.5)).eta == 0.5
    assert choose_sampler(TextToImage(sampler_name="UniPC", eta=1.0)).eta is None
    assert choose_sampler(TextToImage(sampler_name="Euler a", eta=0)).sampler == "euler"
    assert choose_sampler(TextToImage(sampler_name="Euler a Karras", eta=0)).spacing == "karras"


def test_euler_a_without_noise_is_euler_over_http(bundled):
    small = {"prompt": "apple", "steps": 3, "width": 64, "height": 64, "seed": 1}
    images, names = [], []
    for sampler in ({"sampler_name": "Euler a", "eta": 0}, {"sampler_name": "Euler"}):
        answer = bundled.client.post("/sdapi/v1/txt2img", json=small | sampler).json()
        images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))))
        names.append(json.loads(answer["info"])["sampler_name"])
    assert (images[0] == images[1]).all()
    assert names == ["Euler a", "Euler"]
