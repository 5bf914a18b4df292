"""C2PA manifests in image files, read by the library's own reader."""

from __future__ import annotations

import io
import json
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from service.requests.images import MEDIA_TYPES, encode
from service.requests.metadata import Metadata, read_parameters
from service.requests.signing import Signer, open_signer
from service.settings import SettingError, Settings
from tests.helpers.certificates import pem, write_certificates

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificates(tmp_path_factory.mktemp("c2pa"))


@pytest.fixture(scope="module")
def signer(files: tuple[Path, Path]) -> Signer:
    return Signer(*(file.read_bytes() for file in files))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_signed_file_states_its_source_and_keeps_everything_else(signer, kind):
    plain = encode(PIXELS, kind, Metadata("Steps: 1", "trainedAlgorithmicMedia"))
    signed = signer.sign(plain, kind, "compositeWithTrainedAlgorithmicMedia")
    report = json.loads(c2pa.Reader(MEDIA_TYPES[kind], io.BytesIO(signed)).json())
    assert report["validation_state"] == "Valid"
    assert {problem["code"] for problem in report["validation_status"]} == {"signingCredential.untrusted"}
    (action,) = report["manifests"][report["active_manifest"]]["assertions"][0]["data"]["actions"]
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    before, after = Image.open(io.BytesIO(plain)), Image.open(io.BytesIO(signed))
    assert (np.asarray(before) == np.asarray(after)).all()
    assert read_parameters(after)[0] == "Steps: 1"
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in signed


def test_a_changed_file_is_not_valid(signer):
    signed = signer.sign(encode(PIXELS, "png", Metadata("Steps: 1")), "png", "trainedAlgorithmicMedia")
    report = json.loads(c2pa.Reader("image/png", io.BytesIO(signed.replace(b"Steps: 1", b"Steps: 2"))).json())
    assert report["validation_state"] == "Invalid"


def test_settings_that_cannot_be_used_are_named(files, tmp_path):
    chain, key = map(str, files)
    assert open_signer(Settings()) is None
    assert open_signer(Settings(c2pa_cert=chain, c2pa_key=key, provenance="none")) is None
    with pytest.raises(SettingError, match="c2pa_key is missing"):
        open_signer(Settings(c2pa_cert=chain))
    with pytest.raises(SettingError, match=r"c2pa_cert is .* not a file"):
        open_signer(Settings(c2pa_cert="nowhere.pem", c2pa_key=key))
    (tmp_path / "key.pem").write_bytes(pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(SettingError, match="cannot be used"):
        open_signer(Settings(c2pa_cert=chain, c2pa_key=str(tmp_path / "key.pem")))
    with pytest.raises(SettingError, match="cannot be used"):
        open_signer(Settings(c2pa_cert=chain, c2pa_key=chain))
