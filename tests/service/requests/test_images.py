"""Images in requests: which files are read and how, which are rejected with the name of their field."""

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


def read(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """The pixels that are read from an image that a client sends in base64."""
    return np.asarray(read_image(base64_of(image, kind, **options), "image", CAP))


def resolved(**body):
    """A /generate request, resolved for the model `tiny`."""
    body = GenerateRequest(**({"prompt": "p"} | body))
    return resolve(body, {"tiny": tiny_spec()}, Settings(max_input_pixels=CAP, max_pixels=10**6))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_8_bit_rgb_image_is_read_unchanged(kind, options):
    assert (read(noise(7, 5), kind, **options) == np.asarray(noise(7, 5))).all()


def test_a_jpeg_is_read_as_any_decoder_reads_it():
    file = file_of(noise(16, 16), "JPEG")
    read = read_image(base64_of(file), "image", CAP)
    assert (np.asarray(read) == np.asarray(Image.open(io.BytesIO(file)))).all()


def test_grey_palette_and_opaque_images_keep_their_colours():
    grey = noise(7, 5, "L")
    assert (read(grey) == np.asarray(grey)[..., None]).all()
    palette = noise(7, 5).quantize(8)
    assert (read(palette) == np.asarray(palette.convert("RGB"))).all()
    opaque = noise(7, 5)
    opaque.putalpha(255)
    assert (read(opaque) == np.asarray(noise(7, 5))).all()


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    assert read(image).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_16_bit_values_keep_their_upper_8_bits():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert read(Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_an_image_is_rotated_by_its_exif_orientation():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a camera held upright
    turned = read(noise(7, 5), exif=exif)
    assert (turned == np.asarray(noise(7, 5).transpose(Image.Transpose.ROTATE_270))).all()


def test_a_jpeg_with_a_second_preview_image_is_read_as_one_image():
    file = file_of(noise(16, 16), "MPO", save_all=True, append_images=[noise(8, 8)])
    assert read_image(base64_of(file), "image", CAP).size == (16, 16)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)),
        Image.fromarray(np.array([[False, False, True, True]])),
        Image.fromarray(np.array([[0, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)),
        Image.fromarray(np.array([[[255, 0], [255, 127], [255, 128], [255, 255]]], np.uint8), "LA"),
    ],
    ids=["L", "1", "I;16", "LA"],
)
def test_a_mask_of_any_mode_is_thresholded_at_half(image):
    assert np.asarray(read_mask(base64_of(image), "mask", CAP)).tolist() == [[0, 0, 255, 255]]


def test_base64_may_be_a_data_url_or_contain_line_breaks():
    text = base64_of(b"any bytes at all")
    for sent in (text, "data:image/png;base64," + text, text[:5] + "\r\n" + text[5:]):
        assert from_base64(sent, "image") == b"any bytes at all"


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG file of a few bytes whose header claims gigabytes of pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncated(kind: str) -> bytes:
    file = file_of(noise(64, 64), kind)
    return file[: len(file) // 2]


FRAMES = {"save_all": True, "append_images": [ImageOps.invert(noise(8, 8))]}
REFUSED = {
    "not base64": ("äöü", "base64"),
    "truncated base64": ("iVBORw0KGgo", "base64"),
    "a URL": ("http://127.0.0.1/image.png", "base64"),
    "a path": ("file:///etc/passwd", "base64"),
    "empty": ("", "PNG, JPEG or WebP"),
    "not an image": (base64_of(b"<svg/>"), "PNG, JPEG or WebP"),
    "another format": (base64_of(noise(8, 8), "GIF"), "PNG, JPEG or WebP"),
    "another format that Pillow reads": (base64_of(noise(8, 8), "TIFF"), "PNG, JPEG or WebP"),
    "too many pixels": (base64_of(noise(101, 100)), "10000 pixels"),
    "a decompression bomb": (base64_of(bomb()), "10000 pixels"),
    "a header without pixels": (base64_of(bomb(8, 8)), "broken"),
    "animated PNG": (base64_of(noise(8, 8), "PNG", **FRAMES), "animated"),
    "animated WebP": (base64_of(noise(8, 8), "WEBP", **FRAMES), "animated"),
    "half a PNG": (base64_of(truncated("PNG")), "broken"),
    "half a JPEG": (base64_of(truncated("JPEG")), "broken"),
    "half a WebP": (base64_of(truncated("WEBP")), ""),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_other_data_is_rejected_with_the_name_of_the_field(text, expected):
    with pytest.raises(InvalidRequest) as refused:
        read_image(text, "init_image", CAP)
    assert refused.value.param == "init_image"
    assert refused.value.message.startswith("init_image must")
    assert expected in refused.value.message


def test_a_canvas_repeats_the_last_row_and_column():
    image = Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8))
    assert list(extend(image, 3, 4)) == [1, 2, 2, 3, 4, 4, 3, 4, 4, 3, 4, 4]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (96, 48)),
        ({"width": 64, "height": 64}, (64, 64)),
        ({"width": 48}, (48, 24)),
        ({"height": 96}, (192, 96)),
    ],
)
def test_image_to_image_has_the_requested_size_or_that_of_the_image(fields, size):
    request = resolved(init_image=base64_of(noise(100, 50)), **fields)
    assert (request.width, request.height) == (request.canvas_width, request.canvas_height) == size
    assert len(request.inputs.image) == 3 * size[0] * size[1]
    assert request.task == "image-to-image"
    assert ("init_image is 100x50 and was resized" in "".join(request.warnings)) == (len(fields) < 2)


def test_an_image_of_a_size_of_the_model_is_not_resized():
    made = resolved(init_image=base64_of(noise(32, 48)), strength=1)
    assert (made.inputs.image, made.parameters.strength, made.warnings) == (noise(32, 48).tobytes(), 1.0, ())
    assert resolved(init_image=base64_of(noise(32, 48))).parameters.strength == 0.75


def test_image_to_image_needs_no_prompt():
    spec, fields = tiny_spec(), {"init_image": base64_of(noise(16, 16)), "strength": 0.5}
    job = resolve(GenerateRequest(**fields), {"tiny": spec}, Settings())
    assert (job.prompt, job.task) == ("", "image-to-image")
    with pytest.raises(InvalidRequest, match="prompt is required"):
        resolve(GenerateRequest(), {"tiny": spec}, Settings())


def test_a_task_that_the_model_does_not_support_is_rejected():
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
def test_invalid_sizes_and_strengths_are_rejected(body, param):
    with pytest.raises(InvalidRequest) as refused:
        resolved(**body)
    assert refused.value.param == param


def test_pixels_and_files_are_read_like_base64():
    image = noise(50, 37, "RGBA")
    expected = np.asarray(read_image(base64_of(image), "image", CAP))
    for source in (image, file_of(image)):
        assert (np.asarray(read_image(source, "image", CAP)) == expected).all()
    with pytest.raises(InvalidRequest, match="at most 100 pixels"):
        read_image(image, "image", 100)


def test_only_requests_made_inside_the_service_may_hold_pixels():
    image = noise(32, 48)
    assert resolved(init_image=image).inputs == resolved(init_image=base64_of(image)).inputs
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate_json('{"init_image": {}}')
