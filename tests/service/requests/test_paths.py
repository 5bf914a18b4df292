"""No text of a request becomes part of a path or an address: no file and no connection is opened for it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from pydantic import ValidationError

from service.errors import ServiceError
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest, ImageRequest, InpaintRequest, UpscaleRequest
from service.settings import Settings
from tests.checkpoints.tiny import scene_spec, tiny_spec, upscaler_spec
from tests.helpers.images import base64_of, noise

MARK = "marker-of-a-path"
WORDS = (
    f"../../{MARK}",
    f"/tmp/{MARK}",
    f"file:///{MARK}",
    f"http://{MARK}/a.png",
    f"{MARK}.safetensors",
    f"<lora:../{MARK}:1>",
)
SPECS = {spec.name: spec for spec in (tiny_spec(), scene_spec(), upscaler_spec())}
IMAGE = base64_of(noise(64, 64))
WHOLE = {
    GenerateRequest: {"prompt": "p"},
    InpaintRequest: {"prompt": "p", "image": IMAGE, "mask": IMAGE},
    UpscaleRequest: {"image": IMAGE},
}

KINDS = ("open", "os", "shutil", "glob", "pathlib", "subprocess", "socket")  # of Python's audit events

recorders: list[list[str]] = []


def record(event: str, arguments: tuple) -> None:
    """An audit hook: called for every file that is opened, listed or executed, and every connection."""
    for recorder in recorders:
        if event.split(".")[0] in KINDS:
            recorder.append(f"{event} {arguments}")


sys.addaudithook(record)  # hooks cannot be removed


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The audit events of files and connections in this context."""
    recorders.append([])
    try:
        yield recorders[-1]
    finally:
        recorders.pop()


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("kind", WHOLE)
def test_no_field_of_a_request_opens_a_file_or_a_connection(kind: type[ImageRequest], word: str):
    tried = 0
    for name in kind.model_fields:
        for value in (word, {word: 1.0}, [word], [{"name": word, "x": 0, "y": 0, "w": 1, "h": 1}]):
            with recorded() as done, suppress(ServiceError, ValidationError):
                tried += 1
                resolve(kind(**WHOLE[kind] | {name: value}), SPECS, Settings())
            assert not [what for what in done if MARK in what]
    assert tried >= 40


def test_the_hook_records_files_and_addresses(tmp_path):
    with recorded() as done, suppress(FileNotFoundError):
        (tmp_path / MARK).read_text()
    assert any(MARK in what for what in done)
    with recorded() as done, suppress(OSError):
        socket.getaddrinfo(f"{MARK}.invalid", 80, flags=socket.AI_NUMERICHOST)
    assert any(MARK in what for what in done)
