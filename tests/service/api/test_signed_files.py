"""A server with a certificate signs the files of every API."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

import c2pa
import pytest

from tests.helpers.certificates import write_certificates
from tests.helpers.images import base64_of, noise
from tests.helpers.servers import Server

BODY = {"prompt": "red apple", "steps": 1}
START = base64_of(noise(64, 64))


@pytest.fixture(scope="module")
def signing_server(start_server, tmp_path_factory) -> Iterator[Server]:
    chain, key = write_certificates(tmp_path_factory.mktemp("c2pa"))
    with start_server(LDM_C2PA_CERT=str(chain), LDM_C2PA_KEY=str(key)) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body", "source"),
    [
        ("/generate", {"output_format": "webp"}, "trainedAlgorithmicMedia"),
        ("/generate", {"init_image": START}, "compositeWithTrainedAlgorithmicMedia"),
        ("/v1/images/generations", {"response_format": "b64_json"}, "trainedAlgorithmicMedia"),
        ("/sdapi/v1/txt2img", {"width": 64, "height": 64}, "trainedAlgorithmicMedia"),
    ],
)
def test_files_of_every_api_are_signed(signing_server, path, body, source):
    answer = signing_server.client.post(path, json=BODY | body).json()
    images = answer.get("images") or answer["data"]
    text = images[0] if isinstance(images[0], str) else images[0].get("data") or images[0]["b64_json"]
    kind = f"image/{body.get('output_format', 'png')}"
    report = json.loads(c2pa.Reader(kind, io.BytesIO(base64.b64decode(text))).json())
    assert report["validation_state"] == "Valid"
    (action,) = report["manifests"][report["active_manifest"]]["assertions"][0]["data"]["actions"]
    assert action["digitalSourceType"].rpartition("/")[2] == source
