"""The URL at which a client reaches this service, for links in responses."""

from __future__ import annotations

import re

from fastapi import Request

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")


def base_url(request: Request) -> str:
    """The service's URL as the client sees it, without a final slash.

    A proxy names it in X-Forwarded-Proto, -Host and -Prefix. A client that forges these headers changes only
    its own response.
    """
    scheme = forwarded(request, "proto")
    host = forwarded(request, "host")
    scheme = scheme if scheme in ("http", "https") else request.url.scheme
    host = host if HOST.fullmatch(host) else request.url.netloc
    return f"{scheme}://{host}{path_prefix(request)}"


def path_prefix(request: Request) -> str:
    """The path that a proxy puts before the service's own paths, without a final slash; '' if none."""
    prefix = forwarded(request, "prefix")
    prefix = prefix if PREFIX.fullmatch(prefix) else ""
    return (prefix or str(request.scope.get("root_path", ""))).rstrip("/")


def forwarded(request: Request, name: str) -> str:
    """The first value of an X-Forwarded-* header, or ''."""
    return request.headers.get(f"x-forwarded-{name}", "").split(",")[0].strip()
