"""The key table: a TOML file of keys by name, each with its SHA-256 hash and its limits.

    [keys.alice]
    sha256 = "93bb09e9b24d67f3e8d0c2b9ea8d4ae8a3d43a17bfcdfc5a0f7a7f2d2d9c8a10"
    requests_per_minute = 60

The key itself is not in the file, so a copy of the file lets nobody in.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.keys.client import UNNAMED, Client, KeyLimits
from service.setting_values import read_keys
from service.settings import SettingError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = (UNNAMED, "anonymous")
KEY_PREFIX = "ldm_"  # so that programs that look for leaked secrets recognise a key
KEY_BYTES = 32

Clients = tuple[tuple[bytes, Client], ...]  # (digest of a key, its client)

Digest = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
Count = Annotated[int, Field(ge=1, le=10**9)]


class Entry(BaseModel):
    """A key's entry in the table. sha256: several hashes while a key is replaced by a new one."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    sha256: Digest | Annotated[list[Digest], Field(min_length=1)]
    admin: bool = False
    requests_per_minute: Count | None = None
    images_per_hour: Count | None = None
    running_jobs: Count | None = None
    share: Annotated[float, Field(ge=0.001, le=1000, strict=False)] = 1.0

    @property
    def digests(self) -> list[bytes]:
        hashes = [self.sha256] if isinstance(self.sha256, str) else self.sha256
        return [bytes.fromhex(text) for text in hashes]

    def client(self, name: str) -> Client:
        limits = KeyLimits(self.requests_per_minute, self.images_per_hour, self.running_jobs)
        return Client(f"key {name}", name, self.admin, limits, self.share)


def read_table(file: Path) -> Clients:
    """The clients of a key table; none if it has no entries. Raises SettingError, which shows no hash."""
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingError(f"the key table {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"{file} is not a TOML file: {error}") from None
    keys = content.pop("keys", {})
    if content or not isinstance(keys, dict):
        raise SettingError(f"{file}: expected only tables [keys.NAME], one for each key")
    clients = tuple(pair for name, fields in keys.items() for pair in clients_of(file, name, fields))
    if len({digest for digest, _ in clients}) < len(clients):
        raise SettingError(f"{file}: two entries have the same hash")
    return clients


def clients_of(file: Path, name: str, fields: Any) -> Iterator[tuple[bytes, Client]]:
    """The client of an entry, once for each of its hashes. Raises SettingError."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise SettingError(
            f"{file}: the name {name!r} is not possible; expected up to 64 letters, digits, _ and -, "
            f"and none of {', '.join(RESERVED)}"
        )
    try:
        entry = Entry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(["keys", name, *map(str, first["loc"][:1])])
        raise SettingError(f"{file}: {field}: {expected(first)}") from None
    for one in entry.digests:
        yield one, entry.client(name)


def expected(error: Mapping[str, Any]) -> str:
    """What is wrong with a field of an entry."""
    if error["loc"][:1] == ("sha256",) and error["type"] != "missing":
        return "expected the key's SHA-256 as 64 hexadecimal digits, or a list of these"
    if error["type"] == "extra_forbidden":
        return f"is not a field of a key; expected one of {', '.join(Entry.model_fields)}"
    text: str = error["msg"]
    return text[0].lower() + text[1:]


def read_plain(file: Path) -> tuple[str, ...]:
    """The keys of a file, one on each line; empty lines and lines that begin with # are skipped.

    Raises SettingError.
    """
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        return read_keys(",".join(keys)) if keys else ()
    except OSError as error:
        raise SettingError(f"the API key file {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SettingError(
            f"{file}: expected API keys of at least 8 visible characters, one on each line"
        ) from None


def plain_client(key: str, admin: bool) -> tuple[bytes, Client]:
    """The client of a key that has no name."""
    own = digest(key.encode())
    return own, Client(f"plain {own.hex()[:32]}", UNNAMED, admin)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def new_key() -> str:
    """A random key."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def to_toml(name: str, own: bytes, fields: Mapping[str, bool | float | None]) -> str:
    """The entry of a key in a table. own: its digest. Raises SettingError for an impossible name or field."""
    given = {field: value for field, value in fields.items() if value is not None and value is not False}
    list(clients_of(Path("the new entry"), name, {"sha256": own.hex(), **given}))
    lines = [f"[keys.{name}]", f'sha256 = "{own.hex()}"']
    lines += [f"{field} = {str(value).lower()}" for field, value in given.items()]
    return "\n".join(lines)
