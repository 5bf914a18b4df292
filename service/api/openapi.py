"""The OpenAPI document, simplified for generators of client code."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI

MAX_INT32 = 2**31 - 1


def install(app: FastAPI) -> None:
    """Make `app.openapi()` return the simplified document."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = simplify(with_limits(build()))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this way of extending it


def document_text(app: FastAPI) -> str:
    """The document as JSON text, as committed in service/openapi.json."""
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def with_limits(document: dict[str, Any]) -> dict[str, Any]:
    """Add a 429 to every POST operation that needs a key: its limit of requests counts them all."""
    limited = {**document["paths"]["/generate"]["post"]["responses"]["429"]}
    for item in document["paths"].values():
        responses = item.get("post", {}).get("responses", {})
        if "401" in responses:
            responses.setdefault("429", limited)
    return document


def simplify(node: Any) -> Any:
    """Rewrite a part of the document in place: constructs of the framework that client generators reject."""
    if isinstance(node, dict):
        mark_upload(node)
        widen_integer(node)
        allow_empty_text(node)
        drop_properties(node)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        simplify(child)
    return node


def mark_upload(schema: dict[str, Any]) -> None:
    """Give a file upload `format: binary`; generators treat FastAPI's `contentMediaType` as text."""
    if schema.get("contentMediaType") == "application/octet-stream":
        del schema["contentMediaType"]
        schema["format"] = "binary"


def widen_integer(schema: dict[str, Any]) -> None:
    """Give an integer that may exceed 32 bits, such as a seed, `format: int64`; generators assume 32 bits."""
    if schema.get("type") == "integer" and schema.get("maximum", MAX_INT32 + 1) > MAX_INT32:
        schema["format"] = "int64"


def allow_empty_text(schema: dict[str, Any]) -> None:
    """Make an enum with the empty string a plain string: generators cannot name the empty value."""
    if "" in schema.get("enum", ()) or schema.get("const") == "":
        schema.pop("enum", None)
        schema.pop("const", None)


def drop_properties(schema: dict[str, Any]) -> None:
    """Remove properties that no client needs and that make generated code invalid.

    A property that can only be null has no type. `image[]` is another name of `image` in forms; in most
    languages both would become the same name. `model_name` becomes getModelName, a name that generated PHP
    code already uses.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return
    for name in list(properties):
        is_second_name = name.endswith("[]") and name[:-2] in properties
        if is_second_name or name == "model_name" or properties[name].get("type") == "null":
            del properties[name]
            schema["required"] = [one for one in schema.get("required", ()) if one != name]
    if not schema.get("required", True):
        del schema["required"]
