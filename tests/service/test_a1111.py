"""AUTOMATIC1111's API, asked by a client library that was written for it, of the models in the bundled."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image
from pydantic import ValidationError

from service.api.a1111.masking import fill, region_of
from service.api.a1111.schemas import ExtraSingleImage, TextToImage
from service.api.a1111.translate import enlarging_of, png_of, sampling_of, shared, split
from service.api.app import create_app
from service.errors import InvalidRequest
from service.model_paths import locate_all, read_specs
from service.settings import Settings
from tests.helpers.servers import Server, wait_until

PROMPT = "red apple on a blue background"
SMALL = {"width": 128, "height": 128, "seed": 1, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def api(bundled: Server) -> webuiapi.WebUIApi:
    url = bundled.client.base_url
    return webuiapi.WebUIApi(host=url.host, port=url.port, sampler="DDIM", steps=4)


@pytest.fixture(scope="module")
def apple(api: webuiapi.WebUIApi) -> Image.Image:
    return api.txt2img(prompt=PROMPT, **SMALL, eta=0.0).image


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(float)


def left_half(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_txt2img_makes_what_the_native_api_makes(bundled, api):
    for _ in range(2):  # the first after a start runs in smaller calls, where bits may differ
        made = api.txt2img(prompt=PROMPT, negative_prompt="pear", **SMALL, eta=0.0, batch_size=2, n_iter=1)
    native = bundled.client.post(
        "/generate",
        json={"prompt": PROMPT, "negative_prompt": "pear", "seed": 1, "n": 2, "steps": 4, "sampler": "ddim",
              "guidance_scale": 3.0, "prompt_weights": True, "long_prompts": "chunk"},
    ).json()  # fmt: skip
    assert made.json["images"] == [image["data"] for image in native["images"]]
    assert made.parameters["prompt"] == PROMPT
    assert made.info["all_seeds"] == [1, 2]
    assert (made.info["sampler_name"], made.info["steps"], made.info["sd_model_name"]) == ("DDIM", 4, "emoji")
    assert made.info["infotexts"][1].startswith(f"{PROMPT}\nNegative prompt: pear\nSteps: 4, Sampler: DDIM")
    assert "Seed: 2, Size: 128x128" in made.info["infotexts"][1]


def test_words_are_weighed(api):
    plain, heavy = (api.txt2img(prompt=p, **SMALL).image for p in (PROMPT, f"(red apple:1.4){PROMPT[9:]}"))
    assert (array(plain) != array(heavy)).any()


def test_the_client_asks_with_its_own_defaults(api):
    """Everything that it sends when it is told nothing but a prompt is understood."""
    made = webuiapi.WebUIApi(baseurl=api.baseurl, steps=2).txt2img(prompt=PROMPT, width=64, height=64)
    assert made.image.size == (64, 64)
    assert made.info["sampler_name"] == "Euler a"
    assert 0 <= made.info["seed"] < 2**32


def test_img2img_changes_more_with_more_denoising_strength(api, apple):
    def changed(strength: float) -> float:
        made = api.img2img([apple], prompt="tomato", denoising_strength=strength, eta=0.0, **SMALL)
        return np.abs(array(made.image) - array(apple)).mean()

    assert 0 < changed(0.25) < changed(1.0)


def inpainted(api: webuiapi.WebUIApi, picture: Image.Image, **asked) -> np.ndarray:
    defaults = {"denoising_strength": 1.0, "mask_blur": 0, "eta": 0.0}
    made = api.img2img(
        [picture], mask_image=left_half(picture.size), prompt="ghost", **defaults | asked | SMALL
    )
    assert made.image.size == picture.size
    return array(made.image)


@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_is_painted_anew_and_the_rest_stays(api, apple, whole):
    after, before = inpainted(api, apple, inpaint_full_res=not whole), array(apple)
    assert (after[:, 64:] == before[:, 64:]).all()
    assert np.abs(after[:, :64] - before[:, :64]).mean() > 3
    inverted = inpainted(api, apple, inpaint_full_res=not whole, inpainting_mask_invert=1)
    assert (inverted[:, :64] == before[:, :64]).all()
    assert np.abs(inverted[:, 64:] - before[:, 64:]).mean() > 3


def test_a_masked_region_alone_is_painted_in_a_picture_of_any_size(api, apple):
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


def test_extra_single_image_enlarges(api, apple):
    small = apple.resize((32, 32), Image.Resampling.BICUBIC)
    by_model = api.extra_single_image(small, upscaler_1="emoji-upscale", upscaling_resize=3).image
    by_rule = api.extra_single_image(small, upscaler_1="Lanczos", upscaling_resize=3).image
    assert by_model.size == by_rule.size == (96, 96)
    assert (array(by_model) != array(by_rule)).any()
    assert (array(api.extra_single_image(small).image) == array(small)).all()
    cropped = api.extra_single_image(
        small, resize_mode=1, upscaling_resize_w=80, upscaling_resize_h=40, upscaler_1="Nearest"
    )
    assert cropped.image.size == (80, 40)
    with pytest.raises(RuntimeError, match="upscaler_1") as caught:
        api.extra_single_image(small, upscaler_1="R-ESRGAN 4x+")
    assert caught.value.args[0] == 422
    with pytest.raises(RuntimeError, match="upscaling_resize"):
        api.extra_single_image(small, upscaler_1="emoji-upscale", upscaling_resize=5)


def test_progress_and_interrupt(bundled, api):
    assert api.get_progress()["progress"] == 0.0
    asked = {"prompt": PROMPT, "steps": 1000, "width": 128, "height": 128, "sampler_name": "DDIM"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bundled.client.post, "/sdapi/v1/txt2img", json=asked)
        wait_until(lambda: api.get_progress()["current_image"] is not None)
        told = api.get_progress()
        assert 0 < told["progress"] < 1
        assert told["eta_relative"] > 0
        assert (told["state"]["job_count"], told["state"]["sampling_steps"]) == (1, 1000)
        assert told["state"]["sampling_step"] >= 10
        assert Image.open(io.BytesIO(base64.b64decode(told["current_image"]))).format == "PNG"
        assert (
            bundled.client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        )
        assert api.interrupt() is None
        assert answer.result().status_code == 499
    wait_until(lambda: bundled.health()["jobs"] == 0)
    assert api.get_progress()["state"]["job_count"] == 0
    api.util_wait_for_ready(check_interval=0.1)


def test_what_clients_ask_at_start(api):
    assert api.util_get_model_names() == ["emoji"]
    assert {"Euler a", "DPM++ 2M", "DDIM", "PLMS", "UniPC", "LCM"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert [row["name"] for row in api.get_upscalers()] == ["None", "Lanczos", "Nearest", "emoji-upscale"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert set(api.get_memory()) == {"ram", "cuda"}
    assert api.get_cmd_flags() == {}
    for none in (api.get_sd_vae, api.get_face_restorers, api.get_hypernetworks, api.get_prompt_styles,
                 api.get_realesrgan_models, api.get_latent_upscale_modes, api.get_loras):  # fmt: skip
        assert none() == []
    assert api.refresh_checkpoints() is None


def test_options_choose_the_model(bundled, api):
    api.util_set_model("emoji")
    assert api.util_get_current_model() == "emoji"
    assert api.set_options({"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"}) is None
    told = bundled.client.post("/sdapi/v1/options", json=api.get_options())  # what is read can be written
    assert told.status_code == 200
    unknown = bundled.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "sd_model_checkpoint")
    other = bundled.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    assert (other.status_code, other.json()["error"]["param"]) == (422, "CLIP_stop_at_last_layers")
    made = api.txt2img(prompt=PROMPT, **SMALL, override_settings={"sd_model_checkpoint": "emoji"})
    assert made.info["sd_model_name"] == "emoji"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, "alwayson_scripts"),
        ({"styles": ["photo"]}, "styles"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"save_images": True}, "save_images"),
        ({"sampler_name": "Heun"}, "sampler_name"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler"),
        ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 2}},
            "override_settings.CLIP_stop_at_last_layers",
        ),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "override_settings.eta_noise_seed_delta"),
        ({"prompt": "apple <hypernet:x:1>"}, "prompt"),
        ({"prompt": "apple <lora:unknown:1>"}, "prompt"),
        ({"cfg_scale": 1000}, "cfg_scale"),
        ({"batch_size": 1000}, "batch_size"),
        ({"width": 100}, "width"),
        ({"seed": -2}, "seed"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_cannot_be_done_is_a_422_that_names_the_field(bundled, asked, param):
    answer = bundled.client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 2} | asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text


@pytest.mark.parametrize(
    ("name", "scheduler", "ours"),
    [
        ("Euler a", "automatic", ("euler_ancestral", None)),
        ("k_euler_a", None, ("euler_ancestral", None)),
        ("Euler", "Karras", ("euler_karras", None)),
        ("euler", "SGM Uniform", ("euler", "trailing")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M Karras", "Automatic", ("dpmpp_2m_karras", None)),
        ("DPM++ 2M", "uniform", ("dpmpp_2m", "linspace")),
        ("PLMS", None, ("plms", None)),
        (None, None, ("euler", None)),
    ],
)
def test_samplers_by_their_names_there(name, scheduler, ours):
    sampling = sampling_of(TextToImage(sampler_name=name, scheduler=scheduler))
    assert (sampling.sampler, sampling.spacing) == ours


def test_eta_is_for_ddim():
    assert sampling_of(TextToImage(sampler_name="DDIM", eta=0.5)).eta == 0.5
    assert sampling_of(TextToImage(sampler_name="UniPC", eta=1.0)).eta is None


def test_loras_are_taken_out_of_the_prompt():
    assert split("a <lora:ink:0.5>cat<lora:dots>") == ("a cat", {"ink": 0.5, "dots": 1.0})
    with pytest.raises(InvalidRequest, match="lora"):
        split("a cat <lora:ink:much>")


def test_weights_are_numbers_however_long():
    texts = {"": 1.0, ":1": 1.0, ":-.5": -0.5, ":0.25": 0.25, ":" + "1" * 100: float("1" * 100)}
    assert {text: split(f"<lora:ink{text}>")[1]["ink"] for text in texts} == texts
    for text in (":1.", ":.", ":1e3", ":" + "1" * 1_000_000 + "x"):
        with pytest.raises(InvalidRequest):
            split(f"<lora:ink{text}>")


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/sdapi/v1/img2img", {"json": {"init_images": ["broken"], "mask": "broken"}}),
        ("/sdapi/v1/extra-single-image", {"json": {"image": "broken"}}),
        ("/v1/images/edits", {"data": {"prompt": "x"}, "files": {"image": b"broken", "mask": b"broken"}}),
    ],
)
def test_no_picture_is_decoded_without_a_place_in_the_queue(path, how):
    app = create_app(Settings(queue_size=1))
    supervisor = app.state.supervisor
    supervisor.specs = read_specs(locate_all(("emoji",)))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.post(path, **how)).status_code

    assert asyncio.run(ask()) in (400, 422)
    with supervisor.reserve_slot():
        assert asyncio.run(ask()) == 429
    assert supervisor.slots_in_use == 0


@pytest.mark.parametrize("args", [["\ud800"], json.loads("[" * 400 + "]" * 400)])
def test_what_no_answer_could_repeat_is_refused(args):
    with pytest.raises(ValidationError, match="script_args"):
        TextToImage(prompt=PROMPT, script_args=args)
    TextToImage(prompt=PROMPT, script_args=[{"a": 1}]).model_dump_json()


def test_numbers_without_measure_are_refused_like_others():
    body = TextToImage(prompt=PROMPT, batch_size=2**33)
    assert shared(body, sampling_of(body), None)["n"] == 2**33  # which POST /generate refuses
    picture = base64.b64encode(png_of(Image.new("RGB", (8, 8)))).decode()
    with pytest.raises(InvalidRequest, match="upscaling_resize_w"):
        enlarging_of(ExtraSingleImage(image=picture, resize_mode=1, upscaling_resize_w=10**400), Settings())


def test_the_region_has_the_pictures_proportions_and_stays_inside():
    mask = Image.new("L", (300, 200))
    mask.paste(255, (100, 50, 150, 60))
    assert region_of(mask, 0, 100, 100) == (100, 30, 150, 80)
    assert region_of(mask, 30, 100, 100) == (70, 0, 180, 110)
    mask.paste(255, (0, 0, 300, 10))
    assert region_of(mask, 0, 100, 100) == (0, 0, 300, 200)


def test_a_hole_is_filled_from_around_it():
    picture = np.zeros((33, 50, 3), np.uint8)
    picture[:, 25:] = 200
    hole = np.zeros((33, 50), bool)
    hole[5:30, 3:47] = True
    picture[hole] = 77
    filled = np.asarray(fill(Image.fromarray(picture), hole))
    assert (filled[~hole] == picture[~hole]).all()
    assert filled[15, 6].mean() < 60 < 140 < filled[15, 44].mean()
    assert not (filled[hole] == 77).all(-1).all()


def test_json_in_info(api):
    made = api.txt2img(prompt=PROMPT, **SMALL)
    assert isinstance(made.json["info"], str)
    assert json.loads(made.json["info"])["seed"] == 1
    assert abs(time.time() - time.mktime(time.strptime(made.info["job_timestamp"], "%Y%m%d%H%M%S"))) < 90_000
