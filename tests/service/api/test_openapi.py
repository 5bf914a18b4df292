"""The description of the API: committed; a client made of it works; requests drawn from it break nothing."""

from __future__ import annotations

import base64
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from PIL import Image
from schemathesis.checks import (
    CheckContext,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api.app import create_app
from service.api.openapi import document_text, simplify
from service.settings import Settings
from tests.helpers.environment import ROOT
from tests.helpers.images import base64_of, file_of, noise
from tests.helpers.servers import Server

COMMITTED = ROOT / "service" / "openapi.json"
UPDATE = "service/openapi.json is not what the code says. Update it: ldm openapi > service/openapi.json"
KEY = "a-key-of-the-tests"
EXAMPLES = 10  # of each operation
MEANT = (503, 504, 507)  # answers above 499 that are no bug
LEAKS = ("Traceback", 'File "', "site-packages", "0x7f", str(ROOT))


@pytest.fixture(scope="module")
def served(start_server) -> Iterator[Server]:
    """The models in the box, for those who have a key, where no request can ask for much work."""
    settings = {"LDM_MAX_WORK": str(128 * 128 * 10), "LDM_API_KEYS": KEY}
    with start_server("emoji", "emoji-upscale", **settings) as server:
        yield server


def test_the_committed_description_is_that_of_the_code():
    assert json.loads(COMMITTED.read_text()) == json.loads(document_text(create_app(Settings()))), UPDATE


def test_the_command_prints_it():
    command = [sys.executable, "-m", "service.cli", "openapi"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == document_text(create_app(Settings()))


# A client, made by a generator that people use.


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package that openapi-python-client makes of the description."""
    folder = tmp_path_factory.mktemp("sdk")
    (folder / "config.yml").write_text("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(COMMITTED)]
    command += ["--meta", "none", "--output-path", str(folder / "ldm_client")]
    command += ["--config", str(folder / "config.yml"), "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # nothing of the API is left out
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield partial(importlib.import_module, package="ldm_client")


@pytest.fixture
def client(sdk, served):
    url = str(served.client.base_url)
    client = sdk("ldm_client").AuthenticatedClient(base_url=url, token=KEY, raise_on_unexpected_status=True)
    with client:  # closes its connections
        yield client


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_generated_client_generates(sdk, client):
    models, generate = sdk("ldm_client.models"), sdk("ldm_client.api.native.generate")
    body = models.GenerateRequest(prompt="red apple on a blue background", steps=3, seed=0)
    made = generate.sync(client=client, body=body)
    assert isinstance(made, models.GenerateResponse)
    assert (made.images[0].seed, opened(made.images[0].data).size) == (0, (128, 128))


def test_a_generated_client_inpaints(sdk, client):
    models, inpaint = sdk("ldm_client.models"), sdk("ldm_client.api.native.inpaint")
    sent, mask = noise(128, 128), Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    body = models.InpaintRequest(prompt="ghost", image=base64_of(sent), mask=base64_of(mask), steps=3)
    made = opened(inpaint.sync(client=client, body=body).images[0].data)
    right = (64, 0, 128, 128)
    assert made.crop(right).tobytes() == sent.crop(right).tobytes()
    assert made.tobytes() != sent.tobytes()


def test_a_generated_client_upscales(sdk, client):
    models, upscale = sdk("ldm_client.models"), sdk("ldm_client.api.native.upscale")
    made = upscale.sync(client=client, body=models.UpscaleRequest(image=base64_of(noise(24, 16)), steps=2))
    assert opened(made.images[0].data).size == (96, 64)


def test_a_generated_client_uploads_a_file(sdk, client):
    models, types = sdk("ldm_client.models"), sdk("ldm_client.types")
    edit = sdk("ldm_client.api.openai.edit_image")
    upload = types.File(
        payload=io.BytesIO(file_of(noise(128, 128))), file_name="a.png", mime_type="image/png"
    )
    body = models.ImageEdit(prompt="red apple", image=[upload], size="128x128", steps=4)
    made = edit.sync(client=client, body=body)
    assert isinstance(made, models.ImagesResponse)
    assert opened(made.data[0].b64_json).size == (128, 128)


def test_a_generated_client_reads_what_was_refused(sdk, client):
    models, generate = sdk("ldm_client.models"), sdk("ldm_client.api.native.generate")
    refused = generate.sync(client=client, body=models.GenerateRequest(prompt="p", width=1))
    assert isinstance(refused, models.ErrorBody)
    assert refused.error.param == "width"


# Requests drawn from the description.


SMALL = {"type": "integer", "minimum": 32, "maximum": 128, "multipleOf": 32}
FEW = {"type": "integer", "minimum": 1, "maximum": 2}
PNG = base64_of(Image.new("RGB", (32, 32), "white"))
LIMITS = {
    **{name: {"enum": [PNG, PNG[:-9], "?"]} for name in ("image", "init_image", "mask")},
    "model": {"enum": [None, "emoji", "../emoji"]},
    "sampler": {"enum": [None, "ddim", "euler", "?"]},
    **dict.fromkeys(("width", "height"), SMALL),
    **dict.fromkeys(("n", "batch_size", "n_iter"), FEW),
    **dict.fromkeys(("steps", "num_inference_steps"), FEW | {"maximum": 3}),
    "timeout": {"type": "number", "minimum": 5, "maximum": 60},
}


def cheap(description: dict[str, Any]) -> dict[str, Any]:
    """The description, with requests that ask for little: else they were hours of work, or 422s alone."""
    schemas = description["components"]["schemas"]
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    bodies = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    for name in referred(bodies, schemas):
        fields = schemas[name].get("properties", {})
        fields |= {
            key: limits for key, limits in LIMITS.items() if key in fields and not is_file(fields[key])
        }
        asked = {"steps", "num_inference_steps"} & fields.keys()
        schemas[name]["required"] = sorted(asked.union(schemas[name].get("required", ())))
    return description


def is_file(schema: dict[str, Any]) -> bool:
    """Whether a field is an upload, or several."""
    return schema.get("items", schema).get("format") == "binary"


def referred(node: Any, schemas: dict[str, Any]) -> set[str]:
    """The names of all schemas that a part of a description is made of."""
    if isinstance(node, dict) and "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return {name} | referred(schemas[name], schemas)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return set().union(*(referred(child, schemas) for child in children))


api = schemathesis.openapi.from_dict(cheap(json.loads(COMMITTED.read_text())))


def no_bug(ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """No error but those that are meant, and nothing of ours in any answer."""
    assert response.status_code < 500 or response.status_code in MEANT, response.text
    if response.status_code >= 400:
        assert not [leak for leak in LEAKS if leak in response.text]
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"][0]


@api.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_drawn_request_has_an_answer_that_is_not_described(case, served):
    case.call_and_validate(
        base_url=str(served.client.base_url),
        checks=[no_bug, status_code_conformance, content_type_conformance, response_schema_conformance],
        headers={"X-API-Key": KEY},
        timeout=60,
    )
    served.check_alive()


# What client generators fail on.


def test_no_property_can_only_be_null():
    for name, schema in described_schemas().items():
        for key, value in schema.get("properties", {}).items():
            assert value.get("type") != "null", f"{name}.{key}"


def test_integers_that_may_pass_32_bits_say_so():
    seed = described_schemas()["GenerateRequest"]["properties"]["seed"]["anyOf"][0]
    assert (seed["type"], seed["format"]) == ("integer", "int64")


def test_simplify_leaves_out_properties_that_generators_cannot_name():
    schema = {
        "properties": {
            "image": {"type": "string"},
            "image[]": {"type": "string"},
            "nothing": {"type": "null"},
            "mode": {"type": "string", "enum": ["", "None"]},
        },
        "required": ["nothing"],
    }
    assert simplify(schema) == {"properties": {"image": {"type": "string"}, "mode": {"type": "string"}}}


def described_schemas() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text())["components"]["schemas"]
