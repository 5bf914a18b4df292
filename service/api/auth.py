"""API keys: who may ask. A dependency of routers; which have none is app.py's to say."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope

from service.errors import Unauthorized
from service.setting_values import read_keys
from service.settings import SettingError, Settings

# Both are named in the API's description; what a client sent is read by Keys.
bearer = HTTPBearer(auto_error=False, description="one of the API keys, if the service has any")
header = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same, in a header of its own")


class Keys:
    """The digests of all keys, none where everybody may ask."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [digest(key.encode()) for key in keys]

    def admits(self, scope: Scope) -> bool:
        """Whether a request carries a key, as `Authorization: Bearer KEY`, `X-API-Key: KEY`, or the password
        of `Authorization: Basic`, which is all that clients of AUTOMATIC1111's API can send."""
        return not self._digests or any(map(self._knows, sent_in(scope)))

    def _knows(self, sent: bytes) -> bool:
        """Takes as long for every key, and for none."""
        return sum(hmac.compare_digest(digest(sent), known) for known in self._digests) > 0


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def sent_in(scope: Scope) -> list[bytes]:
    """What may be keys in a request's headers."""
    bare = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
    pairs = (value.split(None, 1) for name, value in scope["headers"] if name == b"authorization")
    told = [(pair[0].lower(), pair[1].strip()) for pair in pairs if len(pair) == 2]
    passwords = [password_in(value) for kind, value in told if kind == b"basic"]
    return bare + [value for kind, value in told if kind == b"bearer"] + passwords


def password_in(sent: bytes) -> bytes:
    """Of `user:password` in base64; of anything else, nothing that is a key."""
    try:
        return base64.b64decode(sent, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def keys_of(settings: Settings) -> Keys:
    """Those of both settings. Raises SettingError for a file that has none, or other things too."""
    return Keys(settings.api_keys + (keys_in(Path(settings.api_key_file)) if settings.api_key_file else ()))


def keys_in(file: Path) -> tuple[str, ...]:
    """The keys of a file: one a line, but empty ones and those that begin with #."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
        return read_keys(",".join(line for line in lines if line and not line.startswith("#")))
    except OSError as error:
        raise SettingError(f"the file of API keys, {file}, cannot be read: {error.strerror}") from None
    except ValueError:
        raise SettingError(
            f"{file}: expected API keys of at least 8 visible characters, one a line"
        ) from None


async def require_key(
    request: Request,
    _bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    _header: Annotated[str | None, Depends(header)],
) -> None:
    """Raise Unauthorized for a request without a key."""
    keys: Keys = request.app.state.keys
    if not keys.admits(request.scope):
        raise Unauthorized
