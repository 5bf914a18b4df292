"""What A1111's API accepts, over HTTP: served, ignored with a warning, or refused by the field's own name."""

from __future__ import annotations

import json

import pytest

SMALL = {"prompt": "apple", "steps": 2, "width": 64, "height": 64, "seed": 1}


def generate(bundled, body: dict, path: str = "txt2img") -> dict:
    """The info of a response that must be a 200."""
    answer = bundled.client.post(f"/sdapi/v1/{path}", json=SMALL | body)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["info"]) | {"images": answer.json()["images"]}


SILLY_TAVERN = {
    "url": "http://127.0.0.1:7860", "auth": "user:secret", "prompt": "apple", "negative_prompt": "",
    "sampler_name": "DDIM", "scheduler": "normal", "cfg_scale": 7, "width": 64, "height": 64,
    "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2,
    "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": 1,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
KOBOLD_LITE = {
    "sampler_name": "Euler a", "eta": 0, "batch_size": 1, "n_iter": 1, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "restore_faces": False, "tiling": False,
    "s_churn": 0, "s_tmin": 0, "s_tmax": 0, "s_noise": 1, "styles": [], "script_args": [],
    "override_settings": {
        "sd_model_checkpoint": "emoji", "eta_noise_seed_delta": 0, "CLIP_stop_at_last_layers": 1,
        "ddim_discretize": "uniform", "img2img_fix_steps": False, "sd_hypernetwork": "None",
        "inpainting_mask_weight": 1, "initial_noise_multiplier": 1, "comma_padding_backtrack": 20,
    },
}  # fmt: skip
NPM_STABLE_DIFFUSION_API = {
    "alwayson_scripts": {"ControlNet": {"args": []}}, "script_name": "", "styles": [],
    "sampler_index": "Euler a", "sampler_name": "Euler a", "hr_upscaler": "Latent",
    "send_images": True, "save_images": False,
}  # fmt: skip
SD_BACKEND_CLIENT = {
    "force_task_id": "task(txt2img-1)", "inpainting_fill": 1, "alwayson_scripts": {},
    "sampler_name": "Euler a", "scheduler": "normal", "override_settings": {"sd_model_checkpoint": "emoji"},
}  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [SILLY_TAVERN, KOBOLD_LITE, NPM_STABLE_DIFFUSION_API, SD_BACKEND_CLIENT],
    ids=["SillyTavern", "KoboldAI Lite", "npm stable-diffusion-api", "sd-backend-client"],
)
def test_bodies_of_clients_get_an_image(bundled, body):
    info = generate(bundled, body)
    assert len(info["images"]) == 1
    assert info["sd_model_hash"] == ""


def test_unknown_fields_are_ignored_under_their_own_names(bundled):
    warnings = generate(bundled, SILLY_TAVERN | {"model": "x", "n": 4, "steps": 2})["warnings"]
    assert "url, auth, hr_additional_modules, clip_skip, model, n, save_images" in warnings[-1]
    assert "secret" not in json.dumps(warnings)
    answer = bundled.client.post("/sdapi/v1/txt2img", json=SMALL | {"auth": "user:secret"})
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        ({"styles": ["photo"]}, "photo"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler is ignored"),
        ({"sampler_name": "UniPC", "scheduler": "no such scheduler"}, "scheduler is ignored"),
        ({"sampler_name": "DPM++ 2M", "s_churn": 5}, "s_churn is ignored"),
        ({"sampler_name": "Euler", "eta": 0.5}, "eta is ignored"),
        ({"override_settings": {"grid_format": "jpg"}}, "override_settings.grid_format"),
        ({"alwayson_scripts": {"ADetailer": {"args": [False, {"ad_model": "face.pt"}]}}}, "ADetailer"),
        ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "None"}]}}}, "ADetailer"),
        ({"save_images": True}, "save_images"),
    ],
)
def test_what_a1111_ignores_is_ignored_with_a_warning(bundled, body, warning):
    plain, info = (
        generate(bundled, {key: body[key] for key in body if key == "sampler_name"}),
        generate(bundled, body),
    )
    assert info["images"] == plain["images"]
    assert any(warning in text for text in info["warnings"]), info["warnings"]


