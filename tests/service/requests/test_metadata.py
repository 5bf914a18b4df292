"""What image files say about their images: parameters and provenance, in all formats."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from service.requests.image_files import essentials
from service.requests.images import encode
from service.requests.metadata import Metadata, read_parameters

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
TEXT = 'red äpple 🍎\nNegative prompt: "pear"\nSteps: 1, Seed: 2, Sampler: DDIM'
KINDS = ("png", "jpeg", "webp")
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def source_of(file: bytes) -> str | None:
    """IPTC's DigitalSourceType in the XMP of a file, by a parser that is not ours."""
    packet = opened(file).info.get("xmp") or opened(file).info.get("XML:com.adobe.xmp", "").encode()
    if not packet:
        return None
    text = packet.decode().split("?>", 1)[1].rsplit("<?xpacket", 1)[0]
    return next(ElementTree.fromstring(text).iter(IPTC)).text


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_provenance_are_in_the_same_file(kind):
    file = encode(PIXELS, kind, Metadata(TEXT, "compositeWithTrainedAlgorithmicMedia"))
    uri = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    assert source_of(file) == uri
    assert read_parameters(opened(file))[0] == TEXT
    assert read_parameters(opened(essentials(file)))[0] == TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_change_no_pixel_and_can_be_left_out(kind):
    plain = encode(PIXELS, kind)
    marked = encode(PIXELS, kind, Metadata(TEXT, "trainedAlgorithmicMedia"))
    assert (np.asarray(opened(plain)) == np.asarray(opened(marked))).all()
    assert source_of(plain) is None
    assert read_parameters(opened(plain)) == ("", {})
    assert encode(PIXELS, kind, Metadata()) == plain


def test_the_comment_is_utf_16_as_a1111_writes_it():
    exif = opened(encode(PIXELS, "jpeg", Metadata(TEXT))).getexif().get_ifd(0x8769)
    assert exif[0x9286] == b"UNICODE\0" + TEXT.encode("utf-16-be")


def test_parameters_too_long_for_a_jpeg_are_left_out():
    long = "x" * 40_000
    assert read_parameters(opened(encode(PIXELS, "jpeg", Metadata(long))))[0] == ""
    assert read_parameters(opened(encode(PIXELS, "webp", Metadata(long))))[0] == long
