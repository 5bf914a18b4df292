"""A1111's API over HTTP, with the client library webuiapi, on the bundled models."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
import webuiapi
from fastapi import FastAPI
from PIL import Image

from service.api.app import create_app
from service.model_paths import identify_all, locate_all
from service.requests import images
from service.settings import Settings
from tests.helpers.servers import wait_until

PROMPT = "red apple on a blue background"
SMALL = {"width": 128, "height": 128, "seed": 1, "cfg_scale": 3.0}
TINY = {"prompt": PROMPT, "steps": 2, "width": 64, "height": 64, "seed": 1}


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float)


def encoded(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def left_half(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.mark.everywhere
def test_txt2img_makes_what_the_native_api_makes(bundled, api):
    for _ in range(2):  # the first after a start runs in smaller calls, where bits may differ
        made = api.txt2img(prompt=PROMPT, negative_prompt="pear", **SMALL, eta=0.0, batch_size=2, n_iter=1)
    native = bundled.client.post(
        "/generate",
        json={"prompt": PROMPT, "negative_prompt": "pear", "seed": 1, "n": 2, "steps": 4, "sampler": "ddim",
              "guidance_scale": 3.0, "prompt_weights": True, "long_prompts": "chunk"},
    ).json()  # fmt: skip
    for a1111, own in zip(made.json["images"], native["images"], strict=True):
        assert (np.asarray(decoded(a1111)) == np.asarray(decoded(own["data"]))).all()
    assert made.parameters["prompt"] == PROMPT
    assert made.info["all_seeds"] == [1, 2]
    assert (made.info["sampler_name"], made.info["steps"], made.info["sd_model_name"]) == ("DDIM", 4, "emoji")
    assert made.info["infotexts"][1].startswith(f"{PROMPT}\nNegative prompt: pear\nSteps: 4, Sampler: DDIM")
    assert "Seed: 2, Size: 128x128" in made.info["infotexts"][1]


def test_prompts_have_weights(api):
    plain, heavy = (api.txt2img(prompt=p, **SMALL).image for p in (PROMPT, f"(red apple:1.4){PROMPT[9:]}"))
    assert (array(plain) != array(heavy)).any()


def test_the_defaults_of_webuiapi_are_accepted(api):
    made = webuiapi.WebUIApi(baseurl=api.baseurl, steps=2).txt2img(prompt=PROMPT, width=64, height=64)
    assert made.image.size == (64, 64)
    assert made.info["sampler_name"] == "Euler a"
    assert 0 <= made.info["seed"] < 2**32


@pytest.mark.everywhere
def test_info_is_a_json_string(bundled):
    answer = bundled.client.post("/sdapi/v1/txt2img", json=TINY).json()
    info = json.loads(answer["info"])
    assert info["seed"] == 1
    assert abs(time.time() - time.mktime(time.strptime(info["job_timestamp"], "%Y%m%d%H%M%S"))) < 90_000


@pytest.mark.parametrize("seed", [0, 2**53, 2**64 - 1])
def test_seeds_of_64_bits(bundled, seed):
    answer = bundled.client.post("/sdapi/v1/txt2img", json=TINY | {"seed": seed, "subseed": 2**64 - 1})
    assert json.loads(answer.json()["info"])["all_seeds"] == [seed]


def test_tiling(bundled):
    plain, tiled = (
        bundled.client.post("/sdapi/v1/txt2img", json=TINY | {"tiling": tiling}).json()
        for tiling in (False, True)
    )
    assert (np.asarray(decoded(plain["images"][0])) != np.asarray(decoded(tiled["images"][0]))).any()
    assert "Tiling: True" in json.loads(tiled["info"])["infotexts"][0]


def test_a_variation_seed(bundled):
    body = TINY | {"seed": 1, "batch_size": 2, "subseed": 5, "subseed_strength": 0.5}
    info = json.loads(bundled.client.post("/sdapi/v1/txt2img", json=body).json()["info"])
    assert (info["all_seeds"], info["all_subseeds"], info["subseed_strength"]) == ([1, 1], [5, 6], 0.5)
    assert "Variation seed: 6, Variation seed strength: 0.5" in info["infotexts"][1]


def test_an_answer_without_images(bundled):
    answer = bundled.client.post("/sdapi/v1/txt2img", json=TINY | {"send_images": False}).json()
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["infotexts"]) == 1


def test_img2img_changes_more_with_more_denoising_strength(api, apple):
    def changed(strength: float) -> float:
        made = api.img2img([apple], prompt="tomato", denoising_strength=strength, eta=0.0, **SMALL)
        return np.abs(array(made.image) - array(apple)).mean()

    assert 0 < changed(0.25) < changed(1.0)


def test_a_denoising_strength_of_zero_returns_the_image(api, apple):
    body = {"prompt": "tomato", "denoising_strength": 0, "mask_blur": 0, "batch_size": 2}
    made = api.img2img([apple], **SMALL | body)
    assert [(array(image) == array(apple)).all() for image in made.images] == [True, True]
    assert made.info["denoising_strength"] == 0
    masked = api.img2img([apple], mask_image=left_half(apple.size), **SMALL | body)
    assert (array(masked.image) == array(apple)).all()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_resize_modes(bundled, apple, mode):
    body = {"init_images": [encoded(apple)], "resize_mode": mode, "width": 64, "height": 128}
    answer = bundled.client.post("/sdapi/v1/img2img", json=TINY | body | {"denoising_strength": 0}).json()
    before, after = array(apple), array(decoded(answer["images"][0]))
    assert after.shape == (128, 64, 3)
    if mode == 1:
        assert (after == before[:, 32:96]).all()
    if mode == 2:
        assert (after[:32] == after[32]).all()
    generated = bundled.client.post("/sdapi/v1/img2img", json=TINY | body).json()
    assert decoded(generated["images"][0]).size == (64, 128)


def test_latent_upscaling_and_several_images_are_refused(bundled, apple):
    for body, param in (
        ({"resize_mode": 3, "init_images": [encoded(apple)]}, "resize_mode"),
        ({"init_images": [encoded(apple)] * 2}, "init_images"),
        ({"init_images": [], "mask": encoded(apple)}, "init_images"),
        ({"init_images": [encoded(apple)], "latent_mask": encoded(apple)}, "latent_mask"),
        (
            {
                "init_images": [encoded(apple)],
                "override_settings": {"img2img_color_correction": True},
            },
            "override_settings.img2img_color_correction",
        ),
    ):
        answer = bundled.client.post("/sdapi/v1/img2img", json=TINY | body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text


def inpainted(api: webuiapi.WebUIApi, image: Image.Image, **body) -> np.ndarray:
    defaults = {"denoising_strength": 1.0, "mask_blur": 0, "eta": 0.0}
    made = api.img2img([image], mask_image=left_half(image.size), prompt="ghost", **defaults | body | SMALL)
    assert made.image.size == image.size
    return array(made.image)


@pytest.mark.parametrize("whole", [True, False])
def test_only_masked_pixels_change(api, apple, whole):
    after, before = inpainted(api, apple, inpaint_full_res=not whole), array(apple)
    assert (after[:, 64:] == before[:, 64:]).all()
    assert np.abs(after[:, :64] - before[:, :64]).mean() > 3
    inverted = inpainted(api, apple, inpaint_full_res=not whole, inpainting_mask_invert=1)
    assert (inverted[:, :64] == before[:, :64]).all()
    assert np.abs(inverted[:, 64:] - before[:, 64:]).mean() > 3


def test_a_masked_region_of_an_image_of_any_size_is_repainted(api, apple):
    scene = Image.new("RGB", (300, 200), "white")
    scene.paste(apple, (20, 20))
    mask = Image.new("L", scene.size)
    mask.paste(255, (40, 40, 120, 120))
    made = api.img2img(
        [scene], mask_image=mask, prompt="ghost", inpaint_full_res_padding=16, mask_blur=0, eta=0.0,
        denoising_strength=0.9, inpainting_fill=1, **SMALL,
    )  # fmt: skip
    changed = (array(made.image) != array(scene)).any(-1)
    assert made.image.size == scene.size
    assert changed[40:120, 40:120].any()
    assert not (changed & (np.asarray(mask) == 0)).any()


def test_a_blurred_mask_fades(api, apple):
    change = np.abs(inpainted(api, apple, mask_blur=8, inpainting_fill=1) - array(apple)).mean((0, 2))
    assert change[:40].mean() > 3
    assert change[100:].max() == 0
    assert 0 < change[60:64].mean() < change[40:50].mean()


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "jpg"), ("webp", "webp")])
def test_an_inpainted_image_is_encoded_once(bundled, apple, kind, name):
    body = {"init_images": [encoded(apple)], "mask": encoded(left_half(apple.size))} | TINY
    body |= {"width": 128, "height": 128, "inpaint_full_res": False}
    lossless = bundled.client.post("/sdapi/v1/img2img", json=body).json()
    lossy = bundled.client.post(
        "/sdapi/v1/img2img", json=body | {"override_settings": {"samples_format": name}}
    ).json()
    pixels = np.asarray(decoded(lossless["images"][0]))
    once = Image.open(io.BytesIO(images.encode(pixels, kind)))
    assert (np.asarray(decoded(lossy["images"][0])) == np.asarray(once)).all()


def test_an_empty_mask_masks_nothing(bundled, apple):
    body = {"init_images": [encoded(apple)], "mask": encoded(Image.new("L", apple.size)), "width": 128}
    body |= {"height": 128, "denoising_strength": 0.8, "mask_blur_x": 4, "mask_blur_y": 0}
    whole = bundled.client.post("/sdapi/v1/img2img", json=TINY | body).json()
    assert (array(decoded(whole["images"][0])) != array(apple)).any()
    assert any("mask" in warning for warning in json.loads(whole["info"])["warnings"])
    kept = bundled.client.post("/sdapi/v1/img2img", json=TINY | body | {"inpaint_full_res": False}).json()
    assert (array(decoded(kept["images"][0])) == array(apple)).all()


@pytest.mark.everywhere
def test_progress_and_interrupt(bundled, api):
    assert api.get_progress()["progress"] == 0.0
    body = {"prompt": PROMPT, "steps": 1000, "width": 128, "height": 128, "sampler_name": "DDIM"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bundled.client.post, "/sdapi/v1/txt2img", json=body)
        wait_until(lambda: api.get_progress()["current_image"] is not None)
        progress = api.get_progress()
        assert 0 < progress["progress"] < 1
        assert progress["eta_relative"] > 0
        assert (progress["state"]["job_count"], progress["state"]["sampling_steps"]) == (1, 1000)
        assert progress["state"]["sampling_step"] >= 10
        assert decoded(progress["current_image"]).format == "PNG"
        without = bundled.client.get("/sdapi/v1/progress?skip_current_image=true").json()
        assert without["current_image"] is None
        assert api.interrupt() == {}
        assert answer.result().status_code == 200
    assert decoded(answer.result().json()["images"][0]).size == (128, 128)
    wait_until(lambda: bundled.health()["jobs"] == 0)
    assert api.get_progress()["state"]["job_count"] == 0
    api.util_wait_for_ready(check_interval=0.1)


def test_an_interrupted_request_has_the_predicted_image(bundled, api):
    body = TINY | {"steps": 300, "width": 128, "height": 128, "sampler_name": "Euler"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bundled.client.post, "/sdapi/v1/txt2img", json=body)
        wait_until(lambda: api.get_progress()["state"]["sampling_step"] >= 100)
        api.interrupt()
        image = decoded(answer.result().json()["images"][0])
    finished = bundled.client.post("/sdapi/v1/txt2img", json=body | {"steps": 20}).json()
    assert np.abs(array(image) - array(decoded(finished["images"][0]))).mean() < 40


def test_a_request_that_waits_is_interrupted_without_images(bundled, api):
    slow = TINY | {"steps": 1000, "width": 256, "height": 256}
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(bundled.client.post, "/sdapi/v1/txt2img", json=slow) for _ in range(2)]
        wait_until(lambda: api.get_progress()["state"]["job_count"] == 2)
        while not all(answer.done() for answer in answers):
            api.interrupt()
    assert [answer.result().status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize("fill", [2, 3])
def test_masked_pixels_may_start_from_latent_noise_or_nothing(api, apple, fill):
    strengths = {"denoising_strength": 0.5, "inpaint_full_res": False}
    made = inpainted(api, apple, inpainting_fill=fill, **strengths)
    assert (made[:, 64:] == array(apple)[:, 64:]).all()
    for other in {0, 1, 2, 3} - {fill}:
        assert (made != inpainted(api, apple, inpainting_fill=other, **strengths)).any()


@pytest.mark.everywhere
def test_what_clients_read_at_start(bundled, api):
    assert api.util_get_model_names() == ["emoji"]
    assert {"Euler a", "DPM++ 2M", "DDIM", "PLMS", "UniPC", "LCM"} <= set(api.util_get_sampler_names())
    assert {"karras", "exponential"} <= set(api.util_get_scheduler_names())
    assert [row["name"] for row in api.get_upscalers()] == ["None", "Lanczos", "Nearest", "emoji-upscale"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert set(api.get_memory()) == {"ram", "cuda"}
    assert api.get_cmd_flags() == {}
    for read in (api.get_sd_vae, api.get_face_restorers, api.get_hypernetworks, api.get_prompt_styles,
                 api.get_realesrgan_models):  # fmt: skip
        assert read() == []
    assert [row["name"] for row in api.get_loras()] == ["few-steps"]
    assert "Latent" in [mode["name"] for mode in api.get_latent_upscale_modes()]
    for path in ("/sdapi/v1/script-info", "/sdapi/v1/extensions"):
        assert bundled.client.get(path).json() == []
    assert bundled.client.get("/internal/ping").json() == {}
    for path in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "unload-checkpoint",
                 "reload-checkpoint", "skip", "interrupt"):  # fmt: skip
        assert bundled.client.post(f"/sdapi/v1/{path}").status_code == 200


@pytest.mark.everywhere
def test_options_choose_the_model_and_the_format(bundled, api):
    api.util_set_model("emoji")
    assert api.util_get_current_model() == "emoji"
    assert api.set_options({"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "grid_save": True}) is None
    rewritten = bundled.client.post("/sdapi/v1/options", json=api.get_options())
    assert rewritten.status_code == 200
    unknown = bundled.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "sd_model_checkpoint")
    other = bundled.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    assert (other.status_code, other.json()["error"]["param"]) == (422, "CLIP_stop_at_last_layers")
    api.set_options({"samples_format": "webp"})
    assert api.get_options()["samples_format"] == "webp"
    answer = bundled.client.post("/sdapi/v1/txt2img", json=TINY).json()
    assert decoded(answer["images"][0]).format == "WEBP"
    api.set_options({"samples_format": "png"})


@pytest.mark.parametrize(
    "name",
    ["emoji", "emoji [6ce0161689]", "emoji.safetensors", "emoji.safetensors [6ce0161689]", "sd/emoji.ckpt"],
)
def test_a_model_by_any_of_a1111s_names(bundled, name):
    body = TINY | {"override_settings": {"sd_model_checkpoint": name}}
    answer = bundled.client.post("/sdapi/v1/txt2img", json=body)
    assert json.loads(answer.json()["info"])["sd_model_name"] == "emoji"
    assert bundled.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": name}).status_code == 200


@pytest.mark.everywhere
def test_an_unknown_model_is_a_404(bundled):
    body = TINY | {"override_settings": {"sd_model_checkpoint": "v1-5"}}
    answer = bundled.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "override_settings.sd_model_checkpoint"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_png_info_reads_what_files_carry(bundled, api, kind):
    body = TINY | {"override_settings": {"samples_format": kind}}
    answer = bundled.client.post("/sdapi/v1/txt2img", json=body).json()
    read = bundled.client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    assert read["info"] == json.loads(answer["info"])["infotexts"][0]
    assert (read["parameters"]["Prompt"], read["parameters"]["Steps"]) == (PROMPT, "2")
    body = {"prompt": PROMPT, "steps": 2, "seed": 1, "output_format": "jpeg" if kind == "jpg" else kind}
    native = bundled.client.post("/generate", json=body).json()["images"][0]["data"]
    read = bundled.client.post("/sdapi/v1/png-info", json={"image": native}).json()
    assert (read["parameters"]["prompt"], read["parameters"]["steps"]) == (PROMPT, "2")
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def app_with(**changes: object) -> FastAPI:
    """The application without its worker, as if a bundled model were loaded, with changes of its spec."""
    app = create_app(Settings(queue_size=1))
    supervisor, sources = app.state.supervisor, identify_all(locate_all(("emoji",)))
    supervisor.models.specs = {n: replace(source.spec, **changes) for n, source in sources.items()}
    supervisor.models.known = True
    return app


def test_embeddings_are_those_of_the_models():
    app = app_with(embeddings=("my-style",))

    async def get() -> dict:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/sdapi/v1/embeddings")).json()

    embeddings = asyncio.run(get())
    assert [*embeddings["loaded"]] == ["my-style"]
    assert embeddings["loaded"]["my-style"]["shape"] > 0
    assert embeddings["skipped"] == {}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sdapi/v1/img2img", {"json": {"init_images": ["broken"], "mask": "broken"}}),
        ("/sdapi/v1/extra-single-image", {"json": {"image": "broken"}}),
        ("/v1/images/edits", {"data": {"prompt": "x"}, "files": {"image": b"broken", "mask": b"broken"}}),
    ],
)
def test_no_image_is_decoded_without_a_place_in_the_queue(path, body):
    app = app_with()
    supervisor = app.state.supervisor

    async def post() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.post(path, **body)).status_code

    assert asyncio.run(post()) in (400, 422)
    with supervisor.reserve_slot():
        assert asyncio.run(post()) == 429
    assert supervisor.slots_in_use == 0
