"""JavaScript clients, run with node: the npm package `openai`, and a generated TypeScript client."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.helpers.environment import ROOT
from tests.helpers.images import file_of
from tests.helpers.node import run, run_node


def test_npm_openai_generates_edits_and_streams(node_clients, bundled, tmp_path: Path):
    image = tmp_path / "image.png"
    image.write_bytes(file_of(Image.new("RGB", (64, 64), "red")))
    address = f"{bundled.client.base_url}/v1"
    assert run_node(node_clients, "openai_images.mjs", address, str(image)) == {
        "size": "1024x1024",
        "fileStatus": 200,
        "fileType": "image/png",
        "editedKeys": ["b64_json"],
        "types": ["image_generation.partial_image", "image_generation.completed"],
        "refused": {"status": 400, "param": "background"},
    }


def test_a_generated_typescript_client_compiles_and_works(node_clients, bundled, tmp_path: Path):
    document, result = ROOT / "service" / "openapi.json", tmp_path / "result.json"
    run(["node_modules/.bin/openapi-ts", "-i", str(document), "-o", "generated"], node_clients)
    run(["node_modules/.bin/tsc", "--project", "."], node_clients)
    run(["node", "built/generated.js", str(bundled.client.base_url), "none", str(result)], node_clients)
    assert json.loads(result.read_text()) == {
        "models": ["emoji", "emoji-upscale"],
        "seed": 0,
        "edited": "128x128",
        "hasUrl": True,
        "param": "width",
    }
