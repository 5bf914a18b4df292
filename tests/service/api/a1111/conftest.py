"""A client of A1111's API, on a server of the bundled models."""

from __future__ import annotations

import pytest
import webuiapi
from PIL import Image

from tests.helpers.servers import Server

PROMPT = "red apple on a blue background"


@pytest.fixture(scope="session")
def api(bundled: Server) -> webuiapi.WebUIApi:
    url = bundled.client.base_url
    return webuiapi.WebUIApi(host=url.host, port=url.port, sampler="DDIM", steps=4)


@pytest.fixture(scope="session")
def apple(api: webuiapi.WebUIApi) -> Image.Image:
    """A generated image, 128 x 128."""
    return api.txt2img(prompt=PROMPT, width=128, height=128, seed=1, cfg_scale=3.0, eta=0.0).image
