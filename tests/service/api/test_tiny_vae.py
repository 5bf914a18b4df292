"""A server with a tiny VAE: which images and previews it makes, over HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny
from PIL import Image

from tests.checkpoints.tiny import fill_randomly
from tests.helpers.clients import error_of, image_of, open_image, post
from tests.helpers.images import psnr
from tests.helpers.servers import Server

BODY = {"prompt": "red apple", "seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def tiny_vae_server(start_server, tiny: Path, tmp_path_factory) -> Iterator[Server]:
    network, folder = AutoencoderTiny(), tmp_path_factory.mktemp("taesd")
    fill_randomly(network, 0)
    network.save_pretrained(folder)
    with start_server(tiny, LDM_TINY_VAE=str(folder)) as server:
        yield server


def test_the_tiny_decoder_makes_another_image_and_the_full_one_the_same(server, tiny_vae_server):
    full, own = post(tiny_vae_server, BODY), post(tiny_vae_server, BODY | {"decoder": "tiny"})
    assert (image_of(full) == image_of(post(server, BODY))).all()
    assert image_of(own).shape == (64, 64, 3)
    assert psnr(image_of(own), image_of(full)) < 40
    parameters = json.loads(open_image(own).text["parameters"])
    assert parameters["decoder"] == "tiny"
    assert (image_of(post(tiny_vae_server, parameters)) == image_of(own)).all()
    tiled = post(tiny_vae_server, BODY | {"decoder": "tiny", "tiling": "both"})
    assert psnr(image_of(own), image_of(tiled)) < 60


def test_a1111s_option_selects_the_decoder(server, tiny_vae_server):
    body = {"prompt": "red apple", "steps": 2, "seed": 3, "width": 64, "height": 64}
    images = [
        tiny_vae_server.client.post(
            "/sdapi/v1/txt2img", json=body | {"override_settings": {"sd_vae_decode_method": method}}
        ).json()["images"][0]
        for method in ("Full", "TAESD")
    ]
    assert images[0] != images[1]
    other = body | {"override_settings": {"sd_vae_decode_method": "TAESD"}}
    refused = error_of(server.client.post("/sdapi/v1/txt2img", json=other), 422)
    assert refused["param"] == "override_settings.sd_vae_decode_method"


def test_previews_have_the_size_of_the_image(tiny_vae_server):
    request = {"task": "generate", "request": BODY | {"steps": 4}, "preview_every": 2}
    job = tiny_vae_server.client.post("/jobs", json=request).json()["id"]
    with tiny_vae_server.client.stream("GET", f"/jobs/{job}/events") as events:
        lines = [line for line in events.iter_lines() if '"media_type"' in line and '"step"' in line]
    preview = json.loads(lines[0].removeprefix("data:"))
    assert Image.open(io.BytesIO(base64.b64decode(preview["data"]))).size == (64, 64)


def test_it_is_offered_where_it_was_given_and_refused_elsewhere(server, tiny_vae_server):
    decoders = [
        each.client.get("/models").json()["models"][0]["decoders"] for each in (server, tiny_vae_server)
    ]
    assert decoders == [["full"], ["full", "tiny"]]
    assert error_of(post(server, BODY | {"decoder": "tiny"}), 422)["param"] == "decoder"
