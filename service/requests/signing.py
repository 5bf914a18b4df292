"""Signed provenance: a C2PA manifest in image files, made with the operator's certificate.

Needs the package c2pa-python (`pip install '.[c2pa]'`). Nothing is sent over the network, so manifests have
no timestamp of an authority.
"""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from service.requests import images
from service.requests.images import MEDIA_TYPES, Format
from service.requests.metadata import SOURCES, TOOL, DigitalSource
from service.settings import SettingError, Settings

EC_ALGORITHMS = {256: b"es256", 384: b"es384", 521: b"es512"}  # bits of the key -> C2PA's name


class Signer:
    """Signs image files; usable from several threads."""

    def __init__(self, certificates: bytes, key: bytes) -> None:
        """certificates: the signer's and those up to the root's, in PEM; key: the private one, in PEM.

        Raises ValueError if they cannot be used, and ImportError without c2pa-python.
        """
        import c2pa

        self._c2pa, self._lock = c2pa, threading.Lock()
        info = c2pa.C2paSignerInfo(algorithm_of(key), certificates, key, None)
        try:
            self._signer = c2pa.Signer.from_info(info)
            self.sign(images.encode(np.zeros((8, 8, 3), np.uint8), "png"), "png", "trainedAlgorithmicMedia")
        except c2pa.C2paError as error:
            raise ValueError(error) from None

    def sign(self, file: bytes, kind: Format, source: DigitalSource) -> bytes:
        """The file with a manifest that states where its image comes from."""
        signed = io.BytesIO()
        with self._lock:
            builder = self._c2pa.Builder(json.dumps(manifest(source)))
            builder.sign(self._signer, MEDIA_TYPES[kind], io.BytesIO(file), signed)
        return signed.getvalue()


def manifest(source: DigitalSource) -> dict[str, Any]:
    action = {"action": "c2pa.created", "digitalSourceType": SOURCES + source}
    return {
        "claim_generator_info": [{"name": TOOL}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }


def algorithm_of(key: bytes) -> bytes:
    """C2PA's name of the signature algorithm of a private key. Raises ValueError for an unsupported key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    private = serialization.load_pem_private_key(key, None)
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.key_size in EC_ALGORITHMS:
        return EC_ALGORITHMS[private.key_size]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    raise ValueError("the key must be of an elliptic curve (P-256, P-384, P-521), Ed25519 or RSA")


def open_signer(settings: Settings) -> Signer | None:
    """The signer of the settings; None without one. Raises SettingError."""
    paths = {"c2pa_cert": settings.c2pa_cert, "c2pa_key": settings.c2pa_key}
    if not any(paths.values()) or settings.provenance == "none":
        return None
    for name, path in paths.items():
        if not path:
            raise SettingError(f"{name} is missing: c2pa_cert and c2pa_key are given together")
        if not Path(path).is_file():
            raise SettingError(f"{name} is {path!r}, which is not a file")
    try:
        return Signer(*(Path(path).read_bytes() for path in paths.values()))
    except ImportError:
        raise SettingError("c2pa_cert needs the package c2pa-python: pip install '.[c2pa]'") from None
    except (OSError, TypeError, ValueError) as error:
        raise SettingError(f"c2pa_cert and c2pa_key cannot be used: {error}") from None