@pytest.mark.parametrize(
    "body",
    [
        {"subseed": 5, "subseed_strength": 0, "seed_resize_from_h": 512, "seed_resize_from_w": 0},
        {"refiner_checkpoint": "xl-refiner", "refiner_switch_at": 1.0},
        {"refiner_checkpoint": "None", "refiner_switch_at": 0.8},
        {"script_name": None, "script_args": []},
        {"firstphase_width": 512, "hr_prompt": "pear", "denoising_strength": 0.3, "enable_hr": False},
        {"restore_faces": None, "tiling": None, "styles": None, "override_settings": None, "infotext": ""},
        {"override_settings": {"randn_source": "CPU", "sd_vae": "None", "CLIP_stop_at_last_layers": None}},
        {"override_settings": {"CLIP_stop_at_last_layers": "1", "use_old_emphasis_implementation": "false"}},
        {"override_settings": {"uni_pc_order": 1, "img2img_color_correction": True}},
        {"do_not_save_samples": True, "do_not_save_grid": True, "comments": {"a": 1}, "s_tmin": 1},
        {"alwayson_scripts": {"Refiner": {}, "ControlNet": {"args": []}}},
    ],
)
def test_values_that_change_nothing_change_nothing(bundled, body):
    assert generate(bundled, body)["images"] == generate(bundled, {})["images"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"restore_faces": True}, "restore_faces"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        (
            {"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}},
            "alwayson_scripts.controlnet.args.0.model",
        ),
        ({"subseed_strength": 1.5}, "subseed_strength"),
        ({"seed_resize_from_h": 512, "seed_resize_from_w": 512}, "seed_resize_from_w"),
        ({"refiner_checkpoint": "emoji", "refiner_switch_at": 0.8}, "refiner_checkpoint"),
        ({"infotext": "apple\nSteps: 4"}, "infotext"),
        ({"token_merging_ratio": 0.5}, "token_merging_ratio"),
        ({"s_min_uncond": 1.0}, "s_min_uncond"),
        ({"s_churn": 5}, "s_churn"),
        ({"sampler_name": "Euler a", "s_noise": 0.9}, "s_noise"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name"),
        ({"sampler_name": "DPM++ SDE", "eta": 0.5}, "eta"),
        ({"sampler_name": "Euler a", "scheduler": "no such scheduler"}, "scheduler"),
        ({"sampler_name": "Euler a", "scheduler": "kl_optimal"}, "scheduler"),
        ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 99}},
            "override_settings.CLIP_stop_at_last_layers",
        ),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "override_settings.eta_noise_seed_delta"),
        ({"override_settings": {"sd_vae": "other.safetensors"}}, "override_settings.sd_vae"),
        (
            {"sampler_name": "UniPC", "override_settings": {"uni_pc_order": 1}},
            "override_settings.uni_pc_order",
        ),
        ({"override_settings": {"samples_format": "tiff"}}, "override_settings.samples_format"),
        ({"override_settings": {"sd_model_checkpoint": 3}}, "override_settings.sd_model_checkpoint"),
        ({"prompt": "apple <hypernet:x:1>"}, "prompt"),
        ({"prompt": "apple <lora:unknown:1>"}, "prompt"),
        ({"cfg_scale": 1000}, "cfg_scale"),
        ({"batch_size": 1000}, "batch_size"),
        ({"n_iter": 1000}, "n_iter"),
        ({"script_args": "x" * 3, "alwayson_scripts": []}, "alwayson_scripts"),
        ({"width": 100}, "width"),
        ({"seed": -2}, "seed"),
    ],
)
def test_what_would_change_the_image_is_a_422_that_names_the_field(bundled, body, param):
    answer = bundled.client.post("/sdapi/v1/txt2img", json=SMALL | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
