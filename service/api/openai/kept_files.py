"""Image files behind the URLs in responses, kept in memory for a limited time under unguessable names."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from service.errors import NotFound
from service.requests.images import MEDIA_TYPES, Format
from service.requests.kept import Kept
from service.settings import Settings

SUFFIXES: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class KeptFile:
    content: bytes
    media_type: str


class KeptFiles:
    """The newest files, within the limits of kept jobs: jobs_kept, jobs_bytes and jobs_seconds."""

    def __init__(self, settings: Settings) -> None:
        self._files: dict[str, KeptFile] = {}
        self._kept = Kept(settings, self._files.__delitem__)

    def keep(self, content: bytes, kind: Format) -> str:
        """Keep a file; returns its name. The oldest files are dropped if the limits are exceeded."""
        name = f"img-{secrets.token_hex(24)}.{SUFFIXES[kind]}"
        self._files[name] = KeptFile(content, MEDIA_TYPES[kind])
        self._kept.add(name, len(content))
        return name

    def find(self, name: str) -> KeptFile:
        """The file with this name. Raises NotFound."""
        if name not in self._files:
            raise NotFound("there is no such image; images are kept for a limited time")
        return self._files[name]
