"""Jobs with and without controls and reference images over HTTP: in one batch, and in all APIs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import load_unet, write_control, write_t2i_adapter
from tests.checkpoints.ip_files import ip_adapter, write_image_encoder, write_ip_adapter
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import png
from tests.helpers.servers import Server, wait_until

pytestmark = pytest.mark.slow

DRAW = np.random.default_rng(8)
PIXELS = [DRAW.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(4)]
FIRST, SECOND, THIRD, FOURTH = map(png, PIXELS)
MASK = np.zeros((64, 64, 3), np.uint8)
MASK[16:48, 8:56] = 255
BASE = {"prompt": "red apple", "guidance_scale": 3.0}
EDGES, DEPTH = {"model": "edges", "image": FIRST}, {"model": "depth", "image": SECOND}
SKETCH, STYLE = {"model": "sketch", "image": THIRD}, {"adapter": "style", "image": FOURTH}
EIGHT: list[dict[str, Any]] = [
    {"steps": 12},
    {"steps": 10, "controls": [EDGES]},
    {"steps": 12, "controls": [EDGES | {"scale": 0.5}, DEPTH | {"scale": 1.5}]},
    {"steps": 14, "reference_images": [STYLE | {"scale": 0.6}]},
    {"steps": 10, "controls": [DEPTH | {"start": 0.25, "end": 0.75, "mode": "control"}]},
    {"steps": 12, "controls": [EDGES | {"mode": "prompt"}], "image": THIRD, "mask": png(MASK)},
    {"steps": 10, "controls": [SKETCH | {"end": 0.5}], "guidance_scale": 1.0, "sampler": "euler_ancestral"},
    {"steps": 8, "controls": [SKETCH, EDGES | {"preprocess": "invert"}], "reference_images": [STYLE]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A narrow Stable Diffusion, two ControlNets, a T2I-Adapter and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("controls")
    model = sd_folders.write(folder, "sd1")
    write_control(folder / "edges", model, 20)
    write_control(folder / "depth", model, 30)
    write_t2i_adapter(folder / "sketch", model)
    write_ip_adapter(folder / "style.safetensors", ip_adapter(load_unet(model)))
    write_image_encoder(folder / "encoder")
    return folder


def adapters_in(folder: Path) -> dict[str, str]:
    return {
        "LDM_CONTROLNET": ",".join(f"{name}={folder / name}" for name in ("edges", "depth", "sketch")),
        "LDM_REFERENCE_ADAPTER": f"style={folder / 'style.safetensors'}",
        "LDM_IMAGE_ENCODER": str(folder / "encoder"),
    }


@pytest.fixture(scope="module")
def controlled(start_server, folder) -> Iterator[Server]:
    """A server whose calls all have 16 rows."""
    with start_server(folder / "sd1", LDM_INVARIANT="1", LDM_BUCKETS="16", **adapters_in(folder)) as server:
        yield server


def ask(server: Server, body: dict[str, Any], seed: int = 0) -> httpx.Response:
    path = "/inpaint" if "mask" in body else "/generate"
    return server.client.post(path, json=BASE | {"seed": seed} | body)


def test_eight_jobs_together_have_the_bytes_of_each_alone(controlled):
    before = controlled.calls()
    alone = [image_of(ask(controlled, body, seed)) for seed, body in enumerate(EIGHT)]
    single = controlled.calls() - before
    assert single == sum(body["steps"] for body in EIGHT)
    with ThreadPoolExecutor(len(EIGHT)) as pool:
        answers = list(pool.map(ask, [controlled] * len(EIGHT), EIGHT, range(len(EIGHT))))
    for expected, answer in zip(alone, answers, strict=True):
        assert (image_of(answer) == expected).all()
    assert controlled.calls() - before - single < single / 2
    plain = image_of(ask(controlled, {"steps": 10}, 1))
    assert (plain != alone[1]).any()


def test_jobs_with_controls_survive_a_worker_that_is_killed(controlled):
    bodies = [body | {"steps": 4 * body["steps"]} for body in EIGHT[1:5]]
    alone = [image_of(ask(controlled, body, seed)) for seed, body in enumerate(bodies)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(ask, controlled, body, seed) for seed, body in enumerate(bodies)]
        wait_until(lambda: controlled.metric("ldm_jobs_running") >= 2)
        before = controlled.calls()
        wait_until(lambda: controlled.calls() >= before + 7)
        controlled.kill_worker()
        for expected, answer in zip(alone, answers, strict=True):
            assert (image_of(answer.result()) == expected).all()


def test_a_model_lists_its_controls_and_reference_adapters(controlled):
    (model,) = controlled.client.get("/models").json()["models"]
    assert model["controls"] == ["edges", "depth", "sketch"]
    assert model["reference_adapters"] == ["style"]
    kinds = {each["name"]: each["kind"] for each in model["control_details"]}
    assert kinds == {"edges": "ControlNet", "depth": "ControlNet", "sketch": "T2I-Adapter"}


def test_a_background_job_takes_controls_and_names_their_fields(controlled):
    body = {"task": "generate", "request": BASE | {"seed": 1, "steps": 10, "controls": [EDGES]}}
    path = controlled.client.post("/jobs", json=body).headers["location"]
    wait_until(lambda: controlled.client.get(path).json()["status"] == "done")
    (made,) = controlled.client.get(path).json()["result"]["images"]
    assert made["data"] == ask(controlled, EIGHT[1], 1).json()["images"][0]["data"]
    body["request"]["controls"] = [EDGES | {"scale": 9.0}]
    refused = controlled.client.post("/jobs", json=body)
    assert error_of(refused, 422)["param"] == "request.controls.0.scale"


def test_a_file_has_the_controls_among_its_parameters(controlled):
    made = ask(controlled, EIGHT[2]).json()["images"][0]["data"]
    text = Image.open(io.BytesIO(base64.b64decode(made))).text["parameters"]
    controls = json.loads(text)["controls"]
    assert [(each["model"], each["scale"]) for each in controls] == [("edges", 0.5), ("depth", 1.5)]
    assert "image" not in controls[0]


def test_a_window_without_a_step_gives_a_warning(controlled):
    answer = ask(controlled, {"steps": 4, "controls": [EDGES | {"start": 0.3, "end": 0.4}]}).json()
    assert answer["warnings"] == ["controls.0 has no effect: no step of the run lies in its window"]


def test_a1111s_units_are_native_controls(controlled):
    units = [
        {"enabled": True, "model": "edges [0123abcd]", "module": "none", "image": FIRST, "weight": 0.5},
        {"enabled": False, "model": "depth", "image": SECOND},
        {"model": "depth", "image": {"image": SECOND, "mask": None}, "weight": 1.5, "control_mode": 2},
        {"model": "style", "module": "ip-adapter_clip_sd15", "input_image": FOURTH, "weight": 0.6},
    ]
    body = {"prompt": "red apple", "steps": 4, "cfg_scale": 3, "seed": 2, "sampler_name": "DDIM",
            "width": 64, "height": 64, "alwayson_scripts": {"ControlNet": {"args": units}}}  # fmt: skip
    answer = controlled.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    image, *maps = (open_base64(file) for file in answer.json()["images"])
    native = {
        "steps": 4, "prompt_weights": True, "long_prompts": "chunk",
        "controls": [EDGES | {"scale": 0.5}, DEPTH | {"scale": 1.5, "mode": "control"}],
        "reference_images": [STYLE | {"scale": 0.6}],
    }  # fmt: skip
    assert (image == image_of(ask(controlled, native, 2))).all()
    assert [(one == expected).all() for one, expected in zip(maps, PIXELS, strict=False)] == [True, True]
    (infotext,) = json.loads(answer.json()["info"])["infotexts"]
    assert 'ControlNet 0: "Module: none, Model: edges, Weight: 0.5' in infotext
    assert "ControlNet 1" not in infotext


def open_base64(file: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def test_a1111s_clients_find_controls_and_make_maps(controlled):
    client = controlled.client
    assert client.get("/controlnet/version").json() == {"version": 3}
    assert client.get("/controlnet/model_list").json() == {
        "model_list": ["depth", "edges", "sketch", "style"]
    }
    assert {"none", "canny"} <= {*client.get("/controlnet/module_list").json()["module_list"]}
    assert (
        client.get("/controlnet/control_types").json()["control_types"]["Canny"]["default_option"] == "canny"
    )
    assert client.get("/sdapi/v1/scripts").json()["txt2img"] == ["controlnet"]
    body = {"controlnet_module": "invert", "controlnet_input_images": [FIRST]}
    answer = client.post("/controlnet/detect", json=body).json()
    assert answer["info"] == "Success"
    assert (open_base64(answer["images"][0]) == 255 - PIXELS[0]).all()
    refused = client.post("/controlnet/detect", json=body | {"controlnet_module": "openpose"})
    assert error_of(refused, 422)["param"] == "controlnet_module"
    empty = client.post("/controlnet/detect", json={"controlnet_module": "canny"})
    assert error_of(empty, 422)["param"] == "controlnet_input_images"


def test_webuiapi_sends_units_and_finds_controls(controlled):
    api = webuiapi.WebUIApi(baseurl=f"{controlled.client.base_url}/sdapi/v1", sampler="DDIM", steps=4)
    assert api.controlnet_model_list() == ["depth", "edges", "sketch", "style"]
    assert "canny" in api.controlnet_module_list()
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    units = [webuiapi.ControlNetUnit(image=image, model="edges", module="canny") for image in images[:2]]
    sizes = {"width": 64, "height": 64, "seed": 3, "cfg_scale": 3}
    made = api.txt2img(prompt="red apple", controlnet_units=units, **sizes)
    assert [image.size for image in made.images] == [(64, 64)] * 3  # with two maps
    (detected,) = api.controlnet_detect(images=images[:1], module="invert").images
    assert (np.asarray(detected) == 255 - PIXELS[0]).all()
    changed = api.img2img(images=images[2:3], prompt="red apple", controlnet_units=units[:1], **sizes)
    assert changed.images[0].size == (64, 64)


def test_a_wrong_unit_is_refused_by_name(controlled):
    unit = {"enabled": True, "model": "edges", "module": "depth_midas", "image": FIRST}
    body = {"prompt": "red apple", "alwayson_scripts": {"controlnet": {"args": [{}, unit]}}}
    refused = controlled.client.post("/sdapi/v1/txt2img", json=body)
    assert error_of(refused, 422)["param"] == "alwayson_scripts.controlnet.args.1.module"
