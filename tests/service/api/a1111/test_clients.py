"""Client libraries of A1111's API, run for real against a server."""

from __future__ import annotations

import pytest
from aaa1111 import AAA1111
from aaa1111.types import IMG2IMG, TXT2IMG
from sd_backend_client.api.a1111_webservice import A1111Webservice
from sd_backend_client.api.webui.diffusion_request_body import DiffusionRequestBody

SMALL = {"prompt": "red apple", "steps": 2, "width": 64, "height": 64, "seed": 1}


@pytest.fixture(scope="module")
def aaa1111(bundled) -> AAA1111:
    return AAA1111(base_url=str(bundled.client.base_url))


@pytest.fixture(scope="module")
def backend(bundled) -> A1111Webservice:
    return A1111Webservice(str(bundled.client.base_url))


def test_aaa1111_generates(aaa1111):
    made = aaa1111.txt2img(TXT2IMG(**SMALL, batch_size=2))
    assert [image.size for image in made.images] == [(64, 64)] * 2
    again = aaa1111.img2img(IMG2IMG(**SMALL, init_images=[made.images[0]], mask=made.images[1].convert("L")))
    assert again.images[0].size == (64, 64)
    assert again.info["all_seeds"] == [1]


def test_aaa1111_reads_everything(aaa1111):
    assert aaa1111.sd_models()[0].model_name == "emoji"
    assert aaa1111.progress().progress == 0
    for read in (aaa1111.samplers, aaa1111.upscalers, aaa1111.embeddings, aaa1111.scripts, aaa1111.memory):
        assert read()
    assert [lora.name for lora in aaa1111.loras()] == ["few-steps"]
    for read in (aaa1111.script_info, aaa1111.sd_vae, aaa1111.hypernetworks):
        assert read() == []
    for act in (aaa1111.skip, aaa1111.interrupt, aaa1111.refresh_loras, aaa1111.refresh_checkpoints,
                aaa1111.unload_checkpoint, aaa1111.reload_checkpoint):  # fmt: skip
        act()


def test_sd_backend_client_generates(backend):
    handle = backend.submit_txt2img(DiffusionRequestBody(**SMALL, sd_model_name="emoji"))
    image = handle.wait().images[0]
    assert image.size == (64, 64)
    mask = image.convert("L").point(lambda value: 255 if value > 100 else 0)
    mask.paste(255, (0, 0, 32, 64))
    body = DiffusionRequestBody(**SMALL, init_images=[image], mask=mask, inpainting_fill=2, mask_blur=2)
    assert backend.submit_inpaint(body).wait().images[0].size == (64, 64)
    assert backend.upscale(image, 128, 128)["images"][0].size == (128, 128)


def test_sd_backend_client_reads_everything(backend):
    assert [option.name for option in backend.list_checkpoints()] == ["emoji"]
    assert {"euler_ancestral", "dpmpp_2m"} <= {option.name for option in backend.list_samplers()}
    assert {"karras", "exponential"} <= {option.name for option in backend.list_schedulers()}
    assert [option.name for option in backend.list_upscalers()] == ["Lanczos", "Nearest", "emoji-upscale"]
    assert [option.name for option in backend.list_loras()] == ["few-steps"]
    for read in (backend.list_vaes, backend.list_hypernetworks):
        assert read() == []
    assert backend.get_capabilities().controlnet
    assert backend.interrupt() == {}
    for act in (backend.refresh_checkpoints, backend.refresh_vae, backend.refresh_loras):
        assert act().ok
