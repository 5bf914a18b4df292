"""The description of the API as generators of clients understand it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI


def install(app: FastAPI) -> None:
    """Let the app describe itself in plain terms."""
    made = app.openapi
    app.openapi = lambda: app.openapi_schema if app.openapi_schema else plain(made())


def text_of(app: FastAPI) -> str:
    """The description as it is committed: service/openapi.json."""
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def plain(node: Any) -> Any:
    """A description, changed in place: files are binary, and a field has one name.

    Newer frameworks call an upload a `contentMediaType`, which generators take for text. `image[]` is another
    spelling of `image` for forms; in most languages both would be one name.
    """
    if isinstance(node, dict):
        if node.get("contentMediaType") == "application/octet-stream":
            del node["contentMediaType"]
            node["format"] = "binary"
        fields = node.get("properties", {})
        for twin in [name for name in fields if name.endswith("[]") and name[:-2] in fields]:
            del fields[twin]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        plain(child)
    return node
