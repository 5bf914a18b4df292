"""Image files behind the URLs in responses, kept in memory for a limited time under unguessable names."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from service.errors import NotFound
from service.requests.images import MEDIA_TYPES, Format
from service.settings import Settings

SUFFIXES: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class KeptFile:
    content: bytes
    media_type: str


class KeptFiles:
    """The newest files, within the limits of kept jobs: jobs_kept, jobs_bytes and jobs_seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files: dict[str, KeptFile] = {}  # oldest first
        self._bytes = 0

    def keep(self, content: bytes, kind: Format) -> str:
        """Keep a file; returns its name. The oldest files are dropped if the limits are exceeded."""
        name = f"img-{secrets.token_hex(24)}.{SUFFIXES[kind]}"
        self._files[name] = KeptFile(content, MEDIA_TYPES[kind])
        self._bytes += len(content)
        while len(self._files) > self._settings.jobs_kept or (
            self._bytes > self._settings.jobs_bytes and len(self._files) > 1
        ):
            self._drop(next(iter(self._files)))
        asyncio.get_running_loop().call_later(self._settings.jobs_seconds, self._drop, name)
        return name

    def find(self, name: str) -> KeptFile:
        """The file with this name. Raises NotFound."""
        if name not in self._files:
            raise NotFound("there is no such image; images are kept for a limited time")
        return self._files[name]

    def _drop(self, name: str) -> None:
        if file := self._files.pop(name, None):
            self._bytes -= len(file.content)
