"""What the fuzzer calls: each target reads bytes from outside, and may raise only the errors in its row.

Any other error, a run of more than a few seconds, or a large amount of memory is a fault.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import ValidationError

from models.adapters.inspection import inspect_adapter
from models.checkpoint import inspection
from models.conditioning import prompt_schedule, prompts
from models.errors import CheckpointError
from models.formats.compvis_yaml import CompvisConfig
from models.formats.config_files import read_json, read_yaml
from models.formats.identify import identify
from models.formats.pickles import read_pickle
from models.formats.safetensors import read_safetensors
from models.spec import ModelSpec
from service.api.a1111 import infotext
from service.cli.from_image import fields_of_file
from service.cli.options import UsageError
from service.errors import InvalidRequest, ServiceError
from service.requests import images
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest
from service.settings import Settings
from tests.checkpoints import ldm_models
from tests.checkpoints.hollow import write_hollow
from tests.helpers.environment import ROOT

MAX_PIXELS = 2**20


class Target(NamedTuple):
    """read: takes the input. errors: what it may raise."""

    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]


@cache
def folder() -> Path:
    """A folder for files, which readers want; in memory where there is such a file system."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """The reader of a file, as a reader of its bytes."""

    def target(data: bytes) -> object:
        file = folder() / name
        file.write_bytes(data)
        return read(file)

    return target


def changed(shapes: dict[str, list[int]], data: bytes) -> dict[str, list[int]]:
    """The shapes of a file with some of them changed; four bytes of data select and make each change."""
    shapes = {name: list(shape) for name, shape in shapes.items()}
    for low, high, kind, value in zip(data[::4], data[1::4], data[2::4], data[3::4], strict=False):
        name = list(shapes)[(256 * high + low) % len(shapes)]
        shape = shapes.pop(name)
        match kind % 6:
            case 0 if shape:
                shape[value % len(shape)] = value
            case 1:
                shape.append(value)
            case 2 if shape:
                shape.pop()
            case 3:
                name = name.replace(str(value % 4), str(value % 7))
            case 4:
                name = name[value % 8 :]
            case 5 if len(shapes):
                continue
        shapes[name] = shape
    return shapes


@cache
def known_files() -> tuple[dict[str, list[int]], ...]:
    """The shapes of files of different kinds: models of the paper, a ControlNet, a LoRA."""
    models = [ldm_models.write(folder(), name) for name in ("txt2img-1p4B", "layout2img", "kl-f8")]
    adapters = [ROOT / "weights" / name for name in ("emoji-outline", "emoji-few-steps")]
    files = models + [file for each in adapters for file in each.glob("*.safetensors")]
    return tuple({k: list(v) for k, v in read_safetensors(file).shapes.items()} for file in files)


def read_changed_checkpoint(data: bytes) -> None:
    """`ldm inspect` of a known file with changed names and shapes; the first byte selects the file."""
    known, file = known_files(), folder() / "b.safetensors"
    write_hollow(file, changed(known[(data[:1] or b"\0")[0] % len(known)], data[1:]))
    inspect_adapter(file, model=spec())
    inspection.inspect(file)


def read_yaml_options(file: Path) -> None:
    config = CompvisConfig(file, read_yaml(file))
    config.hints()
    config.check(spec())


@cache
def spec() -> ModelSpec:
    return identify(ROOT / "weights" / "emoji").spec


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def read_prompt(data: bytes) -> None:
    text = text_of(data)
    prompts.parse(text)
    prompts.parse(text, breaks=True)
    for part in prompt_schedule.split(text):
        for _, at_step in prompt_schedule.schedule(part.text, steps=20):
            prompts.parse(at_step, breaks=True)


def read_infotext(data: bytes) -> None:
    text = text_of(data)
    infotext.parameters_of(text)
    infotext.unsupported(text)
    infotext.fields_of(text)


def read_image(data: bytes) -> None:
    image = images.read_image(data, "image", MAX_PIXELS)
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS


def read_base64(data: bytes) -> None:
    images.read_image(text_of(data), "image", MAX_PIXELS)


def read_mask(data: bytes) -> None:
    assert images.read_mask(data, "mask", MAX_PIXELS).mode == "L"


def read_parameters(data: bytes) -> None:
    """--from: the bytes are the parameters in an image file."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("parameters", text_of(data))
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    fields_of_file(file.getvalue(), {"emoji": spec()}, Settings())


def read_request(data: bytes) -> None:
    """A body of POST /generate, checked as far as the queue."""
    resolve(GenerateRequest.model_validate_json(data), {"emoji": spec()}, Settings()).to_job()


FILES = (CheckpointError,)
TARGETS = {
    "pickle": Target(in_file("a.ckpt", read_pickle), FILES),
    "safetensors": Target(in_file("a.safetensors", read_safetensors), FILES),
    "checkpoint": Target(read_changed_checkpoint, FILES),
    "yaml": Target(in_file("a.yaml", read_yaml_options), FILES),
    "json": Target(in_file("a.json", read_json), FILES),
    "prompt": Target(read_prompt, (prompt_schedule.PromptError,)),
    "infotext": Target(read_infotext, (ValueError,)),
    "parameters": Target(read_parameters, (UsageError, InvalidRequest)),
    "image": Target(read_image, (InvalidRequest,)),
    "base64": Target(read_base64, (InvalidRequest,)),
    "mask": Target(read_mask, (InvalidRequest,)),
    "request": Target(read_request, (ServiceError, ValidationError)),
}


def run(name: str, data: bytes) -> None:
    """Give a target its input. Raises what the target must not raise."""
    target = TARGETS[name]
    with suppress(*target.errors):
        target.read(data)
