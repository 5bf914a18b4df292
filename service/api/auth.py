"""API keys. app.py decides which routes need one."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope

from service.errors import Forbidden, Unauthorized
from service.setting_values import read_keys
from service.settings import SettingError, Settings

# For the OpenAPI document only; Keys reads the headers.
bearer = HTTPBearer(auto_error=False, description="An API key; needed if the service has keys.")
header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key in another header.")


class Keys:
    """The digests of all API keys; without keys every request is admitted. Admin keys are API keys too.

    A key comes as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of `Authorization:
    Basic`, the only form that clients of AUTOMATIC1111's API can send.
    """

    def __init__(self, keys: tuple[str, ...], admin_keys: tuple[str, ...] = ()) -> None:
        self._admin_digests = [digest(key.encode()) for key in admin_keys]
        self._digests = [digest(key.encode()) for key in keys + admin_keys]
        self._all_need_one = bool(keys)

    def admits(self, scope: Scope) -> bool:
        """Whether a request has a valid key. If there are admin keys alone, only calls of admins need one."""
        return not self._all_need_one or self.knows(scope)

    def knows(self, scope: Scope) -> bool:
        """Whether a request has a valid key, or there are no keys."""
        return not self._digests or has_one_of(scope, self._digests)

    def admits_admin(self, scope: Scope) -> bool:
        """Whether a request has an admin key, or there are no keys."""
        return not self._digests or has_one_of(scope, self._admin_digests)


def has_one_of(scope: Scope, digests: Sequence[bytes]) -> bool:
    """Whether a credential of a request is a key with one of these digests."""
    return any(is_one_of(credential, digests) for credential in credentials_in(scope))


def is_one_of(credential: bytes, digests: Sequence[bytes]) -> bool:
    """Whether a credential is one of these keys; takes the same time for every credential."""
    return sum(hmac.compare_digest(digest(credential), known) for known in digests) > 0


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def credentials_in(scope: Scope) -> list[bytes]:
    """All credentials in a request's headers that may be an API key."""
    plain = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
    pairs = (value.split(None, 1) for name, value in scope["headers"] if name == b"authorization")
    schemes = [(pair[0].lower(), pair[1].strip()) for pair in pairs if len(pair) == 2]
    passwords = [password_in(value) for scheme, value in schemes if scheme == b"basic"]
    return plain + [value for scheme, value in schemes if scheme == b"bearer"] + passwords


def password_in(credentials: bytes) -> bytes:
    """The password of `user:password` in base64; if malformed, empty, which is never a key."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def keys_of(settings: Settings) -> Keys:
    """The keys of the settings. Raises SettingError for a file that has no keys or an invalid one."""
    files = settings.api_key_file, settings.admin_key_file
    keys, admin_keys = (keys_in(Path(file)) if file else () for file in files)
    return Keys(settings.api_keys + keys, admin_keys)


def keys_in(file: Path) -> tuple[str, ...]:
    """The keys of a file, one on each line; empty lines and lines that begin with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
        return read_keys(",".join(line for line in lines if line and not line.startswith("#")))
    except OSError as error:
        raise SettingError(f"the API key file {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SettingError(
            f"{file}: expected API keys of at least 8 visible characters, one on each line"
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


async def require_admin_key(
    request: Request,
    _bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    _header: Annotated[str | None, Depends(header)],
) -> None:
    """Raise Unauthorized for a request without a key, and Forbidden for one with an ordinary key."""
    keys: Keys = request.app.state.keys
    if not keys.knows(request.scope):
        raise Unauthorized
    if not keys.admits_admin(request.scope):
        raise Forbidden
