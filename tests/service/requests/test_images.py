"""Clients' pictures: what is taken and as what, and what is refused by the name of its field."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.requests.images import extend, from_base64, read_image, read_mask
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.images import base64_of, file_of, noise

CAP = 10_000
ORIENTATION = 0x0112


def read(picture: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """What becomes of a picture that a client sends."""
    return np.asarray(read_image(base64_of(picture, kind, **options), "image", CAP))


def order(**body):
    """An order for the tiny model, by /generate."""
    body = GenerateRequest(**({"prompt": "p"} | body))
    return resolve(body, {"tiny": tiny_spec()}, Settings(max_input_pixels=CAP, max_pixels=10**6))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_8_bit_rgb_picture_is_read_as_it_is(kind, options):
    assert (read(noise(7, 5), kind, **options) == np.asarray(noise(7, 5))).all()


def test_a_jpeg_is_read_as_any_decoder_reads_it():
    file = file_of(noise(16, 16), "JPEG")
    read = read_image(base64_of(file), "image", CAP)
    assert (np.asarray(read) == np.asarray(Image.open(io.BytesIO(file)))).all()


def test_grey_palette_and_opaque_pictures_keep_their_colours():
    grey = noise(7, 5, "L")
    assert (read(grey) == np.asarray(grey)[..., None]).all()
    palette = noise(7, 5).quantize(8)
    assert (read(palette) == np.asarray(palette.convert("RGB"))).all()
    opaque = noise(7, 5)
    opaque.putalpha(255)
    assert (read(opaque) == np.asarray(noise(7, 5))).all()


def test_what_is_transparent_shows_white():
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (200, 0, 0, 0))
    assert read(picture).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_of_16_bits_the_upper_8_stay():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert read(Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_a_picture_is_turned_as_its_exif_data_say():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a camera held upright
    turned = read(noise(7, 5), exif=exif)
    assert (turned == np.asarray(noise(7, 5).transpose(Image.Transpose.ROTATE_270))).all()


def test_a_photograph_with_a_preview_of_itself_is_one_picture():
    file = file_of(noise(16, 16), "MPO", save_all=True, append_images=[noise(8, 8)])
    assert read_image(base64_of(file), "image", CAP).size == (16, 16)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)),
        Image.fromarray(np.array([[False, False, True, True]])),
        Image.fromarray(np.array([[0, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)),
        Image.fromarray(np.array([[[255, 0], [255, 127], [255, 128], [255, 255]]], np.uint8), "LA"),
    ],
    ids=["L", "1", "I;16", "LA"],
)
def test_a_mask_of_any_mode_is_cut_at_half(picture):
    assert np.asarray(read_mask(base64_of(picture), "mask", CAP)).tolist() == [[0, 0, 255, 255]]


def test_base64_may_be_a_data_url_and_broken_into_lines():
    text = base64_of(b"any bytes at all")
    for sent in (text, "data:image/png;base64," + text, text[:5] + "\r\n" + text[5:]):
        assert from_base64(sent, "image") == b"any bytes at all"


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header promises gigabytes."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cut(kind: str) -> bytes:
    file = file_of(noise(64, 64), kind)
    return file[: len(file) // 2]


FRAMES = {"save_all": True, "append_images": [ImageOps.invert(noise(8, 8))]}
REFUSED = {
    "no base64": ("äöü", "base64"),
    "half of base64": ("iVBORw0KGgo", "base64"),
    "an address": ("http://127.0.0.1/picture.png", "base64"),
    "a path": ("file:///etc/passwd", "base64"),
    "nothing": ("", "PNG, JPEG or WebP"),
    "no picture": (base64_of(b"<svg/>"), "PNG, JPEG or WebP"),
    "another format": (base64_of(noise(8, 8), "GIF"), "PNG, JPEG or WebP"),
    "another format of Pillow's": (base64_of(noise(8, 8), "TIFF"), "PNG, JPEG or WebP"),
    "too many pixels": (base64_of(noise(101, 100)), "10000 pixels"),
    "a bomb": (base64_of(bomb()), "10000 pixels"),
    "a header without pixels": (base64_of(bomb(8, 8)), "broken"),
    "animated PNG": (base64_of(noise(8, 8), "PNG", **FRAMES), "animated"),
    "animated WebP": (base64_of(noise(8, 8), "WEBP", **FRAMES), "animated"),
    "half a PNG": (base64_of(cut("PNG")), "broken"),
    "half a JPEG": (base64_of(cut("JPEG")), "broken"),
    "half a WebP": (base64_of(cut("WEBP")), ""),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_of_ours_is_refused_by_its_field(text, expected):
    with pytest.raises(InvalidRequest) as refused:
        read_image(text, "init_image", CAP)
    assert refused.value.param == "init_image"
    assert refused.value.message.startswith("init_image must")
    assert expected in refused.value.message


def test_a_canvas_repeats_the_last_row_and_column():
    picture = Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8))
    assert list(extend(picture, 3, 4)) == [1, 2, 2, 3, 4, 4, 3, 4, 4, 3, 4, 4]


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (96, 48)),
        ({"width": 64, "height": 64}, (64, 64)),
        ({"width": 48}, (48, 32)),
        ({"height": 96}, (192, 96)),
    ],
)
def test_a_run_from_a_picture_has_the_size_asked_for_or_the_pictures_own(asked, size):
    made = order(init_image=base64_of(noise(100, 50)), **asked)
    assert (made.width, made.height) == (made.canvas_width, made.canvas_height) == size
    assert len(made.inputs.image) == 3 * size[0] * size[1]
    assert made.task == "image-to-image"
    assert ("init_image is 100x50 and was resized" in "".join(made.warnings)) == (len(asked) < 2)


def test_a_picture_of_a_size_that_the_model_takes_is_run_from_as_it_is():
    made = order(init_image=base64_of(noise(32, 48)), strength=1)
    assert (made.inputs.image, made.parameters.strength, made.warnings) == (noise(32, 48).tobytes(), 1.0, ())
    assert order(init_image=base64_of(noise(32, 48))).parameters.strength == 0.75


def test_a_run_from_a_picture_needs_no_words():
    spec, asked = tiny_spec(), {"init_image": base64_of(noise(16, 16)), "strength": 0.5}
    job = resolve(GenerateRequest(**asked), {"tiny": spec}, Settings())
    assert (job.prompt, job.task) == ("", "image-to-image")
    with pytest.raises(InvalidRequest, match="prompt is required"):
        resolve(GenerateRequest(), {"tiny": spec}, Settings())


def test_a_model_is_asked_only_for_what_it_does():
    spec = replace(tiny_spec(), tasks=("text-to-image",))
    with pytest.raises(InvalidRequest, match="model must support image-to-image"):
        resolve(GenerateRequest(prompt="p", init_image=base64_of(noise(16, 16))), {"tiny": spec}, Settings())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"strength": 0.5}, "strength"),
        ({"init_image": base64_of(noise(32, 32)), "width": 65}, "width"),
        ({"init_image": base64_of(noise(1, 100)), "width": 2048}, "width"),
    ],
)
def test_sizes_and_strengths_that_cannot_be_are_refused(body, param):
    with pytest.raises(InvalidRequest) as refused:
        order(**body)
    assert refused.value.param == param


def test_pixels_and_files_are_read_as_base64_is():
    image = noise(50, 37, "RGBA")
    expected = np.asarray(read_image(base64_of(image), "image", CAP))
    for source in (image, file_of(image)):
        assert (np.asarray(read_image(source, "image", CAP)) == expected).all()
    with pytest.raises(InvalidRequest, match="at most 100 pixels"):
        read_image(image, "image", 100)


def test_a_request_inside_the_service_may_carry_pixels_and_one_from_outside_may_not():
    image = noise(32, 48)
    assert order(init_image=image).inputs == order(init_image=base64_of(image)).inputs
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate_json('{"init_image": {}}')
