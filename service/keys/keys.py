"""All API keys of the service, read again whenever one of their files changes."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from service.keys.client import ANYBODY, STRANGER, Client
from service.keys.table import Clients, digest, plain_client, read_plain, read_table
from service.settings import SettingError, Settings

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between two checks for changed files

Stamp = tuple[int, int, int] | None  # of a file: changes with its content; None: the file cannot be read


class Keys:
    """The keys of the settings: api_keys, api_key_file, admin_key_file and key_table.

    A changed file is read again within POLL_SECONDS, so that keys can be added and revoked while the service
    runs. If it cannot be read then, the keys stay as they are. Raises SettingError for files with errors, and
    for files of plain keys without any.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._table = settings.key_table
        self._plain = {file: settings.admin_key_file == file for file in plain_files(settings)}
        self._needed = bool(settings.api_keys or settings.api_key_file or settings.key_table)
        self._stamps = self._stamp()
        self._clients = self._read()
        for file in self._plain:
            if not read_plain(Path(file)):
                raise SettingError(f"{file} has no API keys; expected one on each line")

    @property
    def names(self) -> set[str]:
        """The names of all clients, of those without a key too if there can be any."""
        anonymous = set() if self._needed else {STRANGER.name}
        return anonymous | {client.name for _, client in self._clients}

    def find(self, credentials: Iterable[bytes]) -> Client | None:
        """The client whose key is among the credentials of a request; None if it needs one and has none."""
        known = [client for credential in credentials if (client := self._find(credential))]
        if known:
            return next((client for client in known if client.admin), known[0])
        if self._needed:
            return None
        return STRANGER if self._settings.admin_key_file else ANYBODY

    def _find(self, credential: bytes) -> Client | None:
        """The client with this key; takes the same time for every credential."""
        own, found = digest(credential), None
        for known, client in self._clients:
            if hmac.compare_digest(own, known):
                found = client
        return found

    def _read(self) -> Clients:
        plain = [plain_client(key, False) for key in self._settings.api_keys]
        for file, admin in self._plain.items():
            plain += [plain_client(key, admin) for key in read_plain(Path(file))]
        clients = (*plain, *(read_table(Path(self._table)) if self._table else ()))
        alone = self._needed and len({client.id for _, client in clients}) == 1
        return tuple((own, replace(client, alone=alone)) for own, client in clients)

    def _stamp(self) -> list[Stamp]:
        return [stamp(Path(file)) for file in (*self._plain, self._table) if file]

    def refresh(self) -> bool:
        """Read the files again if one has changed; returns whether the keys are new."""
        stamps = self._stamp()
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            self._clients = self._read()
        except SettingError as error:
            log.error("the API keys stay as they were: %s", error)
            return False
        log.info("API keys were read again: %d", len(self._clients))
        return True

    async def watch(self, changed: Callable[[set[str]], None]) -> None:
        """Call refresh() every POLL_SECONDS. changed: called with the names of all keys after each change."""
        while self._stamps:
            await asyncio.sleep(POLL_SECONDS)
            if await asyncio.to_thread(self.refresh):
                changed(self.names)


def plain_files(settings: Settings) -> list[str]:
    return [file for file in (settings.api_key_file, settings.admin_key_file) if file]


def stamp(file: Path) -> Stamp:
    """What changes when a file is written or replaced, also through a link as in mounted Secrets."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
