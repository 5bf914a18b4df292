"""The page at /: static files of the package, with a strict Content-Security-Policy."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

from service.errors import NotFound

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FOLDER = resources.files("service").joinpath("web")
FILES = {
    entry.name: entry.read_bytes()
    for entry in FOLDER.iterdir()
    if entry.name.rpartition(".")[2] in MEDIA_TYPES
}


def respond(name: str) -> Response:
    """A file of the page. Raises NotFound for an unknown name, which is never joined to a path."""
    if name not in FILES:
        raise NotFound("the page has no such file")
    return Response(FILES[name], media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=HEADERS)


@router.get("/")
async def page() -> Response:
    return respond("index.html")


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    return respond(name)
